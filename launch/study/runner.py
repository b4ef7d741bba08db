"""Trains and evaluates the runs of a study, one process each, and goes on where it was stopped."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.stages import Stage, StageFailedError, run_stages
from launch.study.design import Study, StudyRun
from launch.threads import free_cores

__all__ = ["RESULTS", "StudyData", "is_finished", "run_directory", "run_study"]

#: Result files of a run, by what they hold.
RESULTS = {"lfw-lq": "lfw-lq.json", "fae": "fae.json"}

#: Public pair lists name a few images that copies of the set lack.
_MAX_MISSING_PAIRS = 5


@dataclass(frozen=True)
class StudyData:
    """What is trained and tested on."""

    shards: Path
    test: Path
    pairs: Path | None  #: LFW-style list; None draws pairs from the test set


def run_study(
    study: Study, data: StudyData, out: Path, *, jobs: int, threads: int | None, say: Callable[[str], None]
) -> None:
    """Run what is not done yet.

    Args:
        study: what to train.
        data: where the images are.
        out: directory of the study.
        jobs: runs side by side.
        threads: of each run; None takes its share of the cores that are idle when it starts.
        say: called with a line per command.

    Raises:
        StageFailedError: a command of a run failed; runs that were going on are finished first.
    """
    waiting = [run for run in study.runs() if not is_finished(out, run)]
    failures: list[StageFailedError] = []

    def work(run: StudyRun) -> None:
        if failures:
            return
        directory = run_directory(out, run)
        directory.mkdir(parents=True, exist_ok=True)
        stages = _stages(study, data, directory, run, threads or max(1, free_cores() // jobs))
        try:
            run_stages(stages, record_path=directory / "stages.json", say=say)
        except StageFailedError as error:
            failures.append(error)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, waiting))
    if failures:
        raise failures[0]


def run_directory(out: Path, run: StudyRun) -> Path:
    """Where a run keeps its training and its results."""
    return out / "runs" / run.name


def is_finished(out: Path, run: StudyRun) -> bool:
    """Whether both evaluations of a run are there; they are written whole or not at all."""
    return all((run_directory(out, run) / name).is_file() for name in RESULTS.values())


def _stages(study: Study, data: StudyData, directory: Path, run: StudyRun, threads: int) -> Sequence[Stage]:
    trained, config = directory / "train", study.config
    common = ("--model", str(trained), "--faces", str(data.test), "--threads", str(threads), "--flip", "none")
    pairs = () if data.pairs is None else ("--pairs", str(data.pairs), "--max-missing-pairs", str(_MAX_MISSING_PAIRS))
    train = (
        *("train", str(study.base), f"data.shards={data.shards}", *run.overrides, f"engine.threads={threads}"),
        *("--run", str(trained)),
    )
    low_quality = (
        *("evaluate", "lfw-lq", *common, *pairs, "--no-baselines", "--sizes", ",".join(map(str, config.sizes_px))),
        *("--out", str(directory / RESULTS["lfw-lq"])),
    )
    misaligned = (
        *("evaluate", "fae", *common, "--subset", str(config.fae_probes)),
        *("--out", str(directory / RESULTS["fae"])),
    )
    return [Stage(f"Train {run.name}", train), Stage("Low quality", low_quality), Stage("Misalignment", misaligned)]
