"""From the curves of result records to figures, a line per system or condition."""

from collections.abc import Mapping, Sequence
from typing import Any

from retrieval.metrics.rules import MIN_SUPPORTED
from retrieval.report.document import Block, Plot
from retrieval.report.plots import (
    plot_calibration,
    plot_cmc,
    plot_discard,
    plot_error_tradeoff,
    plot_histograms,
)
from retrieval.report.wording import condition_name, percent

__all__ = ["curve_blocks"]

Record = Mapping[str, Any]

_GREY = f"In the grey range fewer than {MIN_SUPPORTED} false positives support the curve."


def curve_blocks(blocks: Mapping[str, Record], prefix: str, *, of: str = "") -> list[Block]:
    """All figures that labelled records have the curves for.

    Args:
        blocks: label -> record, or one of its conditions.
        prefix: of file names.
        of: what the figures are of, for captions, such as `clean probes`.
    """
    named = {condition_name(name): block.get("curves", {}) for name, block in blocks.items()}
    tail = f" {of[:1].upper()}{of[1:]}." if of else ""
    return [
        *_cmc(named, prefix, tail),
        *_identification(named, prefix, tail),
        *_verification(named, prefix, tail),
        *_scores(named, prefix, tail),
        *_discard(named, prefix, tail),
    ]


def _having(named: Mapping[str, Record], key: str) -> dict[str, Any]:
    return {name: curves[key] for name, curves in named.items() if curves.get(key)}


def _cmc(named: Mapping[str, Record], prefix: str, tail: str) -> list[Block]:
    curves = _having(named, "cmc")
    if not curves:
        return []
    first = ", ".join(f"{name} {percent(values[0])} at rank 1" for name, values in curves.items())
    return [
        Plot(
            f"{prefix}-cmc",
            plot_cmc(curves),
            alt=f"Cumulative match curve; {first}.",
            caption="Cumulative match (closed set): searches whose person is among the first k candidates, and those "
            f"that miss (FNIR at rank k).{tail}",
        )
    ]


def _identification(named: Mapping[str, Record], prefix: str, tail: str) -> list[Block]:
    galleries: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for name, curves in named.items():
        found = [curve for curve in curves.get("iet", ()) if curve["fpir"]]
        for number, curve in enumerate(found, start=1):
            title = name if len(found) == 1 else f"{name}, gallery {number}"
            galleries[title] = curve
            if len(found) == 1 or len(named) == 1:
                shown[title] = curve
        if (mean := curves.get("iet_mean")) is not None and len(found) > 1:
            shown[f"{name}, mean of galleries"] = mean
    if not galleries:
        return []
    lines = {n: {"x": c["fpir"], "y": c["fnir"], "negatives": c["non_mated"]} for n, c in shown.items()}
    blocks: list[Block] = [
        Plot(
            f"{prefix}-fnir-fpir",
            plot_error_tradeoff(lines, x="FPIR", y="FNIR (rank 1)", negatives_are="non-mated searches"),
            alt="False negative against false positive identification rate on logarithmic axes.",
            caption="Identification errors (open set): enrolled people missed against strangers who raise a false "
            f"alarm. Lower is better. {_GREY}{tail}",
        )
    ]
    thresholds = {
        name: {"threshold": c["threshold"], "x": c["fpir"], "negatives": c["non_mated"]}
        for name, c in galleries.items()
        if any(value is not None for value in c.get("threshold", ()))
    }
    if thresholds:
        figure = plot_calibration(thresholds, rate="FPIR", negatives_are="non-mated searches")
        blocks.append(_calibration(f"{prefix}-fpir-threshold", figure, "strangers who raise a false alarm", tail))
    return blocks


def _verification(named: Mapping[str, Record], prefix: str, tail: str) -> list[Block]:
    curves = _having(named, "det")
    if not curves:
        return []
    lines = {n: {"x": c["fmr"], "y": c["fnmr"], "negatives": c["impostors"]} for n, c in curves.items()}
    blocks: list[Block] = [
        Plot(
            f"{prefix}-det",
            plot_error_tradeoff(lines, x="FMR", y="FNMR", negatives_are="impostor pairs"),
            alt="Detection error trade-off: false non-match against false match rate on logarithmic axes.",
            caption="Detection error trade-off: genuine pairs rejected against impostor pairs accepted. Lower is "
            f"better. {_GREY}{tail}",
        )
    ]
    thresholds = {
        name: {"threshold": c["threshold"], "x": c["fmr"], "negatives": c["impostors"]}
        for name, c in curves.items()
        if any(value is not None for value in c.get("threshold", ()))
    }
    if thresholds:
        figure = plot_calibration(thresholds, rate="FMR", negatives_are="impostor pairs")
        blocks.append(_calibration(f"{prefix}-fmr-threshold", figure, "impostor pairs that are accepted", tail))
    return blocks


def _calibration(name: str, figure: Any, what: str, tail: str) -> Plot:
    return Plot(
        name,
        figure,
        alt=f"{what[:1].upper()}{what[1:]} against the threshold, on a logarithmic axis.",
        caption=f"Calibration: share of {what}, by threshold. A threshold that is set on one set and used on another "
        f"moves along such a curve. {_GREY}{tail}",
    )


def _scores(named: Mapping[str, Record], prefix: str, tail: str) -> list[Block]:
    blocks: list[Block] = []
    kinds: Sequence[tuple[str, str, tuple[str, str], str, str]] = (
        ("search_scores", "search-scores", ("mated", "non-mated"), "searches", "best scores of searches"),
        ("scores", "scores", ("genuine", "impostor"), "pairs", "scores of pairs"),
    )
    for key, name, names, unit, what in kinds:
        if curves := _having(named, key):
            blocks.append(
                Plot(
                    f"{prefix}-{name}",
                    plot_histograms(curves, kinds=names, unit=unit),
                    alt=f"Histogram of the {what}, {names[0]} and {names[1]}.",
                    caption=f"{what[:1].upper()}{what[1:]}. The less the two overlap, the better people are told "
                    f"apart; failures to enrol have no score.{tail}",
                )
            )
    return blocks


def _discard(named: Mapping[str, Record], prefix: str, tail: str) -> list[Block]:
    curves = _having(named, "edc")
    if not curves:
        return []
    first = next(iter(curves.values()))
    weak = "" if first.get("supported", True) else f", with fewer than {MIN_SUPPORTED} false matches behind it"
    return [
        Plot(
            f"{prefix}-edc",
            plot_discard(curves),
            alt="Error-versus-discard characteristic: false non-match rate against the share discarded.",
            caption=f"Error versus discard: FNMR at the threshold of FMR {percent(first['far'])}{weak}, when the "
            f"genuine pairs of lowest quality ({first['quality']}) are left out. A quality that knew every error "
            f"would follow the thin line.{tail}",
        )
    ]
