"""metrics.jsonl on a disk that fails."""

import errno
import json
from pathlib import Path

import pytest

from aroface.engine.metrics import METRICS_FILE, MetricsLog
from aroface.errors import ArofaceError
from tests.helpers.training import COMPARABLE, train


def test_a_disk_that_is_full_for_the_log_stops_the_run_and_says_so(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS_FILE).symlink_to("/dev/full")
    with pytest.raises(ArofaceError, match=r"metrics.jsonl cannot be written.*No space left on device.*Free space"):
        train(run, *COMPARABLE)


def test_a_resume_rewrites_the_log_whole_or_not_at_all(tmp_path, monkeypatch):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / METRICS_FILE).write_text("".join(lines))

    def full(path, text, **options):
        path.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            MetricsLog(tmp_path, resumed_step=2, tensorboard=False)
    assert (tmp_path / METRICS_FILE).read_text() == "".join(lines)
    MetricsLog(tmp_path, resumed_step=2, tensorboard=False)
    assert (tmp_path / METRICS_FILE).read_text() == "".join(lines[:2])


def test_events_that_cannot_be_flushed_do_not_hide_why_training_ended(tmp_path, caplog):
    class Full:
        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
    log._board = Full()
    log.close()
    assert "TensorBoard events could not be written: [Errno 28] No space left" in caplog.text
