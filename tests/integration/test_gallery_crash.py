"""A writer is killed at random moments; what is left must be one of the states that it was told to make."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retrieval.gallery import Gallery

# State n holds the vectors 0 .. 3n+1: each addition brings three more, so a mixture of two states shows in the counts.
_WRITER = """
import sys
from pathlib import Path
import numpy as np
from retrieval.gallery import Gallery

directory = Path(sys.argv[1])
gallery = Gallery.open(directory)
print("ready", flush=True)
while True:
    start = len(gallery)
    vectors = np.eye(512, dtype=np.float32)[np.arange(start, start + 3) % 512]
    gallery = gallery.add(vectors, [f"s{i}" for i in range(start, start + 3)])
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_an_old_or_a_new_state(tmp_path: Path, rounds: int) -> None:
    directory = tmp_path / "g"
    Gallery.build(directory, np.eye(512, dtype=np.float32)[:2], ["s0", "s1"])
    delays = random.Random(0)
    count = 2
    for _ in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(directory)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delays.uniform(0.0, 0.15))
        Gallery.open(directory)  # a reader beside the writer sees a whole state
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        gallery = Gallery.open(directory)
        assert len(gallery) >= count
        assert len(gallery) % 3 == 2
        count = len(gallery)
        assert gallery.entries.subject_ids.tolist() == [f"s{i}" for i in range(count)]
        np.testing.assert_array_equal(gallery.embeddings.argmax(axis=1), np.arange(count) % 512)
    gallery = gallery.add(np.ones((1, 512), np.float32), ["last"])
    names = {path.name for path in directory.iterdir()}
    assert names == {".lock", "manifest.json", *gallery.manifest.file_names}


def test_an_interrupted_first_build_can_be_repeated(tmp_path: Path) -> None:
    directory = tmp_path / "g"
    directory.mkdir()
    for name in (".embeddings-00000001.npy.ab12.tmp", "embeddings-00000001.npy", ".lock"):
        (directory / name).write_bytes(b"cut")
    gallery = Gallery.build(directory, np.ones((1, 4), np.float32), ["a"])
    assert gallery.search(np.ones(4), top=1)[0][0].subject_id == "a"
