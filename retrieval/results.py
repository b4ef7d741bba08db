"""The result record: what an evaluation writes, and what the report reads. JSON without NaN.

    {"protocol", "protocol_version", "format_version", "rule", "counts": {...},
     "metrics": {"rank_1": {"value", "ci95": [low, high], ...}, "tpir@fpir=0.01": {...}, "tar@far=1e-4": {...}},
     "curves": {...}, "conditions": {name: {"counts", "metrics", "curves"}}, "inputs": {...}, "warnings": [...]}

A value that does not exist is null and carries a `reason`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from aroface.files import read_json, sha256_of, write_json
from retrieval.curves import det, discard, histogram, identification_errors, mean_identification_errors
from retrieval.embedding_files import INDEX_NAME
from retrieval.metrics.identification import (
    IdentificationResult,
    OpenSetPoint,
    StratumResult,
)
from retrieval.metrics.intervals import Interval, wilson
from retrieval.metrics.rules import MIN_SUPPORTED
from retrieval.metrics.verification import VerificationPoint, VerificationResult, rates_by_stratum

__all__ = [
    "FORMAT_VERSION",
    "file_hashes",
    "identification_record",
    "metric",
    "pair_strata_records",
    "preprocessing",
    "read_result",
    "result_record",
    "strata_records",
    "support_mark",
    "verification_record",
    "write_result",
]

FORMAT_VERSION = 1
_CMC_LENGTH = 100


def metric(
    value: float | None, *, interval: Interval | None = None, reason: str | None = None, **more: Any
) -> dict[str, Any]:
    """One entry of `metrics`."""
    entry: dict[str, Any] = {"value": value}
    if value is None:
        entry["reason"] = reason or "not defined on these data"
    entry["ci95"] = [interval.low, interval.high] if interval else None
    if interval:
        entry["ci95_method"] = interval.method
    return entry | more


def support_mark(entry: Mapping[str, Any]) -> str:
    """One star where fewer than 30 false positives stand behind a value, two where not even one does."""
    return "" if entry.get("supported", True) else " **" if entry.get("extrapolated") else " *"


def result_record(
    protocol: str,
    rule: str,
    *,
    counts: Mapping[str, int],
    metrics: Mapping[str, Any],
    curves: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    version: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """A record with the keys that every protocol has.

    Args:
        protocol: its name.
        rule: how rates became thresholds.
        counts: of what was compared, and of what failed.
        metrics: entries made by `metric`.
        curves: thinned for plots.
        warnings: sentences for the reader.
        version: of the protocol; numbers of two versions do not compare.
        **more: further entries.
    """
    return {
        "protocol": protocol,
        "protocol_version": version,
        "format_version": FORMAT_VERSION,
        "rule": rule,
        "counts": dict(counts),
        "metrics": dict(metrics),
        "curves": dict(curves or {}),
        "warnings": list(warnings),
        **more,
    }


def write_result(path: Path, record: Mapping[str, Any]) -> None:
    """Write one record, atomically."""
    write_json(path, record)


def read_result(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        DataError: not a result of `aroface evaluate`, or of another format version.
    """
    record = read_json(path)
    if not {"protocol", "metrics", "counts"} <= record.keys():
        raise DataError(f"{path} is not a result of `aroface evaluate`: it lacks protocol, metrics or counts.")
    if record.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has result format {record.get('format_version')!r}; this version reads {FORMAT_VERSION}."
        )
    return record


def file_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by file name, by path where two have one name; for a folder of embeddings that of its index."""
    names = Counter(path.name for path in paths)
    return {
        path.name if names[path.name] == 1 else str(path): sha256_of(path / INDEX_NAME if path.is_dir() else path)
        for path in paths
    }


def preprocessing(model: Mapping[str, Any], *, alignment: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """How the images were prepared, as the embeddings tell, and warnings where they do not.

    Args:
        model: metadata of the embeddings.
        alignment: what the user calls the alignment of the crops. Without it the contract's template is believed only
            where the images were aligned to it by landmarks on this side; a model cannot know how a folder was made.
    """
    contract = model.get("contract")
    template = (contract or {}).get("template")
    if template and not model.get("aligned_by"):
        template = f"unknown (model expects {template})"
    found = {
        "contract": contract,
        "alignment": alignment or template or "unknown",
        "flip": model.get("flip", "unknown"),
    }
    unknown = "The embeddings do not say how their images were prepared (colour order, alignment, size)."
    return found, [] if contract else [unknown]


def verification_record(
    result: VerificationResult,
    *,
    far_labels: Sequence[str],
    quality: NDArray[Any] | None = None,
    quality_name: str = "norm",
) -> dict[str, Any]:
    """Counts, metrics, curves and warnings of a list of pairs.

    Args:
        result: from `evaluate_verification`.
        far_labels: how each rate is written in its key, such as `1e-4`.
        quality: (G,) of every genuine pair, for the error-versus-discard curve; None: no curve.
        quality_name: what it is.
    """
    metrics = {f"tar@far={label}": _tar(point) for label, point in zip(far_labels, result.points, strict=True)}
    reason = result.points[0].reason if result.points else None
    total = result.num_genuine + result.num_impostor
    metrics["accuracy"] = metric(
        result.accuracy,
        interval=None if result.accuracy is None else wilson(round(result.accuracy * total), total),
        reason=reason,
        threshold=None if result.accuracy_threshold is None else _finite(result.accuracy_threshold),
        note="best threshold chosen on these pairs: optimistic",
    )
    weak = _weak_warnings("FAR", far_labels, result.points)
    counts = {
        "pairs": result.num_genuine + result.num_impostor,
        "genuine": result.num_genuine,
        "impostor": result.num_impostor,
        "fte_pairs": result.num_failed,
    }
    curves: dict[str, Any] = {}
    genuine, impostor = result.genuine, result.impostor
    if result.num_genuine and result.num_impostor:
        curves["det"] = det(genuine, impostor)
        if (scores := histogram(genuine, impostor)) is not None:
            curves["scores"] = scores
        if quality is not None:
            curves["edc"] = discard(genuine, quality, impostor, what=quality_name)
            for limit, area in curves["edc"]["area"].items():
                metrics[f"edc_area@{limit}"] = metric(
                    area, far=curves["edc"]["far"], supported=curves["edc"]["supported"], quality=quality_name
                )
    return {"counts": counts, "metrics": metrics, "curves": curves, "warnings": weak}


def _tar(point: VerificationPoint) -> dict[str, Any]:
    if point.point is None:
        return metric(None, reason=point.reason)
    return metric(
        point.tar,
        interval=point.interval,
        k=point.point.k,
        realised=point.point.realised,
        threshold=_finite(point.point.threshold),
        supported=point.is_supported,
        extrapolated=point.is_extrapolated,
        value_enrolled_only=point.tar_enrolled,
    )


def identification_record(result: IdentificationResult, *, fpir_labels: Sequence[str]) -> dict[str, Any]:
    """Counts, metrics, curves and warnings of a search.

    Args:
        result: from `evaluate_identification`.
        fpir_labels: how each rate is written in its key, such as `0.01`.
    """
    several = len(result.searches) > 1
    metrics: dict[str, Any] = {}
    for (k, value, interval), mean, (_, enrolled) in zip(
        result.ranks, result.mean_over_galleries, result.enrolled_ranks, strict=True
    ):
        more: dict[str, Any] = {"value_enrolled_only": enrolled}
        if several:
            more["mean_of_galleries"] = mean
        metrics[f"rank_{k}"] = metric(value, interval=interval, reason="no mated searches", **more)
    for label, point in zip(fpir_labels, result.open_set, strict=True):
        metrics[f"tpir@fpir={label}"] = _tpir(point)
    if result.mean_average_precision is not None:
        metrics["map"] = metric(result.mean_average_precision, interval=result.precision_interval)
    counts = {
        "probes": len(result.searches[0].best),
        "galleries": len(result.searches),
        "mated": result.num_mated,
        "non_mated": result.num_non_mated,
        "fte_probes": result.num_probe_failures,
        "fte_gallery": result.num_gallery_failures,
        "tied_ranks": result.num_tied,
    }
    warnings = _weak_warnings("FPIR", fpir_labels, result.open_set)
    if result.num_tied:
        warnings.append(
            f"{result.num_tied} probes have another rank when ties are broken in their favour: look for duplicate or "
            "zero embeddings."
        )
    curves: dict[str, Any] = {"cmc": result.cmc(_CMC_LENGTH), "mated": result.num_mated}
    curves["iet"] = [identification_errors(search, result.candidates) for search in result.searches]
    if several and (errors := mean_identification_errors(result.searches, result.candidates)) is not None:
        curves["iet_mean"] = errors
    best = [np.concatenate([getattr(s, kind) for s in result.searches]) for kind in ("mated_best", "non_mated_best")]
    if (shares := histogram(*best)) is not None:
        curves["search_scores"] = shares
    return {
        "counts": counts,
        "metrics": metrics,
        "curves": curves,
        "warnings": warnings,
        "candidates": result.candidates,
        "rank_level": result.rank_level,
    }


def _tpir(point: OpenSetPoint) -> dict[str, Any]:
    if point.tpir is None:
        return metric(None, reason=point.reason, value_rank_l=None, supported=False)
    more: dict[str, Any] = {
        "value_rank_l": point.tpir_rank_l,
        "value_enrolled_only": point.tpir_enrolled,
        "extrapolated": point.is_extrapolated,
    }
    if point.galleries:
        listed = point.interval_rank_l
        return metric(
            point.tpir,
            interval=point.interval,
            **more,
            ci95_rank_l=[listed.low, listed.high] if listed else None,
            k=min(p.point.k for p in point.galleries if p.point),
            realised=float(np.mean([p.point.realised for p in point.galleries if p.point])),
            threshold=None,
            supported=point.is_supported,
            galleries=[_tpir(p) for p in point.galleries],
        )
    assert point.point is not None  # noqa: S101 - a value has a threshold
    interval_l = point.interval_rank_l
    return metric(
        point.tpir,
        interval=point.interval,
        **more,
        ci95_rank_l=[interval_l.low, interval_l.high] if interval_l else None,
        k=point.point.k,
        realised=point.point.realised,
        threshold=_finite(point.point.threshold),
        supported=point.is_supported,
    )


def strata_records(
    strata: Sequence[StratumResult], column: str, *, fpir_labels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Blocks `COLUMN=VALUE` of counts and metrics, at the thresholds of all searches.

    Args:
        strata: from `identification_by_stratum`.
        column: name of the covariate.
        fpir_labels: how each rate is written.
    """
    found = {}
    for one in strata:
        metrics = {f"rank_{k}": metric(value, interval=ci, reason="no mated searches") for k, value, ci in one.ranks}
        for label, (tpir, ci), (listed, listed_ci), (fpir, fpir_ci) in zip(
            fpir_labels, one.tpir, one.tpir_rank_l, one.fpir, strict=True
        ):
            metrics[f"tpir@fpir={label}"] = metric(
                tpir,
                interval=ci,
                value_rank_l=listed,
                ci95_rank_l=[listed_ci.low, listed_ci.high] if listed_ci else None,
                threshold_of="all searches",
            )
            metrics[f"fpir@fpir={label}"] = metric(fpir, interval=fpir_ci, threshold_of="all searches")
        counts = {"mated": one.num_mated, "non_mated": one.num_non_mated}
        found[f"{column}={one.stratum}"] = {"counts": counts, "metrics": metrics, "curves": {}}
    return found


def pair_strata_records(
    result: VerificationResult,
    scores: NDArray[np.float32],
    same: NDArray[np.bool_],
    strata: tuple[Sequence[Any], NDArray[np.integer[Any]]],
    column: str,
    *,
    far_labels: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Blocks `COLUMN=VALUE` of TAR and FMR, at the thresholds of all pairs.

    Args:
        result: of all pairs.
        scores: (P,) of the pairs.
        same: (P,) True for genuine.
        strata: values of the covariate, and (P,) the index into them of each pair.
        column: name of the covariate.
        far_labels: how each rate is written.
    """
    names, codes = strata
    found: dict[str, dict[str, Any]] = {}
    for kind, count, chosen in (("tar", "genuine", same), ("fmr", "impostor", ~same)):
        own_scores, own_codes = scores[chosen], codes[chosen]
        for label, point in zip(far_labels, result.points, strict=True):
            if point.point is None:
                continue
            for stratum, total, value, ci in rates_by_stratum(own_scores, own_codes, names, point.point):
                block = found.setdefault(f"{column}={stratum}", {"counts": {}, "metrics": {}, "curves": {}})
                block["counts"][count] = total
                block["metrics"][f"{kind}@far={label}"] = metric(value, interval=ci, threshold_of="all pairs")
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weak_warnings(rate: str, labels: Sequence[str], points: Sequence[VerificationPoint | OpenSetPoint]) -> list[str]:
    """Which rates have fewer than 30 false positives behind them, and which not even one."""
    known = [(label, p) for label, p in zip(labels, points, strict=True) if p.reason is None]
    weak = [label for label, p in known if not p.is_supported and not p.is_extrapolated]
    none = [label for label, p in known if p.is_extrapolated]
    warnings = []
    if weak:
        warnings.append(
            f"{rate} {', '.join(weak)}: fewer than {MIN_SUPPORTED} false positives stand behind the threshold; "
            "not statistically supported (rule of 30)."
        )
    if none:
        warnings.append(
            f"{rate} {', '.join(none)}: the data allow no false positive at all (K = 0); the rate is undefined here, "
            "and the value is that at the highest negative score."
        )
    return warnings
