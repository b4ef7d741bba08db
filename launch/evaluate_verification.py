"""1:1 comparison of listed pairs of an embedding file: TAR at FAR, error-versus-discard, accuracy.

The quality of a pair is the smaller of its two sides: `qualities` of the file, or the norms.
"""

import argparse
from pathlib import Path

from launch.evaluate_options import add_rule, rates
from launch.evaluate_source import add_out, add_similarity, finish, frozen, quality_name
from retrieval.metrics.rules import PAIR_RULES

_DEFAULT_FARS = "1e-6,1e-5,1e-4,1e-3,1e-2,1e-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="embedding file")
    parser.add_argument("--pairs", type=Path, required=True, metavar="PAIRS.csv", help="index_a,index_b,label")
    parser.add_argument(
        "--far", type=rates, default=rates(_DEFAULT_FARS), metavar="RATE,..", help=f"FARs ({_DEFAULT_FARS})"
    )
    parser.add_argument("--alignment", metavar="ID", help="how the crops were aligned, kept in the result")
    add_similarity(parser)
    add_rule(parser, PAIR_RULES)
    add_out(parser, pairs=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    import numpy as np

    from retrieval.details import pair_details
    from retrieval.embedding_files import read_embeddings
    from retrieval.metrics import evaluate_pairs, pair_scores
    from retrieval.pairs import read_index_pairs
    from retrieval.results import verification_record

    embeddings = read_embeddings(args.embeddings)
    first, second, same = read_index_pairs(args.pairs, num_rows=len(embeddings))
    people = np.unique(embeddings.subject_ids, return_inverse=True)[1]
    sides = people[first], people[second]
    scores = pair_scores(embeddings, first, second, similarity=args.similarity)
    result = evaluate_pairs(
        scores, same, fars=args.far.values, rule=args.rule, subjects=sides, resamples=args.resamples
    )
    parts = verification_record(
        result,
        far_labels=args.far,
        quality=embeddings.pair_quality(first[same], second[same]),
        quality_name=quality_name(args, embeddings),
    )
    parts["metrics"] |= frozen(args, genuine=result.genuine, impostor=result.impostor)
    finish(
        args,
        "verification",
        parts,
        title="Verification",
        rule=args.rule,
        model=embeddings.metadata,
        files=[args.pairs],
        details=pair_details(scores, same, sides),
        scores=scores,
        similarity=args.similarity,
    )
    return 0
