"""1:N search on embedding files: one embedding a template, cosine, ties counted against the probe.

Closed set (CMC) and open set (TPIR at FPIR, at rank 1 and within the candidate list). With a second gallery all probes
search both: ranks are pooled, open-set rates are formed per gallery and averaged.
"""

import argparse
from pathlib import Path

from launch.evaluate_options import add_rule, counts, positive, print_record, rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--gallery", type=Path, required=True, metavar="G.npz", help="gallery templates")
    parser.add_argument("--gallery-2", type=Path, metavar="G2.npz", help="second gallery, searched on its own")
    parser.add_argument("--probes", type=Path, required=True, metavar="P.npz", help="probe templates")
    parser.add_argument("--ranks", type=counts, default=[1, 5, 10, 20], metavar="K,..", help="ranks (1,5,10,20)")
    parser.add_argument(
        "--fpir", type=rates, default=rates("0.001,0.01,0.1"), metavar="RATE,..", help="FPIRs (0.001,0.01,0.1)"
    )
    parser.add_argument("--candidates", type=positive, default=20, metavar="L", help="list length (%(default)s)")
    parser.add_argument(
        "--rank-level",
        choices=("entry", "identity"),
        default="entry",
        help="rivals: every gallery entry, or every identity by its best entry (%(default)s)",
    )
    add_rule(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.embedding_files import read_embeddings
    from retrieval.metrics import evaluate_identification
    from retrieval.results import file_hashes, identification_record, result_record, write_result

    paths = [path for path in (args.gallery, args.gallery_2, args.probes) if path]
    *galleries, probes = (read_embeddings(path) for path in paths)
    result = evaluate_identification(
        galleries,
        probes,
        ranks=args.ranks,
        fpirs=args.fpir.values,
        candidates=args.candidates,
        rank_level=args.rank_level,
        rule=args.rule,
    )
    parts = identification_record(result, fpir_labels=args.fpir)
    inputs = {"files": file_hashes(paths), "model": dict(probes.metadata)}
    record = result_record("identification", args.rule, **parts, inputs=inputs)
    write_result(args.out, record)
    print_record(record, title="Identification")
    return 0
