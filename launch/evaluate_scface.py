"""SCface: surveillance cameras at 4.20, 2.60 and 1.00 m against mugshots; Rank-1 per distance and their mean.

Files are NNN_frontal.jpg and NNN_camC_D.jpg (cameras 1 to 5). --subjects takes a list of subject numbers, such as the
80 that are left for the test when 50 were used for fine-tuning: another track than all 130.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from launch.evaluate_source import add_out, add_source, finish, open_collection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--subjects", type=Path, metavar="FILE", help="subject numbers, one a line (default: all)")
    add_source(parser, images="folder of aligned faces, of any depth")
    add_out(parser, thresholds=False)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    import numpy as np

    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.collection import natural_embeddings
    from retrieval.protocols.scface import DISTANCES_M, expected_counts, find_scface, read_subjects
    from retrieval.results import identification_record, metric

    subjects = read_subjects(args.subjects) if args.subjects is not None else None
    with ExitStack() as stack:
        collection = open_collection(args, stack)
        files = find_scface(collection.keys, subjects=subjects)
        gallery, *probes = (
            natural_embeddings(
                collection, np.array([key for key, _ in rows]), np.array([s for _, s in rows]), name=f"SCface {name}"
            )
            for name, rows in (("mugshots", files.gallery), *((f"distance {d}", r) for d, r in files.probes.items()))
            if rows
        )
    conditions = {}
    values, found_details = [], []
    for distance, found in zip([d for d, rows in files.probes.items() if rows], probes, strict=True):
        result = evaluate_identification([gallery], found, fpirs=(), resamples=args.resamples)
        conditions[f"d{distance}"] = identification_record(result, fpir_labels=()) | {
            "description": f"{DISTANCES_M[distance]:.2f} m"
        }
        values.append(result.ranks[0][1])
        found_details.append(search_details(result.searches, found.subject_ids))
    details = {key: np.concatenate([part[key] for part in found_details]) for key in found_details[0]}
    metrics = {f"rank_1@{name}": entry["metrics"]["rank_1"] for name, entry in conditions.items()}
    metrics["rank_1_mean"] = metric(float(np.mean([v for v in values if v is not None])))
    counts = {"gallery": len(gallery), "probes": sum(map(len, probes)), "missing": collection.missing}
    counts |= {f"probes_d{distance}": len(rows) for distance, rows in files.probes.items()}
    finish(
        args,
        "scface",
        {"counts": counts, "metrics": metrics, "conditions": conditions},
        title="SCface",
        rule="canonical",
        model=gallery.metadata,
        details=details,
        expected=expected_counts(subjects),
        files=[args.subjects] if args.subjects is not None else [],
    )
    return 0
