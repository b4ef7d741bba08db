"""Verification and identification metrics: NumPy in, frozen dataclasses out, no torch."""

from retrieval.metrics.edc import edc, partial_area
from retrieval.metrics.identification import (
    IdentificationResult,
    OpenSetPoint,
    average_precision,
    evaluate_identification,
    search_gallery,
)
from retrieval.metrics.intervals import Interval, bootstrap_tar, wilson
from retrieval.metrics.rules import RULES, OperatingPoint, Rule, operating_point
from retrieval.metrics.verification import (
    FoldAccuracy,
    VerificationPoint,
    VerificationResult,
    evaluate_pairs,
    evaluate_verification,
    kfold_accuracy,
    pair_scores,
)

__all__ = [
    "RULES",
    "FoldAccuracy",
    "IdentificationResult",
    "Interval",
    "OpenSetPoint",
    "OperatingPoint",
    "Rule",
    "VerificationPoint",
    "VerificationResult",
    "average_precision",
    "bootstrap_tar",
    "edc",
    "evaluate_identification",
    "evaluate_pairs",
    "evaluate_verification",
    "kfold_accuracy",
    "operating_point",
    "pair_scores",
    "partial_area",
    "search_gallery",
    "wilson",
]
