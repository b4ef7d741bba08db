"""`MilvusGallery`: the same interface on Milvus, for galleries that one machine cannot hold.

`uri` is a file (`faces.db`: Milvus Lite, embedded, for tests and small sets) or the address of a server or cluster
(`http://host:19530`). Scores, order and refusals are those of `Gallery`: candidates that Milvus finds are compared
again here. Durability, concurrent writers, replication and visibility are those of Milvus: a change of many rows is
sent in several messages and is not one transaction, and `consistency` is Milvus' own level.
"""

import copy
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
from retrieval.gallery.milvus_collection import (
    MAX_ID,
    Settings,
    create_collection,
    keep_calibration,
    keep_settings,
    kept,
    make_index,
    wait_until_indexed,
)
from retrieval.gallery.milvus_connection import connect, connect_to
from retrieval.gallery.milvus_kinds import Effort, check_kind, efforts_of, index_of
from retrieval.gallery.milvus_source import MilvusSource, among, pooled_source, stored_entries
from retrieval.gallery.recall import RECALL_TOP, IndexWish, Sample, cheapest, recall_of, sample_of
from retrieval.gallery.records import Calibration, Candidate, GalleryInfo, IndexKind, Level, Recall
from retrieval.gallery.search import Request, Source, search_source
from retrieval.gallery.vectors import as_unit, check_embeddings, check_ids, lengths, listed

__all__ = ["Consistency", "MilvusGallery"]

#: When a search sees what was written: at once, within a bounded time, what this client wrote, or some time.
Consistency = Literal["Strong", "Bounded", "Session", "Eventually"]

_MESSAGE_BYTES = 16 << 20  # below the 64 MiB that a server takes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class MilvusGallery(FaceGallery):
    """Enrolled embeddings in a collection of Milvus; changes are seen by every client of it."""

    def __init__(self, client: Any, uri: str, collection: str, consistency: Consistency) -> None:
        self._client = client
        self._uri = uri
        self.collection = collection
        self.consistency = consistency
        self._settings, self._calibration = kept(client, collection, uri)
        self._dimension = self._settings.dimension

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
        client = connect_to(uri, token, collection)
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
        index: IndexKind | IndexWish = "flat",
        model_id: str | None = None,
        contract: InputContract | None = None,
        consistency: Consistency = "Strong",
        token: str = "",
        replace: bool = False,
    ) -> Self:
        """Make a collection of (N, D) embeddings. Arguments as `Gallery.build` and `open`.

        It is filled under another name (`_unfinished` behind it) and renamed when it is whole; one that it replaces is
        dropped just before, so that a build that fails leaves the old one. The recall of an approximate index is
        measured with the given probes, or with probes near entries of the first part.

        Raises:
            DataError: as `Gallery.build`; a collection that exists, without `replace`.
            ConfigError: an index kind that the server does not have.
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
        index: IndexKind | IndexWish = "flat",
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
        index: IndexKind | IndexWish,
        model_id: str | None,
        contract: InputContract | None,
        consistency: Consistency,
        token: str,
        *,
        replace: bool,
    ) -> Self:
        wish = index if isinstance(index, IndexWish) else IndexWish(index)
        if not _NAME.fullmatch(collection):
            raise ConfigError(f"collection {collection!r}: letters, digits and underscores only, no digit first.")
        stream = iter(parts)
        first = next(stream, None)
        if first is None or not len(first.embeddings):
            raise DataError(f"Gallery {uri}: there is no embedding to enrol; give at least one.")
        check_embeddings(first.embeddings, None)
        client = connect(uri, token)
        try:
            check_kind(wish.kind, uri, str(client.get_server_version()))
        except ConfigError:
            client.close()
            raise
        if client.has_collection(collection) and not replace:
            client.close()
            raise DataError(
                f"Gallery {collection} at {uri} exists already. Add to it, name another one, or replace it (--replace)."
            )
        dimension = first.embeddings.shape[1]
        _, params = index_of(wish.kind, dimension)
        settings = Settings(index=wish.kind, dimension=dimension, params=params, model_id=model_id, contract=contract)
        unfinished = f"{collection}_unfinished"
        client.drop_collection(unfinished)  # of a build that was killed; none is no error
        try:
            create_collection(client, unfinished, settings, consistency)
            made = cls(client, uri, unfinished, "Strong")  # a part sees the ids of those before
            made._fill(first, stream, wish)
        except BaseException:
            client.drop_collection(unfinished)
            client.close()
            raise
        client.drop_collection(collection)
        client.rename_collection(unfinished, collection)
        client.load_collection(collection)
        return cls(client, uri, collection, consistency)

    def _fill(self, first: Part, others: Iterable[Part], wish: IndexWish) -> None:
        """Enrol all parts; keep the recall of an approximate index, and the effort that it takes."""
        sample, number = None, 0
        if wish.kind != "flat":
            rows, taken = len(first.embeddings), lambda chosen: as_unit(first.embeddings[chosen])
            sample = sample_of(wish, rows, self._dimension, taken, among="of the first part ")
        for part in chain([first], others):
            numbered = np.arange(number, number + len(part.embeddings))
            self.add(part.embeddings, part.subject_ids, numbered if part.entry_ids is None else part.entry_ids)
            number += len(part.embeddings)
            if sample is not None:
                sample.see_rows(part.embeddings)
        if sample is not None:
            self._settings = self._measured(wish, sample, number)
            keep_settings(self._client, self.collection, self._settings)

    def _measured(self, wish: IndexWish, sample: Sample, count: int) -> Settings:
        """The settings with the cheapest effort that reaches the wanted recall, and the recall there."""
        settings = self._settings.model_copy(update={"params": index_of(wish.kind, self._dimension, count)[1]})
        if settings != self._settings:  # less than a segment holds
            make_index(self._client, self.collection, settings)
        wait_until_indexed(self._client, self.collection)
        request = Request(top=min(RECALL_TOP, count))

        def measure(visits: int, rescored: int) -> Recall:
            source = self._milvus_source("", count, Effort(wish.kind, visits, rescored))
            return recall_of(search_source(source, sample.probes, request), sample)

        visits, rescored, recall = cheapest(wish, efforts_of(wish.kind, settings.params), measure)
        return settings.model_copy(update={"effort": visits, "rescored": rescored, "recall": recall})

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
        _check_ids_for_milvus(np.append(names, np.asarray(subject_ids).astype(np.str_)))
        taken = [] if upsert else self._stored("entry_id", names.ravel().tolist())
        subjects, names = check_ids(subject_ids, names, len(embeddings), taken)
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
                raise DataError(f"Gallery {self._info(0).name} has no {what} {listed(missing)}; nothing is removed.")
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
        matches = self._count_matches(where)
        count = len(self)
        rows = self._unit_probes(probes, model_id, contract, count)
        source = self._milvus_source(where, matches, self._settings.search.among(matches, count))
        return search_source(source, rows, request) if matches else [[] for _ in rows]

    def calibrate(self, probes: EmbeddingSet, fpirs: Sequence[float], *, level: Level = "entry") -> Self:
        """See `FaceGallery`; among everything that was written before, whatever the consistency."""
        points = super(MilvusGallery, self._strong()).calibrate(probes, fpirs, level=level).info.calibration
        self._calibration = points
        return self

    def _strong(self) -> Self:
        """The same collection, searched with everything that was written before."""
        strong = copy.copy(self)
        strong.consistency = "Strong"
        return strong

    def has_subjects(self, subject_ids: ArrayLike) -> NDArray[np.bool_]:
        """See `FaceGallery`."""
        wanted = np.asarray(subject_ids).astype(np.str_)
        return np.isin(wanted, self._stored("subject_id", np.unique(wanted).tolist()))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _info(self, count: int) -> GalleryInfo:
        """See `FaceGallery`."""
        settings = self._settings
        return GalleryInfo(
            name=f"{self.collection} at {self._uri}",
            backend="milvus",
            count=count,
            num_subjects=None,
            dimension=self._dimension,
            index=settings.index,
            model_id=settings.model_id,
            contract=settings.contract,
            recall=settings.recall,
            how=settings.how,
            calibration=self._calibration,
        )

    def __len__(self) -> int:
        """Enrolled entries. A gallery that seems to be empty, because of its consistency, is asked again."""
        return self._count("") or (0 if self.consistency == "Strong" else self._strong()._count(""))

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

    def _source(self, level: Level, count: int) -> Source:
        if level == "pooled":
            return pooled_source(stored_entries(self._client, self.collection, self.consistency), self._dimension)
        return self._milvus_source("", count, self._settings.search)

    def _milvus_source(self, where: str, count: int, effort: Effort) -> MilvusSource:
        return MilvusSource(
            *(self._client, self.collection, self._dimension, count),
            effort=effort,
            where=where,
            consistency=self.consistency,
        )

    def _with_calibration(self, points: tuple[Calibration, ...]) -> Self:
        keep_calibration(self._client, self.collection, points)
        self._calibration = points
        return self


def _check_ids_for_milvus(ids: NDArray[np.str_]) -> None:
    """Refuse ids that are no Unicode, as names of files may be, and those that are too long."""
    try:
        too_long = [name for name in ids.tolist() if len(name.encode()) > MAX_ID]
    except UnicodeEncodeError as error:
        raise DataError(
            f"The id {error.object!r} is no Unicode, which Milvus needs. Rename the file and embed again, or keep the "
            "gallery in a directory."
        ) from error
    if too_long:
        raise DataError(f"Ids {listed(too_long)} are longer than {MAX_ID} bytes, which Milvus does not take.")
