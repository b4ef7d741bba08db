"""The files that a report is made from, read and checked before anything is drawn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aroface.errors import DataError
from aroface.files import read_json
from retrieval.report.published import Reference
from retrieval.results import read_result

__all__ = ["ReportInputs", "Run", "read_inputs"]

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Run:
    """What a training run left behind."""

    name: str
    metrics: tuple[Mapping[str, Any], ...]  #: lines of metrics.jsonl
    config: str  #: YAML text, "" when absent
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class ReportInputs:
    """Everything a page can show; all but the results may be absent."""

    results: tuple[Mapping[str, Any], ...]
    run: Run | None = None
    stages: Mapping[str, Any] = field(default_factory=dict)
    grid: bytes | None = None
    references: tuple[Reference, ...] = ()
    names: tuple[str, ...] = ()  #: one label per result, or none


def read_inputs(
    results: Sequence[Path],
    *,
    run: Path | None = None,
    stages: Path | None = None,
    grid: Path | None = None,
    references: Path | None = None,
    names: Sequence[str] = (),
) -> ReportInputs:
    """Read and check all files.

    Args:
        results: written by `aroface evaluate`, at least one.
        run: directory of `aroface train`.
        stages: record of the stages that `aroface quickstart` writes.
        grid: PNG that `aroface attack` draws.
        references: JSON `{"rows": [{"protocol", "metric", "value", "source"}]}` of values to compare with.
        names: one label per result; none: the ids of the models.

    Raises:
        DataError: a file is missing or is something else.
    """
    return ReportInputs(
        results=tuple(read_result(path) for path in results),
        run=_read_run(run) if run else None,
        stages=_read_stages(stages) if stages else {},
        grid=_read_png(grid) if grid else None,
        references=_read_references(references) if references else (),
        names=tuple(names),
    )


def _read_run(directory: Path) -> Run:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"--run {directory} holds no metrics.jsonl; name a directory that `aroface train --run` wrote.")
    config, environment = directory / "config.yaml", directory / "environment.json"
    return Run(
        name=directory.name,
        metrics=tuple(_read_lines(path)),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=read_json(environment) if environment.is_file() else {},
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if "evaluation" not in values:
                found.append({"samples": int(values["samples"]), **values})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a run that is still going may be in the middle of its last line
            raise DataError(f"{path}, line {number} is not a line of training metrics: {line[:60]!r}.") from error
    return found


def _read_stages(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record.get("stages"), list):
        raise DataError(f"{path} holds no list of stages; name the run.json that `aroface quickstart` wrote.")
    return record


def _read_png(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not data.startswith(_PNG_MAGIC):
        raise DataError(f"{path} is not a PNG file; `aroface attack RUN --out {path.stem}.png` draws one.")
    return data


def _read_references(path: Path) -> tuple[Reference, ...]:
    rows = read_json(path).get("rows")
    if not isinstance(rows, list):
        raise DataError(f'{path} needs "rows": a list of objects with protocol, metric, value and source.')
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(Reference(str(row["protocol"]), str(row["metric"]), float(row["value"]), str(row["source"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, rows[{number}] = {json.dumps(row)}: protocol, metric, value (in 0..1) and source are needed."
            ) from error
        if not 0 <= found[-1].value <= 1:
            raise DataError(f"{path}, rows[{number}].value = {found[-1].value} is outside [0, 1]; write 83 % as 0.83.")
    return tuple(found)
