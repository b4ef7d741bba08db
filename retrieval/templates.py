"""Samples to templates: sums that grow as the frames come, so that memory is per template and not per frame.

The order is that of the IJB evaluations: per sample keep the norm (N1) or not (N0), weight by the detector score (D1)
or not (D0); a media vector is the mean of its samples; a template is the sum of its media vectors, scaled to length 1.
Whether the mirror image was added (F1, F0) is decided when samples are embedded.

Legend: N samples, T templates, D embedding dimension.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import ConfigError, DataError
from retrieval.embeddings import EmbeddingSet
from retrieval.probabilistic import PrecisionSums, required_variances

__all__ = ["Pooling", "TemplateSamples", "TemplateSums", "pool_templates"]

_CODE = re.compile(r"(N[01]|Q)D([01])", re.IGNORECASE)
_PRECISION_CODE = "PFE"


@dataclass(frozen=True)
class Pooling:
    """How samples are fused."""

    keep_norm: bool = True  #: N1: a sample weighs as much as its norm, which grows with its quality; N0: all alike
    detector: bool = False  #: D1: times the detector score
    media: bool = True  #: a mean per media before the sum; False: one flat mean over all samples of a template
    by_quality: bool = False  #: Q: a sample weighs as much as its quality, and its norm counts no more
    precision: bool = False  #: PFE: every dimension weighted by how sure each sample is, variances fused too; flat

    @classmethod
    def parse(cls, code: str, *, media: bool = True) -> "Pooling":
        """From `N1D0`, `QD0` or `PFE`, in the sense of this module.

        Raises:
            ConfigError: anything else.
        """
        if code.strip().upper() == _PRECISION_CODE:
            return cls(keep_norm=False, media=False, precision=True)
        found = _CODE.fullmatch(code.strip())
        if found is None:
            raise ConfigError(
                f"Pooling {code!r} is unknown; write N0 or N1 (norm) or Q (quality), then D0 or D1 (detector score); "
                "or PFE (precision)."
            )
        weight = found[1].upper()
        return cls(keep_norm=weight == "N1", detector=found[2] == "1", media=media, by_quality=weight == "Q")

    def __str__(self) -> str:
        if self.precision:
            return _PRECISION_CODE
        weight = "Q" if self.by_quality else f"N{int(self.keep_norm)}"
        return f"{weight}D{int(self.detector)}" + ("" if self.media else ", flat")


@dataclass(frozen=True)
class TemplateSamples:
    """Which samples make up which template. A template without samples is a failure to enrol."""

    keys: NDArray[Any]  #: (N,) names of images; one image may stand in several rows
    template: NDArray[np.int64]  #: (N,) index into the templates
    media: NDArray[Any]  #: (N,) stills and videos; an id counts within its template only
    template_ids: NDArray[Any]  #: (T,) distinct
    subject_ids: NDArray[Any]  #: (T,)
    det_scores: NDArray[np.float32] | None = None  #: (N,); None: those of the embeddings, if any
    landmarks: NDArray[np.float32] | None = None  #: (N, 10) x and y of five points, pixels of the image

    def stream_order(self) -> NDArray[np.int64]:
        """Rows sorted by template, then media: the order in which `TemplateSums` takes them."""
        codes = np.unique(self.media, return_inverse=True)[1]
        return np.lexsort((codes, self.template))

    def take(self, templates: NDArray[np.int64]) -> "TemplateSamples":
        """Only the given templates, in that order."""
        new = np.full(len(self.template_ids), -1)
        new[templates] = np.arange(len(templates))
        rows = np.flatnonzero(new[self.template] >= 0)
        return TemplateSamples(
            self.keys[rows],
            new[self.template[rows]],
            self.media[rows],
            self.template_ids[templates],
            self.subject_ids[templates],
            None if self.det_scores is None else self.det_scores[rows],
            None if self.landmarks is None else self.landmarks[rows],
        )


class TemplateSums:
    """One float64 sum per template, and one open media.

    Args:
        num_templates: T.
        dim: D.
        pooling: how samples are fused.
    """

    def __init__(self, num_templates: int, dim: int, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sums = np.zeros((num_templates, dim), np.float64)
        self.used = np.zeros(num_templates, np.int64)  #: (T,) samples that count
        self._open: tuple[int, Any, NDArray[np.float64], int] | None = None

    def add(
        self,
        template: NDArray[np.int64],
        media: NDArray[Any],
        embeddings: NDArray[np.float32],
        *,
        usable: NDArray[np.bool_] | None = None,
        det_scores: NDArray[np.float32] | None = None,
        quality: NDArray[Any] | None = None,
    ) -> None:
        """Add samples; those of one media of one template must come one after the other, over all calls.

        Args:
            template: (N,) index of the template.
            media: (N,) id of the media.
            embeddings: (N, D) un-normalised.
            usable: (N,) False for failures to enrol, which do not count; None: all but zero vectors.
            det_scores: (N,), for D1.
            quality: (N,) weights in place of the norm, for a model of image quality.

        Raises:
            ConfigError: D1 without detector scores.
        """
        values = embeddings.astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        keep = norms > 0 if usable is None else usable & (norms > 0)
        if not self._pooling.keep_norm or quality is not None:
            values /= np.maximum(norms, 1e-30)[:, None]
        if quality is not None:
            values *= np.asarray(quality, np.float64)[:, None]
        if self._pooling.detector:
            if det_scores is None:
                raise ConfigError("D1 weights samples by the detector score, and there are none; choose D0.")
            values *= det_scores.astype(np.float64)[:, None]
        template, media, values = template[keep], media[keep], values[keep]
        self.used += np.bincount(template, minlength=len(self.used))
        if not self._pooling.media:
            _add_groups(self._sums, template, values)
            return
        self._add_media(template, media, values)

    def _add_media(self, template: NDArray[np.int64], media: NDArray[Any], values: NDArray[np.float64]) -> None:
        if not len(template):
            return
        is_first = np.append(True, (template[1:] != template[:-1]) | (media[1:] != media[:-1]))
        starts = np.flatnonzero(is_first)
        sums = np.add.reduceat(values, starts, axis=0)
        counts = np.diff(np.append(starts, len(template)))
        if self._open is not None:
            owner, name, partial, count = self._open
            if owner == template[0] and name == media[0]:
                sums[0] += partial
                counts[0] += count
            else:
                self._sums[owner] += partial / count
        last = starts[-1]
        self._open = int(template[last]), media[last], sums[-1].copy(), int(counts[-1])
        _add_groups(self._sums, template[starts[:-1]], sums[:-1] / counts[:-1, None])

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, D) templates of length 1, and (T,) which are enrolled; the others are zero."""
        if self._open is not None:
            owner, _, partial, count = self._open
            self._sums[owner] += partial / count
            self._open = None
        lengths = np.linalg.norm(self._sums, axis=1)
        enrolled = lengths > 0
        features = np.zeros_like(self._sums)
        np.divide(self._sums, lengths[:, None], out=features, where=enrolled[:, None])
        return features.astype(np.float32), enrolled


def _add_groups(sums: NDArray[np.float64], owner: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """sums[owner[i]] += values[i], summed first within runs of one owner."""
    if not len(owner):
        return
    starts = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    np.add.at(sums, owner[starts], np.add.reduceat(values, starts, axis=0))


def pool_templates(
    samples: TemplateSamples,
    chunks: Iterable[tuple[NDArray[np.int64], EmbeddingSet]],
    pooling: Pooling,
    *,
    name: str = "templates",
) -> EmbeddingSet:
    """Fuse embedded samples into templates.

    Args:
        samples: what belongs together.
        chunks: (rows of `samples`, their embeddings), all rows in the order of `samples.stream_order()`.
        pooling: how.
        name: what messages call the result.

    Returns:
        (T, D) templates with `template_ids`, `subject_ids`, `fte`, as `qualities` the mean quality of the samples, and
        `variances` where samples were fused by precision.

    Raises:
        DataError: no sample at all is usable; or there are no variances, or negative qualities, to weight them by.
        ConfigError: D1 without detector scores.
    """
    count = len(samples.template_ids)
    sums: TemplateSums | PrecisionSums | None = None
    metadata: dict[str, Any] = {}
    used, quality = np.zeros(count, np.int64), np.zeros(count)
    for rows, embedded in chunks:
        if sums is None:
            dim = embedded.embeddings.shape[1]
            sums = PrecisionSums(count, dim) if pooling.precision else TemplateSums(count, dim, pooling)
            source = "norm" if embedded.qualities is None else "qualities of the file"
            metadata = dict(embedded.metadata) | {"quality": source}
        template, enrolled = samples.template[rows], embedded.enrolled
        used += np.bincount(template[enrolled], minlength=count)
        quality += np.bincount(template[enrolled], embedded.quality[enrolled], minlength=count)
        if isinstance(sums, PrecisionSums):
            variances = required_variances(embedded)[enrolled]
            sums.add(template[enrolled], embedded.unit(np.flatnonzero(enrolled)), variances)
            continue
        sums.add(
            template,
            samples.media[rows],
            embedded.embeddings,
            usable=enrolled,
            det_scores=embedded.det_scores if samples.det_scores is None else samples.det_scores[rows],
            quality=_weights(embedded) if pooling.by_quality else None,
        )
    if sums is None or not used.any():
        raise DataError(f"{name}: none of the {len(samples.keys)} samples has a usable embedding.")
    features, more = sums.finish()
    is_there = used > 0 if pooling.precision else more.astype(bool)
    return EmbeddingSet(
        features,
        samples.subject_ids,
        template_ids=samples.template_ids,
        fte=~is_there,
        qualities=np.divide(quality, used, out=np.zeros(count), where=used > 0).astype(np.float32),
        variances=more.astype(np.float32) if pooling.precision else None,
        metadata=metadata | {"pooling": str(pooling), "samples_used": int(used.sum())},
        name=name,
    )


def _weights(embedded: EmbeddingSet) -> NDArray[np.float64]:
    """(N,) quality as a weight, 0 where not enrolled."""
    weights = np.where(embedded.enrolled, embedded.quality, 0).astype(np.float64)
    if (weights < 0).any():
        raise DataError(f"{embedded.name}: quality {weights.min():g} is negative; a weight is 0 or more.")
    return weights
