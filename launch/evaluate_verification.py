"""1:1 comparison of listed pairs of rows of one embedding file: TAR at FAR, with intervals over subjects.

PAIRS is a CSV file with the header index_a,index_b,label; label 1 is a genuine pair, 0 an impostor pair.
"""

import argparse
from pathlib import Path

from launch.evaluate_options import add_rule, print_record, rates
from retrieval.metrics.rules import PAIR_RULES

_DEFAULT_FARS = "1e-6,1e-5,1e-4,1e-3,1e-2,1e-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="embedding file")
    parser.add_argument("--pairs", type=Path, required=True, metavar="PAIRS.csv", help="index_a,index_b,label")
    parser.add_argument(
        "--far", type=rates, default=rates(_DEFAULT_FARS), metavar="RATE,..", help=f"FARs ({_DEFAULT_FARS})"
    )
    add_rule(parser, PAIR_RULES)
    parser.add_argument("--out", type=Path, required=True, metavar="R.json", help="result file")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.embedding_files import read_embeddings
    from retrieval.metrics import evaluate_verification
    from retrieval.pairs import read_index_pairs
    from retrieval.results import file_hashes, result_record, verification_record, write_result

    embeddings = read_embeddings(args.embeddings)
    pairs = read_index_pairs(args.pairs, num_rows=len(embeddings))
    result = evaluate_verification(embeddings, pairs, fars=args.far.values, rule=args.rule)
    parts = verification_record(result, far_labels=args.far)
    inputs = {"files": file_hashes([args.embeddings, args.pairs]), "model": dict(embeddings.metadata)}
    record = result_record("verification", args.rule, **parts, inputs=inputs)
    write_result(args.out, record)
    print_record(record, title="Verification")
    return 0
