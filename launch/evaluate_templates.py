"""Any set of templates: identification from templates.csv and samples.csv.

templates.csv: template_id,subject_id,role,gallery_name and any column that describes a probe (--condition).
samples.csv: template_id,media_id,path, perhaps det_score and x1,y1,...,x5,y5 in pixels of the image, by which it is
aligned. A template without samples is a failure to enrol. One or two gallery names are searched, each on its own.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroface.errors import DataError
from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_options import add_rule, counts, positive, rates
from launch.evaluate_source import (
    add_out,
    add_pooling,
    add_similarity,
    add_source,
    finish,
    frozen,
    open_collection,
    quality_name,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from retrieval.embeddings import EmbeddingSet

_FPIRS = "0.001,0.01,0.1"
_FARS = "1e-4,1e-3,1e-2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--manifest", type=Path, required=True, metavar="DIR", help="templates.csv and samples.csv")
    parser.add_argument("--condition", metavar="COLUMN", help="also by this column of the probes")
    add_source(parser, images="folder that the paths of samples.csv start from")
    add_pooling(parser, "N1D0")
    parser.add_argument("--flat", action="store_true", help="one mean over all samples, without a mean per media")
    parser.add_argument("--ranks", type=counts, default=[1, 5, 10, 20], metavar="K,..", help="ranks")
    parser.add_argument("--fpir", type=rates, default=rates(_FPIRS), metavar="RATE,..", help="FPIRs")
    parser.add_argument("--far", type=rates, default=rates(_FARS), metavar="RATE,..", help="FARs")
    parser.add_argument("--candidates", type=positive, default=20, metavar="L", help="list length")
    add_device(parser)
    add_similarity(parser)
    add_rule(parser)
    add_out(parser, searches=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification, identification_by_stratum
    from retrieval.protocols.manifest import read_template_manifest
    from retrieval.results import identification_record, strata_records
    from retrieval.templates import Pooling, pool_templates

    blocks = search_blocks(args)
    manifest = read_template_manifest(args.manifest)
    if args.condition is not None and args.condition not in manifest.conditions:
        raise DataError(
            f"--condition {args.condition}: templates.csv has the columns {', '.join(manifest.conditions) or 'none'}."
        )
    if len(manifest.galleries) > 2:
        raise DataError(f"templates.csv names {len(manifest.galleries)} galleries; one or two are searched.")
    pooling = Pooling.parse(args.pooling, media=not args.flat)
    samples = manifest.samples
    with ExitStack() as stack:
        collection = open_collection(args, stack, total=len(samples.keys))
        landmarks = None if args.embeddings is not None else samples.landmarks
        chunks = collection.chunks(samples.keys, samples.stream_order(), landmarks=landmarks)
        templates = pool_templates(samples, chunks, pooling, name=str(args.manifest))
    galleries = [templates.take(rows) for rows in manifest.galleries.values()]

    probes = templates.take(manifest.probes)
    result = evaluate_identification(
        galleries,
        probes,
        ranks=args.ranks,
        fpirs=args.fpir.values,
        candidates=args.candidates,
        rule=args.rule,
        similarity=args.similarity,
        resamples=args.resamples,
        blocks=blocks,
    )
    parts = identification_record(result, fpir_labels=args.fpir)
    parts["metrics"] |= frozen(args, searches=result.searches)
    condition = None if args.condition is None else manifest.conditions[args.condition]
    if condition is not None:
        strata = identification_by_stratum(result, condition)
        parts["conditions"] = strata_records(strata, args.condition, fpir_labels=args.fpir)
    _add_verification(args, parts, galleries, probes, condition)
    parts["counts"] |= {"samples": len(samples.keys), "missing": collection.missing}
    parts["counts"]["fte_samples"] = len(samples.keys) - int(templates.metadata["samples_used"])
    finish(
        args,
        "templates",
        parts,
        title=str(args.manifest),
        rule=args.rule,
        model=templates.metadata,
        files=manifest.files,
        details=search_details(result.searches, probes.subject_ids),
        searched=(galleries, probes),
        similarity=args.similarity,
        pooling=f"{pooling}, F{int(templates.metadata.get('flip') == 'sum')}",
    )
    return 0


def _add_verification(
    args: argparse.Namespace,
    parts: dict[str, Any],
    galleries: "Sequence[EmbeddingSet]",
    probes: "EmbeddingSet",
    condition: "NDArray[Any] | None",
) -> None:
    """TAR at FAR of every probe against every entry, also by the condition of the probe.

    Left out, with a warning, where these are too many pairs or the rule is for searches.
    """
    import numpy as np

    from retrieval.embeddings import concatenate
    from retrieval.metrics import evaluate_pairs
    from retrieval.metrics.all_pairs import MOST_COMPARISONS, compare_all
    from retrieval.metrics.rules import PAIR_RULES
    from retrieval.results import pair_strata_records, verification_record

    gallery = concatenate(galleries)
    if args.rule not in PAIR_RULES or len(gallery) * len(probes) > MOST_COMPARISONS:
        parts["warnings"].append(f"No TAR: the rule is for searches, or there are over {MOST_COMPARISONS:,} pairs.")
        return
    compared = compare_all(gallery, probes, similarity=args.similarity)
    codes = np.unique(np.concatenate([gallery.subject_ids, probes.subject_ids]), return_inverse=True)[1]
    sides = codes[: len(gallery)][compared.entry], codes[len(gallery) :][compared.probe]
    result = evaluate_pairs(
        compared.scores,
        compared.same,
        fars=args.far.values,
        rule=args.rule,
        subjects=sides,
        resamples=args.resamples,
    )
    quality = np.minimum(gallery.quality[compared.entry[compared.same]], probes.quality[compared.probe[compared.same]])
    found = verification_record(result, far_labels=args.far, quality=quality, quality_name=quality_name(args, probes))
    parts["metrics"] |= {name: entry for name, entry in found["metrics"].items() if name != "accuracy"}
    parts["curves"] |= found["curves"]
    parts["counts"] |= {name: found["counts"][name] for name in ("genuine", "impostor", "fte_pairs")}
    parts["warnings"] += found["warnings"]
    if condition is not None:
        names, codes = np.unique(condition, return_inverse=True)
        strata = names.tolist(), codes[compared.probe]
        by_condition = pair_strata_records(
            result, compared.scores, compared.same, strata, args.condition, far_labels=args.far
        )
        for name, block in by_condition.items():
            for part in ("counts", "metrics"):
                parts["conditions"][name][part] |= block[part]
