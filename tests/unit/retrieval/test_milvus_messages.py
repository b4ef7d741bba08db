"""What is asked of Milvus: ids in few questions, and how far an index is, told by a stand-in."""

import json
import logging
from typing import Any

import pytest

from aroface.errors import DataError
from retrieval.gallery import milvus_collection, milvus_source


class _Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Indexing:
    """A client whose server indexes a row in so many seconds, and stops at one."""

    def __init__(self, clock: _Clock, seconds: float, stops_at: int, rows: int = 10) -> None:
        self.clock, self.seconds, self.stops_at, self.rows = clock, seconds, stops_at, rows
        self.calls: list[str] = []

    def describe_index(self, collection: str, field: str) -> dict[str, Any]:
        done = min(int(self.clock.now / self.seconds), self.stops_at, self.rows)
        state = "Finished" if done == self.rows else "InProgress"
        pending = self.rows - done
        return {"state": state, "indexed_rows": done, "total_rows": self.rows, "pending_index_rows": pending}

    def __getattr__(self, name: str) -> Any:
        return lambda collection: self.calls.append(name)


def test_an_index_that_gets_on_is_waited_for_however_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = _Clock()
    monkeypatch.setattr(milvus_collection, "time", clock)
    client = _Indexing(clock, seconds=3500, stops_at=10)
    with caplog.at_level(logging.INFO):
        milvus_collection.wait_until_indexed(client, "faces")
    assert clock.now >= 35_000
    assert client.calls == ["flush", "release_collection", "load_collection"]
    assert "faces: 7 of 10 rows indexed, 3 wait" in caplog.text


def test_an_index_that_does_not_get_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(milvus_collection, "time", clock)
    with pytest.raises(DataError, match=r"no progress.*faces: 4 of 10 rows.*60 minutes.*index nodes run"):
        milvus_collection.wait_until_indexed(_Indexing(clock, seconds=10, stops_at=4), "faces")
    assert clock.now < 3700


@pytest.mark.parametrize(("field", "at_once"), [("entry_id", 16_384), ("subject_id", 1000)])
def test_ids_are_asked_for_in_few_questions(field: str, at_once: int) -> None:
    """Milvus gives 16,384 rows at most where a list has a limit; a subject may have many entries."""
    values = [f'{i}"é' for i in range(2 * at_once + 1)]
    asked = list(milvus_source.among(field, values))
    lists = [json.loads(where.removeprefix(f"{field} in ")) for where in asked]
    assert [len(one) for one in lists] == [at_once, at_once, 1]
    assert [value for one in lists for value in one] == values
