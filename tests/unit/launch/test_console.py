import re
from pathlib import Path

import pytest

from launch import console
from launch.cli import main
from launch.console import new_table, show
from launch.evaluate_options import print_record
from launch.progress import Progress

ODD = ["[old] g1", "[/x]", "[bold]b[/bold]", "\\[a]", ":smile:", "[link=x]"]
LONG = ["i" * 300, f"{'long/' * 40}[red].jpg"]


def column(printed: str, place: int) -> str:
    """Everything that stands in one column, joined: a cell that goes on in the next line is whole again."""
    rows = [re.split("[│┃]", line) for line in printed.splitlines()]
    return "".join(cells[place + 1].strip(" ") for cells in rows if len(cells) > place + 1)


@pytest.mark.parametrize("width", [40, 80, 400])
def test_every_name_is_shown_as_it_is_and_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = [
        name.replace(" ", "_") for name in ODD + LONG
    ]  # a space at the end of a line would be lost on the way back
    table = new_table("n", "score", numbers=("score",))
    for name in names:
        table.add_row(name, "0.5000")
    show(table)
    printed = capsys.readouterr().out
    assert column(printed, 0) == "n" + "".join(names)
    assert column(printed, 1) == "score" + "0.5000" * len(names)
    assert max(map(len, printed.splitlines())) <= width


@pytest.mark.parametrize("name", ODD)
def test_titles_captions_and_warnings_are_shown_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    metrics = {f"tar@{name}": {"value": None, "reason": f"no {name}"}}
    record = {"metrics": metrics, "counts": {name: 1}, "rule": "canonical", "warnings": [f"look at {name}"]}
    print_record(record, title=f"T {name}")
    printed = capsys.readouterr().out
    for said in (f"T {name}", f"tar@{name}", f"no {name}", f"{name} 1; rule", f"* look at {name}"):
        assert said in printed


def test_progress_shows_its_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Accuracy, [/x] [m1]", total=1, unit="images") as progress:
        progress.update(1)
    assert "Accuracy, [/x] [m1]: 1 of 1 images" in capsys.readouterr().err


def test_checkpoint_info_shows_the_path_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "[old] run"
    (run / "step-00000001").mkdir(parents=True)
    assert main(["checkpoint", "info", str(run / "step-00000001")]) == 0
    assert "[old]run" in "".join(capsys.readouterr().out.split())


def test_all_tables_of_the_command_line_are_made_in_one_place() -> None:
    folder = Path(console.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if re.search(r"from rich\.(console|table) ", path.read_text())}
    assert users == {"console.py", "progress.py"}
