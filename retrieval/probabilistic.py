"""Embeddings with an uncertainty: precision-weighted fusion and the mutual likelihood score.

For models that give a variance beside each embedding. Source: Shi and Jain, Probabilistic Face Embeddings, ICCV 2019
(arXiv:1904.09658), equations 3 and 7.

Legend: N samples, T templates, P probes, G gallery entries, D embedding dimension.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["mutual_likelihood", "precision_weighted"]

_BLOCK_ELEMENTS = 1 << 24


def precision_weighted(
    means: NDArray[np.float32], variances: NDArray[np.float32], template: NDArray[np.int64], *, num_templates: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fuse samples, each dimension weighted by how sure it is.

    Args:
        means: (N, D) embeddings of length 1.
        variances: (N, D), or (N, 1) for one variance of all dimensions; positive.
        template: (N,) index of the template.
        num_templates: T; a template without samples has mean 0 and infinite variance.

    Returns:
        (T, D) means, and (T, D) variances of the fused estimate.
    """
    precision = np.broadcast_to(1 / variances.astype(np.float64), means.shape)
    total = np.zeros((num_templates, means.shape[1]))
    weighted = np.zeros_like(total)
    np.add.at(total, template, precision)
    np.add.at(weighted, template, precision * means)
    with np.errstate(divide="ignore"):
        variance = 1 / total
    mean = np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)
    return mean.astype(np.float32), variance.astype(np.float32)


def mutual_likelihood(
    probes: tuple[NDArray[np.float32], NDArray[np.float32]], gallery: tuple[NDArray[np.float32], NDArray[np.float32]]
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
