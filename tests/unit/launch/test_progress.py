import pytest

from launch import progress as module
from launch.progress import Progress, StagedProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("before", "updates", "said"),
    [
        (0, [(2.0, 50)], "50 of 50 images, 25.0/s"),  # over before the first line was due
        (0, [(2.0, 10), (5.0, 50)], "50 of 50 images, 10.0/s"),
        (30, [(0.0, 30), (5.0, 50)], "50 of 50 images, 4.0/s"),  # 30 were there before
        (50, [(0.0, 50)], "50 of 50 images\n"),
        (0, [(20.0, 10)], "10 of 50 images, 0.5/s, 1 min 20 s left"),
    ],
)
def test_the_rate_is_of_what_was_done_here(
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    before: int,
    updates: list[tuple[float, int]],
    said: str,
) -> None:
    with Progress("Embed", total=50, unit="images", done_before=before) as progress:
        for elapsed, done in updates:
            clock[0] = 100 + elapsed
            progress.update(done)
    assert capsys.readouterr().err == f"Embed: {said}".rstrip("\n") + "\n"


def test_a_stage_that_begins_with_what_was_there_tells_no_rate_of_it(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with StagedProgress(unit="shards") as progress:
        progress.update("Hash", 4, 4)
        progress.update("Pack", 2, 4)
        clock[0] += 4
        progress.update("Pack", 4, 4)
    assert capsys.readouterr().err == "Hash: 4 of 4 shards\nPack: 4 of 4 shards, 0.5/s\n"
