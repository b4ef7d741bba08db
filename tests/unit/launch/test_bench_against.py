import json
from pathlib import Path
from typing import Any

import pytest

from aroface.errors import ArofaceError, ConfigError
from launch.bench import against
from launch.bench.against import compare, compare_records

#: Stands in for a checkout: writes a record with one figure, after a line in a common log of who ran.
_MAIN = """
import json, sys
from pathlib import Path
name, options, out = sys.argv[2], sys.argv[3:-2], Path(sys.argv[-1])
assert sys.argv[1] == "bench" and sys.argv[-2] == "--out"
log = Path({log!r})
with log.open("a") as file:
    file.write(json.dumps([{who!r}, name, options]) + "\\n")
if "--broken" in options:
    sys.exit("no such option: --broken")
figures = [{{"name": "search", "value": {value} * len(log.read_text().splitlines()), "unit": "ms"}}]
figures.append({{"name": "only {who}", "value": 1.0, "unit": ""}})
out.write_text(json.dumps({{"figures": figures, "machine": {{"cores": 2}}}}))
"""


def record(**values: float) -> dict[str, Any]:
    return {"figures": [{"name": name, "value": value, "unit": "s"} for name, value in values.items()]}


def test_ratios_are_those_of_the_pairs():
    here, there = [record(a=2.0), record(a=30.0), record(a=6.0)], [record(a=4.0), record(a=20.0), record(a=4.0)]
    (found,) = compare_records(here, there)
    assert (found.here, found.there) == (6.0, 4.0)
    assert (found.ratio, found.smallest_ratio, found.largest_ratio) == (1.5, 0.5, 1.5)


def test_figures_that_a_run_lacks_are_left_out_and_nothing_is_divided_by_zero():
    here, there = [record(a=1.0, zero=1.0, mine=1.0)], [record(theirs=1.0, zero=0.0, a=2.0)]
    found = {one.name: one.ratio for one in compare_records(here, there)}
    assert found == {"a": 0.5, "zero": None}


@pytest.fixture
def checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Another checkout and a log of the runs; this checkout is replaced too."""
    log = tmp_path / "log"
    for who, value in (("here", 1), ("there", 10)):
        (tmp_path / who / "aroface").mkdir(parents=True)
        (tmp_path / who / "launch").mkdir()
        (tmp_path / who / "launch" / "__init__.py").touch()
        (tmp_path / who / "launch" / "__main__.py").write_text(_MAIN.format(log=str(log), who=who, value=value))
    monkeypatch.setattr(against, "_HERE", tmp_path / "here")
    return tmp_path / "there", log


def test_both_checkouts_run_in_turns_and_each_its_own_code(
    checkouts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other, log = checkouts
    compare("gallery", ["--size", "5"], other, 3, tmp_path / "out.json")
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert [who for who, *_ in runs] == ["here", "there", "there", "here", "here", "there"]
    assert all(rest == ["gallery", ["--size", "5"]] for _, *rest in runs)
    printed = capsys.readouterr().out
    assert "not in every run, but here: only here" in printed
    assert "not in every run, but there: only there" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    # values: 1, 4, 5 here and 20, 30, 60 there
    (figure,) = written["figures"]
    assert figure["name"] == "search"
    assert (figure["here"], figure["there"]) == (4.0, 30.0)
    assert figure["ratio"] == 5 / 60
    assert (figure["smallest_ratio"], figure["largest_ratio"]) == (1 / 20, 4 / 30)
    assert (written["pairs"], written["options"]) == (3, "--size 5")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="git worktree add"):
        compare("gallery", [], tmp_path, 1, None)


def test_a_run_that_fails_ends_the_comparison_with_what_it_said(checkouts: tuple[Path, Path]):
    with pytest.raises(ArofaceError, match=r"options that both checkouts know(.|\n)*no such option: --broken"):
        compare("gallery", ["--broken"], checkouts[0], 1, None)
