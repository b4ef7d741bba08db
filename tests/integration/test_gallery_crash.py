"""A writer is killed: at random moments, and before each of its file operations.

What is left must be the state that it had reached, or the one that it was making.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aroface.errors import DataError
from retrieval.gallery import Gallery, segments

DIM = 64

# Change number n is always the same, so that the test knows every state without being told: n mod 6 is 0, 1, 3: enrol
# three; 2: remove the oldest two; 4: compact; 5: build anew with every other entry. "begin n" is said before, "done n"
# when the gallery has acknowledged it.
_CHANGES = """
import numpy as np

def vectors(ids):
    return np.stack([np.random.default_rng(int(i)).normal(size=64) for i in ids]).astype(np.float32)

def after(ids, n):
    if n % 6 in (0, 1, 3):
        return ids + [str(3 * n + i) for i in range(3)]
    if n % 6 == 2:
        return ids[2:]
    return ids[::2] if n % 6 == 5 else ids

def make(Gallery, gallery, ids, n):
    new = after(ids, n)
    if n % 6 in (0, 1, 3):
        return gallery.add(vectors(new[-3:]), new[-3:], new[-3:])
    if n % 6 == 2:
        return gallery.remove(entry_ids=ids[:2])
    if n % 6 == 4:
        return gallery.compact()
    return Gallery.build(gallery.directory, vectors(new), new, new, index="hnsw", replace=True)
"""
_WRITER = (
    _CHANGES
    + """
import sys
from pathlib import Path
from retrieval.gallery import Gallery, IndexWish, segments

segments.SEGMENT_ROWS = 8
gallery = Gallery.open(Path(sys.argv[1]))
ids, n = gallery.entries.entry_ids.tolist(), int(sys.argv[2])
gallery.search(vectors(["0"]), top=1)
print("ready", flush=True)
while True:
    print("begin", n, flush=True)
    gallery = make(Gallery, gallery, ids, n)
    print("done", n, flush=True)
    ids, n = after(ids, n), n + 1
"""
)
# A kind of change, or a first build (-1), is made by children that are killed before their first, second, ... operation
# on its files, until one is not. What each leaves is copied. The parent has no threads that a child could miss.
_EACH_OPERATION = (
    _CHANGES
    + """
import os, shutil, signal, sys
from pathlib import Path
from retrieval.gallery import Gallery, segments

segments.SEGMENT_ROWS = 8
start, kind = Path(sys.argv[1]), int(sys.argv[2])
copy = start.with_name(f"copy-{kind}")

def killed_before(operation):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and copy.name in str(arguments[0]):
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    return hook

operation, signalled = 0, True
while signalled:
    shutil.rmtree(copy, ignore_errors=True)
    if kind >= 0:
        shutil.copytree(start, copy)
    child = os.fork()
    if not child:
        gallery = Gallery.open(start)
        ids = gallery.entries.entry_ids.tolist()
        if kind >= 0:
            gallery = Gallery.open(copy)
        sys.addaudithook(killed_before(operation))
        if kind >= 0:
            make(Gallery, gallery, ids, kind)
        else:
            Gallery.build(copy, vectors(ids), ids, ids, index="hnsw")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    signalled = os.WIFSIGNALED(status)
    assert signalled or status == 0
    left = start.with_name(f"left-{operation:03d}")
    shutil.copytree(copy, left) if copy.exists() else left.mkdir()
    operation += 1
"""
)
_BUILDER = """
import sys
from pathlib import Path
import numpy as np
from retrieval.gallery import Gallery, segments

segments.SEGMENT_ROWS = 64
print("ready", flush=True)
vectors = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
Gallery.build(Path(sys.argv[1]), vectors, np.arange(2000), index="sq8")
print("done", flush=True)
"""


def _killed(code: str, *arguments: str, delay_s: float, kind: int | None = None) -> list[str]:
    """What a writer said until it was killed, `delay_s` after it was ready, or after it began a change of a kind."""
    writer = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    heard: list[str] = []
    while kind is not None and not (heard and heard[-1].startswith("begin") and int(heard[-1][6:]) % 6 == kind):
        heard.append(writer.stdout.readline())
    time.sleep(delay_s)
    writer.send_signal(signal.SIGKILL)
    said, _ = writer.communicate()
    return "".join([*heard, said]).splitlines()


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_changes(tmp_path: Path, rounds: int) -> None:
    changes: dict[str, Any] = {}
    exec(_CHANGES, changes)  # noqa: S102 - the same functions that the writer runs
    directory = tmp_path / "g"
    ids, n = ["900001", "900002"], 0
    Gallery.build(directory, changes["vectors"](ids), ids, ids, index="hnsw")
    delays = random.Random(0)
    for turn in range(rounds):
        lines = _killed(_WRITER, str(directory), str(n), delay_s=delays.uniform(0.0, 0.03), kind=(5 * turn + 2) % 6)
        for line in lines:
            said, _, number = line.partition(" ")
            if said == "done":
                assert int(number) == n
                ids, n = changes["after"](ids, n), n + 1
        gallery = Gallery.open(directory)
        left = gallery.entries.entry_ids.tolist()
        assert left in (ids, changes["after"](ids, n))
        np.testing.assert_allclose(gallery.embeddings * gallery.entries.norms[:, None], changes["vectors"](left), 1e-5)
        for entry, found in zip(left, gallery.search(changes["vectors"](left), top=1), strict=True):
            assert found[0].entry_id == found[0].subject_id == entry
        if left != ids:
            ids, n = left, n + 1
    gallery = gallery.add(np.ones((1, DIM), np.float32), ["last"])
    assert _holds_nothing_else(directory, gallery)


def _left_by_kills(directory: Path, kind: int) -> list[Path]:
    """What is left of a gallery by a writer that dies before its first, second, ... file operation; the last lives."""
    arguments = [sys.executable, "-c", _EACH_OPERATION, str(directory), str(kind)]
    subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=100)
    states = sorted(directory.parent.glob("left-*"))
    assert len(states) > 4  # at least the lock, a new file, its rename and the manifest
    return states


def _holds_nothing_else(directory: Path, gallery: Gallery) -> bool:
    return {path.name for path in directory.iterdir()} == {".lock", "manifest.json", *gallery.manifest.file_names}


@pytest.mark.parametrize("kind", [1, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (2, 4, 5))])
def test_a_change_killed_before_each_of_its_file_operations(tmp_path: Path, kind: int) -> None:
    changes: dict[str, Any] = {}
    exec(_CHANGES, changes)  # noqa: S102 - as above
    ids = [str(900000 + i) for i in range(12)]
    gallery = Gallery.build(tmp_path / "g", changes["vectors"](ids), ids, ids, index="hnsw")
    gallery = gallery.add(changes["vectors"](["800000"]), ["800000"], ["800000"]).remove(entry_ids=["900003"])
    old = gallery.entries.entry_ids.tolist()
    new = changes["after"](old, kind)
    reached = []
    for directory in _left_by_kills(tmp_path / "g", kind):
        gallery = Gallery.open(directory)
        left = gallery.entries.entry_ids.tolist()
        assert left in (old, new)
        reached.append(gallery.manifest.generation)
        found = gallery.search(changes["vectors"](left), top=1)
        assert [near[0].entry_id for near in found] == left
        assert _holds_nothing_else(directory, gallery.add(np.ones((1, DIM), np.float32), ["last"]))
    assert reached == sorted(reached)
    assert reached[0] < reached[-1] == reached[0] + 1


@pytest.mark.slow
def test_a_first_build_killed_before_each_of_its_file_operations(tmp_path: Path) -> None:
    ids = [str(900000 + i) for i in range(12)]
    Gallery.build(tmp_path / "g", np.random.default_rng(0).normal(size=(12, DIM)).astype(np.float32), ids, ids)
    done = []
    for directory in _left_by_kills(tmp_path / "g", -1):
        done.append((directory / "manifest.json").exists())
        if done[-1]:
            assert Gallery.open(directory).entries.entry_ids.tolist() == ids
            continue
        with pytest.raises(DataError, match="make one with"):
            Gallery.open(directory)
        assert _holds_nothing_else(directory, Gallery.build(directory, np.ones((1, DIM), np.float32), ["a"]))
    assert done == sorted(done)
    assert done[0] < done[-1]


def test_readers_beside_a_writer_see_whole_states_only(tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    exec(_CHANGES, changes)  # noqa: S102 - as above
    directory, ids = tmp_path / "g", ["900001", "900002"]
    Gallery.build(directory, changes["vectors"](ids), ids, ids, index="hnsw")
    states = {1: ids}
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(directory), "0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        seen, start = set(), time.monotonic()
        while time.monotonic() < start + (2.5 if len(seen) >= 3 else 30):
            gallery = Gallery.open(directory, verify=len(seen) % 2 == 0)
            generation = gallery.manifest.generation
            while len(states) < generation:  # every change is one generation
                states[len(states) + 1] = changes["after"](states[len(states)], len(states) - 1)
            assert gallery.entries.entry_ids.tolist() == states[generation]
            probes = states[generation][:: max(1, len(gallery) // 8)]
            found = gallery.search(changes["vectors"](probes), top=1)
            assert [near[0].entry_id for near in found] == probes
            seen.add(generation)
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()
    assert len(seen) >= 3


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_first_build(tmp_path: Path, rounds: int) -> None:
    delays = random.Random(1)
    for number in range(rounds):
        directory = tmp_path / str(number)
        said = _killed(_BUILDER, str(directory), delay_s=delays.uniform(0.0, 1.5))
        if (directory / "manifest.json").exists():
            assert len(Gallery.open(directory)) == 2000
            continue
        assert "done" not in said
        with pytest.raises(DataError, match="make one with"):
            Gallery.open(directory)
        assert len(Gallery.build(directory, np.ones((1, 4), np.float32), ["a"])) == 1


def test_an_interrupted_first_build_can_be_repeated(tmp_path: Path) -> None:
    directory = tmp_path / "g"
    directory.mkdir()
    part = "embeddings-00000001-0000.npy"
    for name in (f".{part}.ab12.tmp", part, "index-00000001.faiss", ".lock"):
        (directory / name).write_bytes(b"cut")
    gallery = Gallery.build(directory, np.ones((1, 4), np.float32), ["a"])
    assert gallery.search(np.ones(4), top=1)[0][0].subject_id == "a"
    assert _holds_nothing_else(directory, gallery)


def test_a_reader_keeps_its_state_and_sees_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 8)
    vectors = np.random.default_rng(0).normal(size=(40, DIM)).astype(np.float32)
    old = Gallery.build(tmp_path / "g", vectors[:30], np.arange(30), index="hnsw")
    expected = old.search(vectors, top=5)
    new = old.add(vectors[30:], np.arange(30, 40)).remove(entry_ids=["3"]).compact()
    assert old.search(vectors, top=5) == expected  # its files are deleted, and still open
    assert old.latest().search(vectors, top=5) == new.search(vectors, top=5) != expected
