"""A run directory: one configuration, its checkpoints and its metrics. Which checkpoint a run continues from."""

from pathlib import Path
from typing import Any, Literal

from aroface.config import TrainConfig, dump_config
from aroface.config.load import read_yaml
from aroface.engine.checkpoint import git_commit, versions
from aroface.engine.checkpoint_layout import list_checkpoints, newest_valid, resolve_checkpoint
from aroface.errors import CheckpointError
from aroface.files import atomic_path, write_json

__all__ = ["CONFIG_FILE", "open_run"]

CONFIG_FILE = "config.yaml"
#: Sections that may change between a run and its continuation, because they do not change the result.
_FREE_SECTIONS = frozenset({"engine", "checkpoint", "log"})


def open_run(
    run: Path, config: TrainConfig, resume: Literal["auto", "never"] | Path, *, is_writer: bool
) -> Path | None:
    """Make or check the run directory; returns the checkpoint to continue from, None to start afresh.

    Raises:
        CheckpointError: `never` on a directory that holds a run, a path without a checkpoint, only damaged checkpoints,
            or a run of another configuration.
    """
    stored = run / CONFIG_FILE
    if resume == "never" and run.exists() and any(run.iterdir()):
        raise CheckpointError(f"{run} is not empty and --resume never starts afresh. Name another --run, or remove it.")
    source: Path | None = None
    if isinstance(resume, Path):
        source = resolve_checkpoint(resume)
    elif resume == "auto":
        if stored.is_file():
            _check_same(stored, config)
        source = newest_valid(run)
        if source is None and list_checkpoints(run):
            raise CheckpointError(f"{run} holds checkpoints, but none is whole. Name another --run to start afresh.")
    if is_writer:
        run.mkdir(parents=True, exist_ok=True)
        with atomic_path(stored) as temporary:
            temporary.write_text(dump_config(config), encoding="utf-8")
        write_json(run / "environment.json", {"versions": versions(), "git_commit": git_commit()})
    return source


def _check_same(stored: Path, config: TrainConfig) -> None:
    before = _flat(read_yaml(stored.read_text(encoding="utf-8"), name=str(stored)))
    now = _flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in _FREE_SECTIONS
    ]
    if changed:
        raise CheckpointError(
            f"{stored.parent} holds a run with another configuration ({'; '.join(changed)}). "
            "Name another --run, or repeat the settings of that run to continue it."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
