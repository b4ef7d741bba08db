"""A study of two tiny trainings, through the public command."""

from pathlib import Path

import pytest
import yaml

from launch.cli import main

STUDY = Path(__file__).parents[2] / "configs" / "study" / "alignment.yaml"


@pytest.mark.slow
def test_a_tiny_study_runs_and_goes_on(tmp_path, drawn_faces, capsys):
    """Two arms and one seed; a second call finds everything done."""
    values = yaml.safe_load(STUDY.read_text(encoding="utf-8")) | {"seeds": [0], "budgets": ["epochs"]}
    values |= {"heads": {"arcface": values["heads"]["arcface"]}, "sizes_px": [14], "fae_probes": 4}
    values["alignments"] = {name: values["alignments"][name] for name in ("none", "random")}
    recipe = (STUDY.parent / "faces-32px.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("epochs: 8", "epochs: 1"),
        ("warmup_epochs: 1", "warmup_epochs: 0"),
        ("global_batch: 128", "global_batch: 8"),
        ("min_images_per_identity: 10", "min_images_per_identity: 2"),
    ):
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tmp_path / "faces-32px.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    out = tmp_path / "out"
    command = ["study", str(tmp_path / "study.yaml"), "--data", str(drawn_faces), "--test", str(drawn_faces)]
    assert main([*command, "--out", str(out)]) == 0
    assert "2 of 2 finished" in (out / "study.md").read_text()
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 0
    assert "$ aroface" not in capsys.readouterr().out
    assert {"study.json", "study.svg", "study.png"} <= {path.name for path in out.iterdir()}
