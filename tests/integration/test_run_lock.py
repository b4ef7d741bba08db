"""One job at a time in a run directory."""

import errno
import fcntl
import os
import shutil

import pytest

from aroface.engine.run_directory import LOCK_FILE, hold_run
from aroface.engine.trainer import Trainer
from aroface.errors import ArofaceError, CheckpointError
from launch.cli import main
from tests.helpers.ranks import run_on_ranks
from tests.helpers.training import COMPARABLE, DrawnData, config_of, tensors, train

TAKEN = r"run is in use by process \d+ on .*Wait for that job or end it, or name another directory"


def trainer_of(run):
    return Trainer(config_of(*COMPARABLE), DrawnData(), run, resume="auto")


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was stopped after 3 of 6 steps."""
    run = tmp_path_factory.mktemp("lock") / "half"
    train(run, *COMPARABLE, stop_after=3)
    return run


@pytest.fixture
def run(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def test_a_second_job_is_refused_touches_nothing_and_goes_on_afterwards(run):
    early = trainer_of(run)
    before = contents(run)
    with hold_run(run):
        with pytest.raises(CheckpointError, match=TAKEN):
            trainer_of(run)
        with pytest.raises(CheckpointError, match=TAKEN):
            early.train()
    assert contents(run) == before
    assert early.train().position.step == 6


def test_the_lock_is_held_while_a_job_trains_and_no_longer(run, monkeypatch):
    trainer, told = trainer_of(run), []
    step = trainer._step

    def step_beside_another_job(*args):
        with pytest.raises(CheckpointError, match=TAKEN):
            trainer_of(run)
        told.append(main(["checkpoint", "prune", str(run), "--keep-last", "1"]))
        return step(*args)

    monkeypatch.setattr(trainer, "_step", step_beside_another_job)
    trainer.train()
    assert told == [2, 2, 2]
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert [path.name for path in sorted(run.glob("step-*"))] == ["step-00000006"]


def test_a_failed_training_frees_the_lock(run, monkeypatch):
    trainer = trainer_of(run)
    monkeypatch.setattr(trainer, "_loop", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    train(run, *COMPARABLE)


def test_a_job_that_another_one_overtook_while_it_was_set_up_does_not_redo_its_steps(run):
    late = trainer_of(run)
    train(run, *COMPARABLE)
    before = contents(run)
    with pytest.raises(CheckpointError, match="another job wrote there. Give the same command again"):
        late.train()
    assert contents(run) == before


def test_looking_and_a_rehearsal_of_pruning_need_no_lock(run):
    with hold_run(run):
        for options in (["info"], ["verify"], ["prune", "--keep-last", "1", "--dry-run"]):
            assert main(["checkpoint", options[0], str(run), *options[1:]]) == 0


def test_a_file_system_without_locks_is_a_warning(run, half, tmp_path, monkeypatch, caplog):
    whole = shutil.copytree(half, tmp_path / "whole")
    expected = train(whole, *COMPARABLE).tensors

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(run, *COMPARABLE)
    assert "without locks: see to it that no second job runs there" in caplog.text
    found = tensors(run / "step-00000006")
    assert all((found[name] == expected[name]).all() for name in expected)


def told_on(rank, ranks, run):
    trainer = trainer_of(run)
    lock = fcntl.flock
    if rank == 0:  # taken after the job has looked, and only the first rank may ask
        with hold_run(run):
            return _told(trainer)
    fcntl.flock = lambda *args: os._exit(1)
    try:
        return _told(trainer)
    finally:
        fcntl.flock = lock


def _told(trainer):
    try:
        return str(trainer.train())
    except ArofaceError as error:
        return str(error)


@pytest.mark.slow
def test_all_ranks_are_told_alike(tmp_path):
    first, second = run_on_ranks(told_on, 2, tmp_path / "run", timeout_s=300)
    assert first == second
    assert "is in use by process" in first
