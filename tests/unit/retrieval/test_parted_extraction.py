import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from aroface.errors import DataError
from retrieval.embedding_files import INDEX_NAME, read_embeddings, write_embeddings
from retrieval.embeddings import EmbeddingSet
from retrieval.parted_extraction import PartedExtraction, extraction_progress, part_bounds

ROWS = 23
KEYS = [f"person{row // 4}/{row}.jpg" for row in range(ROWS)]
BOUNDS = part_bounds(ROWS, images_per_part=5)


def rows_of(start: int, stop: int) -> EmbeddingSet:
    values = np.random.default_rng(3).normal(size=(ROWS, 6)).astype(np.float32)[start:stop]
    fte = np.arange(start, stop) == 7
    values[fte] = 0
    return EmbeddingSet(
        values,
        np.array([key.partition("/")[0] for key in KEYS[start:stop]]),
        keys=np.array(KEYS[start:stop]),
        fte=fte,
        metadata={"model_id": "test"},
    )


def extraction(folder: Path, source: str = "s1", **changes: object) -> PartedExtraction:
    description = {"model_id": "m", "flip": "sum", **changes}
    return PartedExtraction(folder, description=description, source=source, keys=KEYS, bounds=BOUNDS)


def assert_whole(folder: Path) -> None:
    found, expected = read_embeddings(folder), rows_of(0, ROWS)
    np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    for column in ("subject_ids", "keys", "fte"):
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column))
    assert found.metadata == expected.metadata
    assert sorted(path.name for path in (folder / "parts").iterdir()) == [f"part-0000{i}.npz" for i in range(5)]


def test_parts_cover_every_row_once_and_never_span_two_groups() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        count, most = int(generator.integers(1, 40)), int(generator.integers(1, 9))
        groups = np.sort(generator.integers(0, 5, count)).tolist()
        bounds = part_bounds(count, images_per_part=most, groups=groups)
        assert [row for start, stop in bounds for row in range(start, stop)] == list(range(count))
        assert all(0 < stop - start <= most and len(set(groups[start:stop])) == 1 for start, stop in bounds)
        assert len(bounds) == sum(-(-groups.count(group) // most) for group in set(groups))
    assert part_bounds(0, images_per_part=3) == []


def test_one_process_writes_all_parts_and_a_second_run_writes_none(tmp_path: Path) -> None:
    assert extraction(tmp_path / "out").work(rows_of) == 5
    assert_whole(tmp_path / "out")

    def never(start: int, stop: int) -> EmbeddingSet:
        raise AssertionError("nothing is left to do")

    again = extraction(tmp_path / "out")
    assert again.rows_done == ROWS
    assert again.work(never) == 0


def _slow_rows(start: int, stop: int) -> EmbeddingSet:
    time.sleep(0.05)
    return rows_of(start, stop)


def _worker(folder: Path, made: "multiprocessing.Queue[int]") -> None:
    made.put(extraction(folder).work(_slow_rows))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_parts_and_make_each_once(tmp_path: Path, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    workers = [context.Process(target=_worker, args=(tmp_path / "out", made)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert sum(made.get(timeout=5) for _ in workers) == 5
    assert_whole(tmp_path / "out")


def test_whoever_is_free_takes_the_next_part_so_that_a_slow_one_delays_nobody(tmp_path: Path) -> None:
    others_done, slow_began, fast_rows = threading.Event(), threading.Event(), []

    def slow(start: int, stop: int) -> EmbeddingSet:
        slow_began.set()
        assert others_done.wait(60)
        return rows_of(start, stop)

    def fast(start: int, stop: int) -> EmbeddingSet:
        fast_rows.append(start)
        if len(fast_rows) == 4:
            others_done.set()
        return rows_of(start, stop)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(extraction(tmp_path / "out").work, slow)
        assert slow_began.wait(60)
        two = pool.submit(extraction(tmp_path / "out").work, fast)
        assert (one.result(60), two.result(60)) == (1, 4)
    assert_whole(tmp_path / "out")


def test_progress_counts_the_rows_of_all_processes(tmp_path: Path) -> None:
    folder, seen = tmp_path / "out", []
    assert extraction_progress(folder) is None

    def embed(start: int, stop: int) -> EmbeddingSet:
        seen.append(extraction_progress(folder))
        return rows_of(start, stop)

    extraction(folder).work(embed)
    assert seen == [(start, ROWS) for start, _ in BOUNDS]
    assert extraction_progress(folder) == (ROWS, ROWS)


def _hangs_in_the_third_part(folder: Path) -> None:
    def embed(start: int, stop: int) -> EmbeddingSet:
        if start == BOUNDS[2][0]:
            (folder / "reached").touch()
            time.sleep(600)
        return rows_of(start, stop)

    extraction(folder).work(embed)


def test_the_part_of_a_killed_process_is_taken_by_another_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    worker = multiprocessing.get_context("spawn").Process(target=_hangs_in_the_third_part, args=(folder,))
    worker.start()
    for _ in range(600):
        if (folder / "reached").exists():
            break
        time.sleep(0.05)
    assert worker.pid is not None
    (folder / "reached").unlink()
    with pytest.raises(DataError, match="has not finished there"):
        read_embeddings(folder)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    (folder / "parts" / ".part-00002.npz.x.tmp").write_bytes(b"half of it")
    assert extraction(folder).work(rows_of) == 3
    assert_whole(folder)


def test_another_extraction_and_a_folder_of_other_files_are_refused(tmp_path: Path) -> None:
    extraction(tmp_path / "out")
    with pytest.raises(DataError, match='another extraction: flip is "sum" there and "none" here'):
        extraction(tmp_path / "out", flip="none")
    with pytest.raises(DataError, match="images_sha256"):
        PartedExtraction(
            tmp_path / "out",
            description={"model_id": "m", "flip": "sum"},
            source="s1",
            keys=KEYS[::-1],
            bounds=BOUNDS,
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds thesis\.tex and no job\.json"):
        extraction(tmp_path / "mine")
    with pytest.raises(DataError, match="is a file"):
        extraction(tmp_path / "mine" / "thesis.tex")


def test_parts_of_images_that_were_replaced_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "out"
    extraction(folder).work(rows_of)
    with pytest.raises(DataError, match=r"were replaced since\. Remove that folder"):
        extraction(folder, source="s2")
    assert extraction(folder).rows_done == ROWS
    assert not caplog.text
    job = json.loads((folder / "job.json").read_text())
    del job["source_sha256"]  # as an earlier version wrote it
    (folder / "job.json").write_text(json.dumps(job))
    assert extraction(folder).rows_done == ROWS
    assert "begun by an earlier version" in caplog.text
    assert "remove that folder or name another one" in caplog.text
    with pytest.raises(DataError, match="another extraction: flip"):
        extraction(folder, flip="none")


def test_a_damaged_part_is_named_and_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    extraction(folder).work(rows_of)
    part = folder / "parts" / "part-00003.npz"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00003\.npz is not the file that the index lists"):
        read_embeddings(folder)
    part.unlink()
    with pytest.raises(DataError, match=r"part-00003\.npz cannot be read: No such file"):
        read_embeddings(folder)
    (folder / INDEX_NAME).unlink()
    assert extraction(folder).work(rows_of) == 1
    assert_whole(folder)


def test_an_index_that_contradicts_its_parts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    extraction(folder).work(rows_of)
    index = json.loads((folder / INDEX_NAME).read_text())
    for change, message in (
        ({"format_version": 2}, "format version 2"),
        ({"rows": ROWS + 1}, f"says {ROWS + 1} rows"),
        ({"embedding_dim": 7}, r"the index says \(5, 7\)"),
        ({"parts": "all"}, "is no index"),
    ):
        (folder / INDEX_NAME).write_text(json.dumps({**index, **change}))
        with pytest.raises(DataError, match=message):
            read_embeddings(folder)


def test_parts_of_two_dimensions_do_not_become_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = extraction(folder)
    write_embeddings(folder / "parts" / "part-00001.npz", EmbeddingSet(np.ones((5, 3), np.float32), np.arange(5)))
    with pytest.raises(DataError, match="differ in dimension"):
        first.work(rows_of)
