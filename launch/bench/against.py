"""The same benchmark in two checkouts of the project, in turns, so that a busy neighbour hurts both alike."""

import json
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aroface.errors import ArofaceError, ConfigError
from aroface.files import write_json

__all__ = ["Compared", "compare", "compare_records"]

_HERE = Path(__file__).resolve().parents[2]
_MESSAGE_LINES = 15

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """One figure of both checkouts."""

    name: str
    unit: str
    here: float  #: median over the pairs
    there: float
    ratio: float | None  #: here / there, median over the pairs; None where the other is 0 in all of them
    smallest_ratio: float | None
    largest_ratio: float | None


def compare(benchmark: str, options: Sequence[str], other: Path, pairs: int, out: Path | None) -> None:
    """Run a benchmark in this checkout and in another, `pairs` times each, and print every figure of both.

    Args:
        benchmark: its name.
        options: of the benchmark, without --out.
        other: the other checkout, say a git worktree of an older commit; it runs in this Python environment.
        pairs: runs of each; which of the two begins changes from pair to pair.
        out: file for the comparison as JSON.

    Raises:
        ConfigError: `other` is no checkout of aroface.
        ArofaceError: a run failed.
    """
    if not (other / "launch" / "__main__.py").is_file() or not (other / "aroface").is_dir():
        raise ConfigError(
            f"--against {other} is no checkout of aroface (it has no launch/__main__.py or no aroface/); name the "
            "folder that holds both, such as one made by `git worktree add DIR COMMIT`."
        )
    checkouts = {"here": _HERE, "there": other.resolve()}
    records: dict[str, list[dict[str, Any]]] = {"here": [], "there": []}
    for pair in range(pairs):
        for side in ("here", "there") if pair % 2 == 0 else ("there", "here"):
            logger.info("pair %d of %d: %s", pair + 1, pairs, side)
            records[side].append(_run(checkouts[side], benchmark, options))
    compared = compare_records(records["here"], records["there"])
    _print(compared, records, pairs)
    if out is not None:
        record = {
            "benchmark": benchmark,
            "options": shlex.join(options),
            "pairs": pairs,
            "machine": records["here"][0]["machine"],
            "commits": {side: _commit(folder) for side, folder in checkouts.items()},
            "figures": [asdict(figure) for figure in compared],
            "runs": {side: [run["figures"] for run in found] for side, found in records.items()},
        }
        write_json(out, record)
        print(f"written: {out}")


def compare_records(here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """The figures that every record has, in the order of the first.

    Args:
        here: records of a benchmark, one for each pair.
        there: as many of the other checkout, in the same order.
    """
    ours, others = ([_values(record) for record in records] for records in (here, there))
    units = {figure["name"]: figure["unit"] for figure in here[0]["figures"]}
    found = []
    for name, unit in units.items():
        if not all(name in values for values in (*ours, *others)):
            continue
        pairs = [(a[name], b[name]) for a, b in zip(ours, others, strict=True)]
        ratios = [a / b for a, b in pairs if b != 0]
        found.append(
            Compared(
                name,
                unit,
                statistics.median(a for a, _ in pairs),
                statistics.median(b for _, b in pairs),
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
            )
        )
    return found


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in record["figures"]}


def _run(checkout: Path, benchmark: str, options: Sequence[str]) -> dict[str, Any]:
    """The record of one run; paths among the options mean the same in both checkouts, for the folder stays."""
    with tempfile.TemporaryDirectory(prefix="aroface-bench-") as folder:
        out = Path(folder) / "record.json"
        # PYTHONSAFEPATH keeps the current folder, which may be a checkout too, from coming before the one meant.
        path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "launch", "bench", benchmark, *options, "--out", str(out)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not out.is_file():
            said = "\n".join(done.stdout.strip().splitlines()[-_MESSAGE_LINES:])
            raise ArofaceError(
                f"`aroface bench {shlex.join([benchmark, *options])}` in {checkout} ended with exit code "
                f"{done.returncode}; choose options that both checkouts know. It said:\n{said}"
            )
        record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return record


def _print(compared: Sequence[Compared], records: Mapping[str, Sequence[Mapping[str, Any]]], pairs: int) -> None:
    print(f"{'median of ' + str(pairs):<52} {'here':>12} {'there':>12} {'here/there':>10}  range")
    for one in compared:
        line = f"{one.name:<52} {one.here:>12,.4g} {one.there:>12,.4g}"
        if one.ratio is not None:
            line += f" {one.ratio:>10.3f}  {one.smallest_ratio:.3f} - {one.largest_ratio:.3f}"
        print(f"{line}  {one.unit}")
    names = {side: dict.fromkeys(name for run in runs for name in _values(run)) for side, runs in records.items()}
    for side in names:
        missing = [name for name in names[side] if name not in {one.name for one in compared}]
        if missing:
            print(f"not in every run, but {side}: {', '.join(missing)}")


def _commit(checkout: Path) -> str | None:
    """Of a git checkout; changes that are not committed do not show."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
