"""Any set of templates: identification from templates.csv and samples.csv.

templates.csv: template_id,subject_id,role,gallery_name and any column that describes a probe (--condition).
samples.csv: template_id,media_id,path, perhaps det_score and x1,y1,...,x5,y5 in pixels of the image, by which it is
aligned. A template without samples is a failure to enrol. One or two gallery names are searched, each on its own.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import DataError
from launch.evaluate_options import add_rule, counts, positive, rates
from launch.evaluate_source import add_out, add_pooling, add_source, finish, open_collection

if TYPE_CHECKING:
    import numpy as np

    from retrieval.metrics import IdentificationResult

_FPIRS = "0.001,0.01,0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--manifest", type=Path, required=True, metavar="DIR", help="templates.csv and samples.csv")
    parser.add_argument("--condition", metavar="COLUMN", help="also by this column of the probes")
    add_source(parser, images="folder that the paths of samples.csv start from")
    add_pooling(parser, "N1D0")
    parser.add_argument("--flat", action="store_true", help="one mean over all samples, without a mean per media")
    parser.add_argument("--ranks", type=counts, default=[1, 5, 10, 20], metavar="K,..", help="ranks (1,5,10,20)")
    parser.add_argument("--fpir", type=rates, default=rates(_FPIRS), metavar="RATE,..", help=f"FPIRs ({_FPIRS})")
    parser.add_argument("--candidates", type=positive, default=20, metavar="L", help="list length (%(default)s)")
    add_rule(parser)
    add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    import numpy as np

    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.manifest import read_template_manifest
    from retrieval.results import identification_record
    from retrieval.templates import Pooling, pool_templates

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

    def identify(rows: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> "IdentificationResult":
        return evaluate_identification(
            galleries,
            templates.take(rows),
            ranks=args.ranks,
            fpirs=args.fpir.values,
            candidates=args.candidates,
            rule=args.rule,
            resamples=args.resamples,
        )

    result = identify(manifest.probes)
    parts = identification_record(result, fpir_labels=args.fpir)
    if args.condition is not None:
        values = manifest.conditions[args.condition]
        parts["conditions"] = {
            f"{args.condition}={value}": identification_record(
                identify(manifest.probes[values == value]), fpir_labels=args.fpir
            )
            for value in np.unique(values)
        }
    parts["counts"] |= {"samples": len(samples.keys), "missing": collection.missing}
    finish(
        args,
        "templates",
        parts,
        title=str(args.manifest),
        rule=args.rule,
        model=templates.metadata,
        files=manifest.files,
        details=search_details(result.searches, templates.subject_ids[manifest.probes]),
        pooling=f"{pooling}, F{int(templates.metadata.get('flip') == 'sum')}",
    )
    return 0
