"""A run directory: one configuration, its checkpoints and its metrics. Which checkpoint a run continues from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from aroface.config import TrainConfig, dump_config
from aroface.config.load import parse_config, read_yaml
from aroface.engine.checkpoint import git_commit, versions
from aroface.engine.checkpoint_layout import list_checkpoints, newest_valid, read_training_state, resolve_checkpoint
from aroface.errors import CheckpointError, ConfigError
from aroface.files import atomic_path, write_json, writing
from aroface.locks import NoLocksError, try_lock

__all__ = ["CONFIG_FILE", "DEEPSPEED_FILE", "LOCK_FILE", "choose_checkpoint", "hold_run", "record_run"]

CONFIG_FILE = "config.yaml"
DEEPSPEED_FILE = "deepspeed.json"
LOCK_FILE = ".lock"
#: Sections that may change between a run and its continuation, because they do not change the result.
_FREE_SECTIONS = frozenset({"engine", "checkpoint", "log", "evaluate"})
_BOUND_KEYS = frozenset({"engine.precision", "engine.batch_norm"})
#: Follows the number of ranks, which may change; batch.global_batch stays.
_FREE_KEYS = frozenset({"batch.micro_batch"})

logger = logging.getLogger(__name__)


def choose_checkpoint(run: Path, config: TrainConfig, resume: Literal["auto", "never"] | Path) -> Path | None:
    """The checkpoint to continue from, None to start afresh. It hashes all of it: one rank asks for all.

    Raises:
        CheckpointError: `never` on a directory that holds a run, a path without a checkpoint, only damaged checkpoints,
            weights without a run, a run of another configuration, or one that is ahead of the checkpoint at the path;
            another job is at work there.
    """
    if resume == "never":
        if run.exists() and any(run.iterdir()):
            raise CheckpointError(
                f"{run} is not empty and --resume never starts afresh. Name another --run, or remove it."
            )
        return None
    if (run / LOCK_FILE).is_file():  # told before minutes go into setting up; `hold_run` is what keeps jobs apart
        with hold_run(run):
            pass
    if (run / CONFIG_FILE).is_file():
        _check_same(run / CONFIG_FILE, config)
    if isinstance(resume, Path):
        source = resolve_checkpoint(resume)
        read_training_state(source)
        _check_not_behind(run, source)
        return source
    found = newest_valid(run)
    if found is not None:
        read_training_state(found)
    if found is None and list_checkpoints(run):
        raise CheckpointError(f"{run} holds checkpoints, but none is whole. Name another --run to start afresh.")
    if found is None and (run / CONFIG_FILE).is_file():
        logger.info("%s holds no checkpoint yet; starting from the first step.", run)
    return found


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Keep other jobs from writing to a run directory meanwhile; it is made where it is missing. Rank 0 only.

    Where the file system has no locks this is a warning: then it is up to the user to start one job at a time.

    Raises:
        CheckpointError: another job is at work there.
        ArofaceError: nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            with writing(run):
                run.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(try_lock(run / LOCK_FILE))
        except NoLocksError:
            logger.warning("%s lies on a file system without locks: see to it that no second job runs there.", run)
        else:
            if not lock.is_mine:
                raise CheckpointError(
                    f"{run} is in use by {lock.holder}. Wait for that job or end it, or name another directory: two "
                    "jobs in one would remove each other's checkpoints."
                )
        yield


def record_run(run: Path, config: TrainConfig, *, deepspeed: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Write what runs: resolved configuration, DeepSpeed settings, overrides, versions, commit. Rank 0 only."""
    run.mkdir(parents=True, exist_ok=True)
    with atomic_path(run / CONFIG_FILE) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    write_json(run / DEEPSPEED_FILE, dict(deepspeed))
    write_json(
        run / "environment.json", {"versions": versions(), "git_commit": git_commit(), "overrides": list(overrides)}
    )


def _check_not_behind(run: Path, source: Path) -> None:
    """Later checkpoints of the same directory would win the next `auto`, though they belong to an abandoned course."""
    later = [path for path in list_checkpoints(run) if path.name > source.name]
    if later:
        raise CheckpointError(
            f"{run} already holds {later[-1].name}, later than {source.name}. Name another --run to branch off, "
            "or remove the later checkpoints to go back."
        )


def _check_same(stored: Path, config: TrainConfig) -> None:
    values = read_yaml(stored.read_text(encoding="utf-8"), name=str(stored))
    try:  # settings that are newer than the run have the defaults that it ran with
        values = parse_config(values, TrainConfig, name=str(stored)).model_dump(mode="json")
    except ConfigError:
        logger.debug("%s is of another version.", stored)
    before = _flat(values)
    now = _flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and _is_bound(key)
    ]
    if changed:
        raise CheckpointError(
            f"{stored.parent} holds a run with another configuration ({'; '.join(changed)}). "
            "Name another --run, or repeat the settings of that run to continue it."
        )


def _is_bound(key: str) -> bool:
    return key in _BOUND_KEYS or (key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
