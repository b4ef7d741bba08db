"""TinyFace: 3,728 tiny probes among 157,871 gallery images, closed set; Rank-k and mAP.

--lists holds gallery_match_img_ID_pairs.mat and probe_img_ID_pairs.mat. Images lie in Probe/, Gallery_Match/ and
Gallery_Distractor/, as in Testing_Set of the original or in an aligned copy; embeddings are keyed by these paths. An
image that is missing is a miss. Every probe has a mate, so that there is no open-set rate.

The official variant: --flip none on Testing_Set (Euclidean distance ranks unit features as the cosine does). That of
AdaFace and ARoFace: the aligned folder, mirror images added.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_source import add_out, add_similarity, add_source, finish, open_collection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--lists", type=Path, required=True, metavar="DIR", help="folder of the two .mat files")
    add_source(parser, images="folder with Probe/, Gallery_Match/ and Gallery_Distractor/")
    add_device(parser)
    add_similarity(parser)
    add_out(parser, searches=True, thresholds=False)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.tinyface import COUNTS, RANKS, embed_tinyface, read_tinyface_lists
    from retrieval.results import identification_record

    blocks = search_blocks(args)
    lists = read_tinyface_lists(args.lists)
    with ExitStack() as stack:
        collection = open_collection(args, stack)
        gallery, probes = embed_tinyface(lists, collection)
    result = evaluate_identification(
        [gallery],
        probes,
        ranks=RANKS,
        fpirs=(),
        similarity=args.similarity,
        with_average_precision=True,
        resamples=args.resamples,
        blocks=blocks,
    )
    parts = identification_record(result, fpir_labels=())
    parts["counts"] |= {
        "gallery_match": len(lists.matches),
        "distractors": len(gallery) - len(lists.matches),
        "missing": collection.missing,
    }
    model = dict(probes.metadata)
    finish(
        args,
        "tinyface",
        parts,
        title="TinyFace",
        rule="canonical",
        model=model,
        files=lists.files,
        expected=COUNTS,
        details=search_details(result.searches, probes.subject_ids),
        searched=([gallery], probes),
        similarity=args.similarity,
    )
    return 0
