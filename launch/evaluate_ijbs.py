"""IJB-S: surveillance and UAV videos against single images, booking images and other videos.

--protocol holds cs6_metadata.csv, the probe lists and galleries/. Samples are SUBJECT/videos_VIDEO_FRAME.jpg and
SUBJECT/img_ID.jpg; a frame that is not there was not detected. Samples are averaged with their norm (N1), without a
media level, as in the published tables. Closed set: both galleries as one; open set: each on its own, then the mean.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_options import add_rule, positive, rates
from launch.evaluate_source import add_out, add_pooling, add_similarity, add_source, finish, frozen, open_collection

_FPIRS = "0.01,0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from retrieval.protocols.ijbs import EXPERIMENTS

    parser.add_argument("--task", choices=tuple(EXPERIMENTS), required=True, help="which of the five")
    parser.add_argument("--protocol", type=Path, required=True, metavar="DIR", help="folder of the csv files")
    parser.add_argument(
        "--all-videos", action="store_true", help="multi-view: every video of a subject, as public code does"
    )
    add_source(parser, images="folder of SUBJECT/ folders with aligned faces")
    add_pooling(parser, "N1D0")
    parser.add_argument("--fpir", type=rates, default=rates(_FPIRS), metavar="RATE,..", help="FPIRs")
    parser.add_argument("--candidates", type=positive, default=20, metavar="L", help="list length")
    add_device(parser)
    add_similarity(parser)
    add_rule(parser)
    add_out(parser, searches=True)
    parser.set_defaults(flip="none")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    import numpy as np

    from retrieval.details import search_details
    from retrieval.embeddings import concatenate
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.ijbs import COUNTS, read_ijbs
    from retrieval.results import identification_record
    from retrieval.templates import Pooling, pool_templates

    blocks = search_blocks(args)
    pooling = Pooling.parse(args.pooling, media=False)
    with ExitStack() as stack:
        collection = open_collection(args, stack)
        plan = read_ijbs(args.protocol, args.task, collection.keys, all_videos=args.all_videos)
        samples = plan.samples
        chunks = collection.chunks(samples.keys, samples.stream_order())
        templates = pool_templates(samples, chunks, pooling, name="IJB-S")
    one, two, probes = (templates.take(np.array(rows, np.int64)) for rows in (*plan.galleries, plan.probes))
    settings: dict[str, Any] = {
        "ranks": (1, 5, 10),
        "fpirs": args.fpir.values,
        "candidates": args.candidates,
        "rule": args.rule,
        "similarity": args.similarity,
        "resamples": args.resamples,
        "blocks": blocks,
    }
    closed = evaluate_identification([concatenate([one, two])], probes, **settings)
    opened = evaluate_identification([one, two], probes, **settings)
    parts = identification_record(opened, fpir_labels=args.fpir)
    of_both = identification_record(closed, fpir_labels=args.fpir)
    parts["metrics"] |= {key: entry for key, entry in of_both["metrics"].items() if key.startswith("rank_")}
    parts["metrics"] |= frozen(args, searches=opened.searches)
    parts["curves"] |= {"cmc": of_both["curves"]["cmc"]}
    parts["counts"] |= plan.counts | {
        "mated": closed.num_mated,
        "gallery_1": len(one),
        "gallery_2": len(two),
        "samples": len(samples.keys),
        "missing": collection.missing,
        "fte_samples": len(samples.keys) - int(templates.metadata["samples_used"]),
    }
    finish(
        args,
        f"ijbs-{args.task}",
        parts,
        title=f"IJB-S, {args.task.replace('_', ' ')}",
        rule=args.rule,
        model=templates.metadata,
        files=plan.files,
        expected=COUNTS,
        details=search_details(closed.searches, probes.subject_ids),
        searched=((one, two), probes),
        similarity=args.similarity,
        pooling=f"{pooling}, F{int(templates.metadata.get('flip') == 'sum')}",
    )
    return 0
