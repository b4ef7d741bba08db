"""Two checkouts with different changes on the same commit are not the same code."""

import shutil
import subprocess
from pathlib import Path

from aroface.engine import checkpoint


def test_changes_are_told_apart(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    code = root / "aroface" / "engine" / "checkpoint.py"
    code.parent.mkdir(parents=True)
    shutil.copy(Path(checkpoint.__file__), code)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    monkeypatch.setattr(checkpoint, "__file__", str(code))
    clean = checkpoint.git_commit()
    assert len(clean) == 40
    found = set()
    for text in ("# one\n", "# other\n", "# one\n"):
        code.write_text(text)
        found.add(checkpoint.git_commit())
    assert len(found) == 2
    assert all(name.startswith(f"{clean}-dirty-") for name in found)
