"""Embeddings with an uncertainty: precision-weighted fusion and the mutual likelihood score.

For models that give a variance beside each embedding. Source: Shi and Jain, Probabilistic Face Embeddings, ICCV 2019
(arXiv:1904.09658), equations 3 and 7.

Legend: N samples, T templates, P probes, G gallery entries, D embedding dimension.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet

__all__ = ["PrecisionSums", "mutual_likelihood", "mutual_likelihood_of_pairs", "precision_weighted"]
__all__ += ["required_variances"]

_BLOCK_ELEMENTS = 1 << 24


class PrecisionSums:
    """Precision-weighted fusion of samples as they come: two float64 sums per template, whatever the frames.

    Args:
        num_templates: T.
        dim: D.
    """

    def __init__(self, num_templates: int, dim: int) -> None:
        self._precision = np.zeros((num_templates, dim))
        self._weighted = np.zeros((num_templates, dim))

    def add(
        self, template: NDArray[np.int64], means: NDArray[np.floating[Any]], variances: NDArray[np.float32]
    ) -> None:
        """Add samples.

        Args:
            template: (N,) index of the template.
            means: (N, D) embeddings of length 1.
            variances: (N, D), or (N, 1) for one variance of all dimensions; positive.
        """
        precision = np.broadcast_to(1 / variances.astype(np.float64), means.shape)
        np.add.at(self._precision, template, precision)
        np.add.at(self._weighted, template, precision * means)

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(T, D) means, 0 without samples, and (T, D) variances of the fused estimate, infinite without samples."""
        with np.errstate(divide="ignore"):
            variance = 1 / self._precision
        mean = np.divide(self._weighted, self._precision, out=np.zeros_like(variance), where=self._precision > 0)
        return mean.astype(np.float32), variance.astype(np.float32)


def precision_weighted(
    means: NDArray[np.float32], variances: NDArray[np.float32], template: NDArray[np.int64], *, num_templates: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fuse samples that are all there, each dimension weighted by how sure it is; see `PrecisionSums`."""
    sums = PrecisionSums(num_templates, means.shape[1])
    sums.add(template, means, variances)
    return sums.finish()


def mutual_likelihood_of_pairs(
    first: tuple[NDArray[np.floating[Any]], NDArray[np.float32]],
    second: tuple[NDArray[np.floating[Any]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """(P,) score of row i of one side with row i of the other; see `mutual_likelihood`."""
    total = first[1].astype(np.float64) + second[1]
    terms = np.square(np.subtract(first[0], second[0], dtype=np.float64)) / total + np.log(total)
    scores: NDArray[np.float32] = (-0.5 * terms.sum(1)).astype(np.float32)
    return scores


def mutual_likelihood(
    probes: tuple[NDArray[np.floating[Any]], NDArray[np.float32]],
    gallery: tuple[NDArray[np.floating[Any]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Log-likelihood that two estimates share one embedding, for all pairs; without its constant.

    Args:
        probes: (P, D) means and (P, D) or (P, 1) variances.
        gallery: (G, D) means and (G, D) or (G, 1) variances.

    Returns:
        (P, G): -1/2 of the sum over dimensions of (difference ^ 2 / v + log v), v the sum of both variances. Larger is
        more similar; -inf where a side has an infinite variance (no samples).
    """
    (mean, variance), (other, other_variance) = probes, gallery
    if variance.shape[1] == other_variance.shape[1] == 1:
        return _of_single_variances(mean, variance, other, other_variance)
    scores = np.full((len(mean), len(other)), -np.inf, np.float32)
    known = np.isfinite(other_variance).all(1)
    right, right_variance = other[known].astype(np.float64), other_variance[known].astype(np.float64)
    rows = max(1, _BLOCK_ELEMENTS // max(1, right.size))
    for start in range(0, len(mean), rows):
        part = np.arange(start, min(start + rows, len(mean)))
        part = part[np.isfinite(variance[part]).all(1)]
        total = variance[part, None, :].astype(np.float64) + right_variance[None]
        difference = mean[part, None, :].astype(np.float64) - right[None]
        terms = np.broadcast_to(difference**2 / total + np.log(total), difference.shape)
        scores[np.ix_(part, known)] = -0.5 * terms.sum(2)
    return scores


def _of_single_variances(
    mean: NDArray[np.floating[Any]],
    variance: NDArray[np.float32],
    other: NDArray[np.floating[Any]],
    other_variance: NDArray[np.float32],
) -> NDArray[np.float32]:
    """One variance per estimate: squared distances come from a matrix product."""
    left, right = mean.astype(np.float64), other.astype(np.float64)
    distances = np.square(left).sum(1)[:, None] + np.square(right).sum(1)[None] - 2 * left @ right.T
    total = variance.astype(np.float64) + other_variance[:, 0].astype(np.float64)[None]
    with np.errstate(invalid="ignore"):
        scores = -0.5 * (np.maximum(distances, 0) / total + left.shape[1] * np.log(total))
    scores[~np.isfinite(total)] = -np.inf
    result: NDArray[np.float32] = scores.astype(np.float32)
    return result


def required_variances(embeddings: EmbeddingSet) -> NDArray[np.float32]:
    """(N, D) or (N, 1) variances, 1 where a row is not enrolled.

    Raises:
        DataError: there are none.
    """
    if embeddings.variances is None:
        raise DataError(
            f"{embeddings.name} has no `variances`; --similarity mls and --pooling PFE need them. Take cosine "
            "and N1D0, or embeddings of a model that tells how sure it is."
        )
    return np.where(embeddings.enrolled[:, None], embeddings.variances, np.float32(1))
