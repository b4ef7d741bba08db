"""`MilvusGallery`: the same interface on Milvus, for galleries that one machine cannot hold.

`uri` is a file (`faces.db`: Milvus Lite, embedded, for tests and small sets) or the address of a server or cluster
(`http://host:19530`). Scores, order and refusals are those of `Gallery`: candidates that Milvus finds are compared
again here. Durability, concurrent writers, replication and visibility are those of Milvus: a change of many rows is
sent in several messages and is not one transaction, and `consistency` is Milvus' own level.
"""

import json
import re
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aroface.contract import InputContract
from aroface.errors import ConfigError, DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery.enrolment import Part, parts_of
from retrieval.gallery.interface import FaceGallery
from retrieval.gallery.milvus_connection import connect
from retrieval.gallery.milvus_source import MilvusSource, among, pooled_source, stored_entries
from retrieval.gallery.records import Calibration, Candidate, GalleryInfo, IndexKind, Level
from retrieval.gallery.search import Request, Source, search_source
from retrieval.gallery.vectors import as_unit, check_embeddings, check_ids, lengths, listed

__all__ = ["Consistency", "MilvusGallery"]

#: When a search sees what was written: at once, within a bounded time, what this client wrote, or some time.
Consistency = Literal["Strong", "Bounded", "Session", "Eventually"]

_MAX_ID = 512  # bytes of an id
_MESSAGE_BYTES = 16 << 20  # below the 64 MiB that a server takes
_SETTINGS, _CALIBRATION = "aroface.gallery", "aroface.calibration"  # properties of the collection, as JSON
_INDEXES: dict[IndexKind, tuple[str, dict[str, int]]] = {
    "flat": ("FLAT", {}),
    "ivf": ("IVF_FLAT", {"nlist": 1024}),
    "ivf-sq8": ("IVF_SQ8", {"nlist": 1024}),
    "hnsw": ("HNSW", {"M": 32, "efConstruction": 100}),
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class MilvusGallery(FaceGallery):
    """Enrolled embeddings in a collection of Milvus; changes are seen by every client of it."""

    def __init__(self, client: Any, uri: str, collection: str, consistency: Consistency) -> None:
        self._client = client
        self._uri = uri
        self.collection = collection
        self.consistency = consistency
        described = client.describe_collection(collection)
        try:
            properties = dict(described["properties"])
            settings = json.loads(properties[_SETTINGS])
            self._index: str = settings["index"]
            self._dimension = int(settings["dimension"])
            self._model_id: str | None = settings["model_id"]
            contract = settings["contract"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Collection {collection} at {uri} was not made by aroface; name another one with `--collection`."
            ) from error
        self._contract = None if contract is None else InputContract.model_validate(contract)
        stored = json.loads(properties.get(_CALIBRATION, "[]"))
        self._calibration = tuple(Calibration.model_validate(point) for point in stored)

    @classmethod
    def open(cls, uri: str, *, collection: str = "faces", consistency: Consistency = "Strong", token: str = "") -> Self:
        """Open a collection.

        Args:
            uri: file of Milvus Lite, or address of a server.
            collection: its name.
            consistency: when searches see changes.
            token: `user:password` or key of the server.

        Raises:
            DataError: no such collection, or one of somebody else.
            ConfigError: no connection, or pymilvus is missing.
        """
        client = connect(uri, token)
        if not client.has_collection(collection):
            client.close()
            raise DataError(
                f"There is no collection {collection} at {uri}; make it with `aroface gallery build {uri} --milvus`."
            )
        client.load_collection(collection)
        return cls(client, uri, collection, consistency)

    @classmethod
    def build(
        cls,
        uri: str,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        collection: str = "faces",
        index: IndexKind = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        consistency: Consistency = "Strong",
        token: str = "",
        replace: bool = False,
    ) -> Self:
        """Make a collection of (N, D) embeddings. Arguments as `Gallery.build` and `open`.

        It is filled under another name (`_unfinished` behind it) and renamed when it is whole; one that it replaces is
        dropped just before, so that a build that fails leaves the old one.

        Raises:
            DataError: as `Gallery.build`; a collection that exists, without `replace`.
            ConfigError: an index kind that Milvus does not have under this name.
        """
        part = Part(embeddings, subject_ids, entry_ids)
        return cls._build(uri, [part], collection, index, model_id, contract, consistency, token, replace=replace)

    @classmethod
    def build_from(
        cls,
        uri: str,
        sets: Iterable[EmbeddingSet],
        *,
        collection: str = "faces",
        index: IndexKind = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        consistency: Consistency = "Strong",
        token: str = "",
        replace: bool = False,
    ) -> Self:
        """Make a collection of embedding sets that come one after the other; only one of them is in memory at a time.

        Rows that failed to enrol are left out; keys become entry ids. Other arguments and errors as `build`.
        """
        parts = (part for one in sets for part in parts_of(one))
        return cls._build(uri, parts, collection, index, model_id, contract, consistency, token, replace=replace)

    @classmethod
    def _build(
        cls,
        uri: str,
        parts: Iterable[Part],
        collection: str,
        index: IndexKind,
        model_id: str | None,
        contract: InputContract | None,
        consistency: Consistency,
        token: str,
        *,
        replace: bool,
    ) -> Self:
        if index not in _INDEXES:
            raise ConfigError(f"index {index} is not offered on Milvus; choose from {', '.join(_INDEXES)}.")
        if not _NAME.fullmatch(collection):
            raise ConfigError(f"collection {collection!r}: letters, digits and underscores only, no digit first.")
        stream = iter(parts)
        first = next(stream, None)
        if first is None or not len(first.embeddings):
            raise DataError(f"Gallery {uri}: there is no embedding to enrol; give at least one.")
        check_embeddings(first.embeddings, None)
        client = connect(uri, token)
        if client.has_collection(collection) and not replace:
            client.close()
            raise DataError(
                f"Gallery {collection} at {uri} exists already. Add to it, name another one, or replace it (--replace)."
            )
        settings = {
            "index": index,
            "dimension": first.embeddings.shape[1],
            "model_id": model_id,
            "contract": contract.model_dump(mode="json") if contract else None,
        }
        unfinished = f"{collection}_unfinished"
        client.drop_collection(unfinished)  # of a build that was killed; none is no error
        try:
            _create(client, unfinished, settings, consistency)
            made, number = cls(client, uri, unfinished, "Strong"), 0  # a part sees the ids of those before
            for part in chain([first], stream):
                numbered = np.arange(number, number + len(part.embeddings))
                made.add(part.embeddings, part.subject_ids, numbered if part.entry_ids is None else part.entry_ids)
                number += len(part.embeddings)
        except BaseException:
            client.drop_collection(unfinished)
            client.close()
            raise
        client.drop_collection(collection)
        client.rename_collection(unfinished, collection)
        client.load_collection(collection)
        return cls(client, uri, collection, consistency)

    def add(
        self,
        embeddings: NDArray[np.floating[Any]],
        subject_ids: ArrayLike,
        entry_ids: ArrayLike | None = None,
        *,
        upsert: bool = False,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> Self:
        """See `FaceGallery.add`."""
        self.check_model(model_id, contract)
        check_embeddings(embeddings, self._dimension)
        numbers = time.time_ns() + np.arange(len(embeddings))  # ascending without asking the other writers
        names = np.asarray(self._free_names(len(embeddings)) if entry_ids is None else entry_ids).astype(np.str_)
        taken = [] if upsert else self._stored("entry_id", names.ravel().tolist())
        subjects, names = _checked_ids(subject_ids, names, len(embeddings), taken)
        norms = lengths(embeddings)
        step = max(1, _MESSAGE_BYTES // (4 * self._dimension))
        send = self._client.upsert if upsert else self._client.insert
        for start in range(0, len(names), step):
            part = slice(start, start + step)
            columns = zip(
                names[part].tolist(),
                subjects[part].tolist(),
                norms[part].tolist(),
                numbers[part].tolist(),
                as_unit(embeddings[part]),
                strict=True,
            )
            fields = ("entry_id", "subject_id", "norm", "number", "embedding")
            send(self.collection, [dict(zip(fields, values, strict=True)) for values in columns])
        return self

    def remove(self, *, entry_ids: Collection[str] = (), subject_ids: Collection[str] = ()) -> Self:
        """See `FaceGallery.remove`."""
        wanted = {
            "entry_id": sorted({str(value) for value in entry_ids}),
            "subject_id": sorted({str(value) for value in subject_ids}),
        }
        for field, values in wanted.items():
            missing = sorted(set(values) - set(self._stored(field, values)))
            if missing:
                what = field.removesuffix("_id")
                raise DataError(f"Gallery {self.info.name} has no {what} {listed(missing)}; nothing is removed.")
        for field, values in wanted.items():
            for where in among(field, values):
                self._client.delete(self.collection, filter=where)
        return self

    def search_where(
        self,
        probes: NDArray[np.floating[Any]],
        where: str,
        *,
        top: int,
        level: Level = "entry",
        threshold: float | None = None,
        model_id: str | None = None,
        contract: InputContract | None = None,
    ) -> list[list[Candidate]]:
        """As `search`, among the entries that match a filter of Milvus, such as `subject_id like "dept-7/%"`.

        The fields are entry_id, subject_id, norm and number. A filter that matches nobody gives empty lists.

        Raises:
            DataError: as `search`.
            ConfigError: Milvus does not understand the filter, or the level is `pooled`.
        """
        if level == "pooled":
            raise ConfigError("A filter chooses entries; the level pooled has none. Search entries or subjects.")
        request = Request(top, level == "subject", threshold)
        rows = self._unit_probes(probes, model_id, contract)
        source = self._milvus_source(where, self._count_matches(where))
        return search_source(source, rows, request) if source.count else [[] for _ in rows]

    def has_subjects(self, subject_ids: ArrayLike) -> NDArray[np.bool_]:
        """See `FaceGallery`."""
        wanted = np.asarray(subject_ids).astype(np.str_)
        return np.isin(wanted, self._stored("subject_id", np.unique(wanted).tolist()))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @property
    def info(self) -> GalleryInfo:
        """What the gallery holds. The recall of an approximate index is not measured."""
        return GalleryInfo(
            name=f"{self.collection} at {self._uri}",
            backend="milvus",
            count=len(self),
            num_subjects=None,
            dimension=self._dimension,
            index=self._index,
            model_id=self._model_id,
            contract=self._contract,
            recall=None,
            calibration=self._calibration,
        )

    def __len__(self) -> int:
        """Enrolled entries."""
        return self._count("")

    def _count_matches(self, where: str) -> int:
        from pymilvus.exceptions import MilvusException

        try:
            return self._count(where)
        except MilvusException as error:
            reason = str(error.message).partition("\n")[0]
            raise ConfigError(
                f"Milvus refuses the filter {where!r}: {reason}. The fields are entry_id, subject_id, norm and "
                """number; an example: subject_id like "dept-7/%"."""
            ) from error

    def _count(self, where: str) -> int:
        answer = self._query(where, ["count(*)"])
        return int(answer[0]["count(*)"])

    def _query(self, where: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        answer = self._client.query(
            self.collection, filter=where, output_fields=list(fields), consistency_level=self.consistency
        )
        return list(answer)

    def _stored(self, field: str, values: Sequence[str]) -> list[str]:
        """Those of the values that some entry has."""
        return sorted({str(row[field]) for where in among(field, values) for row in self._query(where, [field])})

    def _free_names(self, count: int) -> list[str]:
        start = len(self)
        while True:
            names = [str(number) for number in range(start, start + count)]
            taken = self._stored("entry_id", names)
            if not taken:
                return names
            start = max(map(int, taken)) + 1

    def _source(self, level: Level) -> Source:
        if level == "pooled":
            return pooled_source(stored_entries(self._client, self.collection, self.consistency), self._dimension)
        return self._milvus_source("", len(self))

    def _milvus_source(self, where: str, count: int) -> MilvusSource:
        return MilvusSource(
            self._client,
            self.collection,
            self._dimension,
            count,
            is_exact=self._index == "flat",
            where=where,
            consistency=self.consistency,
        )

    def _with_calibration(self, points: tuple[Calibration, ...]) -> Self:
        text = json.dumps([point.model_dump(mode="json") for point in points])
        self._client.alter_collection_properties(self.collection, properties={_CALIBRATION: text})
        self._calibration = points
        return self


def _checked_ids(
    subject_ids: ArrayLike, entry_ids: ArrayLike, count: int, taken: Collection[str]
) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """As `check_ids`; what is too long for Milvus is refused, too."""
    subjects, names = check_ids(subject_ids, entry_ids, count, taken)
    too_long = [name for name in (*names.tolist(), *subjects.tolist()) if len(name.encode()) > _MAX_ID]
    if too_long:
        raise DataError(f"Ids {listed(too_long)} are longer than {_MAX_ID} bytes, which Milvus does not take.")
    return subjects, names


def _create(client: Any, collection: str, settings: dict[str, Any], consistency: Consistency) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("entry_id", DataType.VARCHAR, is_primary=True, max_length=_MAX_ID)
    schema.add_field("subject_id", DataType.VARCHAR, max_length=_MAX_ID)
    schema.add_field("norm", DataType.FLOAT)
    schema.add_field("number", DataType.INT64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=settings["dimension"])
    index_type, params = _INDEXES[settings["index"]]
    indexes = client.prepare_index_params()
    indexes.add_index("embedding", index_type=index_type, metric_type="IP", params=params)
    client.create_collection(
        collection,
        schema=schema,
        index_params=indexes,
        consistency_level=consistency,
        properties={_SETTINGS: json.dumps(settings)},
    )
