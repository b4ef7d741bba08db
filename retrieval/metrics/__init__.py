"""Verification and identification metrics: NumPy in, frozen dataclasses out, no torch."""

from retrieval.metrics.edc import edc, partial_area
from retrieval.metrics.identification import (
    IdentificationResult,
    OpenSetPoint,
    evaluate_identification,
    evaluate_searches,
    identification_by_stratum,
)
from retrieval.metrics.intervals import Interval, bootstrap_tar, wilson
from retrieval.metrics.rules import PAIR_RULES, RULES, OperatingPoint, Rule, operating_point, operating_points
from retrieval.metrics.score_blocks import BlockMaker, Similarity
from retrieval.metrics.search import GallerySearch, average_precision, rank_scores, search_gallery
from retrieval.metrics.verification import (
    FoldAccuracy,
    VerificationPoint,
    VerificationResult,
    area_under_roc,
    evaluate_pairs,
    evaluate_verification,
    kfold_accuracy,
    pair_scores,
    rates_by_stratum,
)

__all__ = [
    "PAIR_RULES",
    "RULES",
    "BlockMaker",
    "FoldAccuracy",
    "GallerySearch",
    "IdentificationResult",
    "Interval",
    "OpenSetPoint",
    "OperatingPoint",
    "Rule",
    "Similarity",
    "VerificationPoint",
    "VerificationResult",
    "area_under_roc",
    "average_precision",
    "bootstrap_tar",
    "edc",
    "evaluate_identification",
    "evaluate_pairs",
    "evaluate_searches",
    "evaluate_verification",
    "identification_by_stratum",
    "kfold_accuracy",
    "operating_point",
    "operating_points",
    "pair_scores",
    "partial_area",
    "rank_scores",
    "search_gallery",
    "rates_by_stratum",
    "wilson",
]
