"""What FAE-1 is run on: references, probes, and what is compared, built from the lists of any protocol."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.types import FaceSet
from retrieval.protocols.ijb import IjbPairs, TemplateList
from retrieval.protocols.lfw_lq import split_faces
from retrieval.protocols.lfw_pairs import Pairs
from retrieval.protocols.scface import ScfaceFiles
from retrieval.protocols.tinyface import TinyFaceLists, tinyface_keys
from retrieval.templates import Pooling, TemplateSamples

__all__ = ["FaeSet", "of_faces", "of_pairs", "of_scface", "of_template_lists", "of_template_pairs", "of_templates"]
__all__ += ["of_tinyface"]


@dataclass(frozen=True)
class FaeSet:
    """References stay aligned (unless both sides are asked for), probes do not."""

    name: str
    references: TemplateSamples
    probes: TemplateSamples
    pooling: Pooling = field(default_factory=Pooling)
    galleries: tuple[NDArray[np.int64], ...] = ()  #: templates of the references, each searched by all probes
    pairs: Pairs | None = None  #: (reference, probe, same); None: every probe with every reference
    files: tuple[Path, ...] = ()

    def with_probes(self, most: int | None) -> "FaeSet":
        """The same set with at most so many probes, chosen by the hash of their first key: alike for every model."""
        count = len(self.probes.template_ids)
        if most is None or most >= count:
            return self
        keys = np.full(count, "", self.probes.keys.dtype)
        keys[self.probes.template[::-1]] = self.probes.keys[::-1]
        hashes = [hashlib.sha256(str(key).encode("utf-8", "surrogateescape")).digest() for key in keys]
        order = sorted(range(count), key=hashes.__getitem__)
        chosen = np.array(sorted(order[:most]), np.int64)
        probes = self.probes.take(chosen)
        if self.pairs is None:
            return replace(self, probes=probes)
        place = np.full(count, -1)
        place[chosen] = np.arange(most)
        first, second, same = self.pairs
        kept = place[second] >= 0
        used, first = np.unique(first[kept], return_inverse=True)
        pairs = (first.astype(np.int64), place[second[kept]], same[kept])
        return replace(self, references=self.references.take(used.astype(np.int64)), probes=probes, pairs=pairs)


def _singles(keys: Sequence[str], subjects: Sequence[Any]) -> TemplateSamples:
    """Every image a template of its own."""
    rows = np.arange(len(keys))
    return TemplateSamples(np.array(keys), rows, rows, np.array(keys), np.array(subjects))


def of_faces(faces: FaceSet, *, name: str = "faces") -> FaeSet:
    """Search: the first image of each identity by name is enrolled, every other one a probe.

    Raises:
        DataError: nobody to search for.
    """
    parts = (
        _singles([faces.keys[row] for row in rows], [faces.identities[row] for row in rows])
        for rows in split_faces(faces)
    )
    references, probes = parts
    return FaeSet(name, references, probes, galleries=(np.arange(len(references.template_ids)),))


def of_pairs(
    name: str, keys: Sequence[str], identities: Sequence[str], pairs: Pairs, *, files: Sequence[Path]
) -> FaeSet:
    """Listed pairs of images: the first side is the reference, the second the probe."""
    sides, places = zip(*(np.unique(side, return_inverse=True) for side in pairs[:2]), strict=True)
    references, probes = (_singles([keys[r] for r in rows], [identities[r] for r in rows]) for rows in sides)
    return FaeSet(name, references, probes, pairs=(*places, pairs[2]), files=tuple(files))


def of_templates(
    name: str,
    samples: TemplateSamples,
    galleries: Sequence[Sequence[int] | NDArray[np.int64]],
    probes: Sequence[int] | NDArray[np.int64],
    *,
    pooling: Pooling,
    files: Sequence[Path],
) -> FaeSet:
    """Search of one or two galleries by templates; `galleries` and `probes` hold templates of `samples`."""
    rows = np.concatenate([np.asarray(gallery, np.int64) for gallery in galleries])
    edges = np.cumsum([len(gallery) for gallery in galleries])[:-1]
    parts = tuple(np.split(np.arange(len(rows)), edges))
    references, searched = samples.take(rows), samples.take(np.asarray(probes, np.int64))
    return FaeSet(name, references, searched, pooling, parts, files=tuple(files))


def of_template_pairs(
    name: str, samples: TemplateSamples, pairs: IjbPairs, subjects: NDArray[np.int64], *, pooling: Pooling
) -> FaeSet:
    """Listed pairs of templates, such as IJB-C 1:1."""
    named = replace(samples, subject_ids=subjects)
    (left, first), (right, second) = (np.unique(side, return_inverse=True) for side in (pairs.first, pairs.second))
    references, probes = named.take(left.astype(np.int64)), named.take(right.astype(np.int64))
    places = first.astype(np.int64), second.astype(np.int64)
    return FaeSet(name, references, probes, pooling, pairs=(*places, pairs.same))


def of_template_lists(
    name: str, samples: TemplateSamples, lists: Sequence[TemplateList], *, pooling: Pooling, files: Sequence[Path]
) -> FaeSet:
    """Search with lists of template ids: galleries first, probes last, such as IJB-C 1:N."""
    place = {template: row for row, template in enumerate(samples.template_ids.tolist())}
    *galleries, probes = ([place[t] for t in listed.template_ids.tolist()] for listed in lists)
    return of_templates(name, samples, galleries, probes, pooling=pooling, files=files)


def of_scface(files: ScfaceFiles) -> FaeSet:
    """Mugshots against surveillance images of all three distances."""
    gallery, probes = files.gallery, [row for rows in files.probes.values() for row in rows]
    references, searched = (_singles([key for key, _ in part], [s for _, s in part]) for part in (gallery, probes))
    return FaeSet("scface", references, searched, galleries=(np.arange(len(gallery)),))


def of_tinyface(lists: TinyFaceLists, names: Sequence[str]) -> FaeSet:
    """Probes among mated images and distractors."""
    probes, matches, others = tinyface_keys(lists, names)
    subjects = np.concatenate([lists.match_ids, -1 - np.arange(len(others))])
    references = _singles([*matches, *others], subjects.tolist())
    searched = _singles(probes, lists.probe_ids.tolist())
    return FaeSet("tinyface", references, searched, galleries=(np.arange(len(subjects)),), files=lists.files)
