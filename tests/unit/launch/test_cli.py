"""The command table: fast help, lazy imports, exit codes, and names that shadow nothing."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main

ROOT = Path(__file__).parents[3]
PACKAGES = ("aroface", "shards", "export", "retrieval", "launch")
HEAVY = ("torch", "deepspeed", "numpy", "faiss", "onnx", "onnxruntime", "matplotlib", "pydantic", "rich")


def test_help_imports_nothing_heavy_and_lists_every_command():
    script = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.rstrip().endswith("loaded []")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"aroface {command}" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean `aroface train`?" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT)


@pytest.mark.parametrize("path", [path for path in modules() if path.name != "__main__.py"], ids=str)
def test_every_module_imports(path):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))


def test_no_file_shadows_a_dependency_or_a_sibling():
    taken = set(importlib.metadata.packages_distributions()) | set(PACKAGES)
    own = {path.stem for path in modules()} - {"__init__", "__main__"}
    assert own & taken == set()
