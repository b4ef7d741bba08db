import json
from pathlib import Path

import pytest

from launch.bench.output import Figure, Report


def test_a_time_reaches_the_share_of_its_limit_that_the_limit_is_of_it():
    assert Figure("a", 8.0, "ms", limit=2.0).of_limit == 0.25


def test_a_rate_reaches_the_share_of_its_limit_that_it_is_of_the_limit():
    assert Figure("a", 2.0, "img/s", limit=8.0, higher_is_better=True).of_limit == 0.25


@pytest.mark.parametrize(
    "figure",
    [
        Figure("none", 3.0, "ms"),
        Figure("a time that no clock saw", 0.0, "ms", limit=1.0),
        Figure("a limit of nothing", 1.0, "/s", limit=0.0, higher_is_better=True),
    ],
)
def test_without_something_to_compare_with_there_is_no_share(figure: Figure):
    assert figure.of_limit is None


def test_a_limit_is_printed_and_written_beside_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = Report("name", (), {})
    report.add("search", 8.0, "ms", limit=2.0, at_most=10)
    report.add("plain", 1.0, "s")
    printed = capsys.readouterr().out.splitlines()
    assert "8 ms; limit 2, 25 % of the limit (at most 10: reached)" in printed[0]
    assert "limit" not in printed[1]
    report.write(tmp_path / "r.json")
    search, plain = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert (search["limit"], search["of_limit"], search["reached"]) == (2.0, 0.25, True)
    assert plain["limit"] is plain["of_limit"] is None
