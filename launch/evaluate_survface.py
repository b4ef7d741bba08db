"""QMUL-SurvFace: open-set identification (TPIR within 20 candidates at FPIR 30, 20, 10, 1 %) and verification.

--root holds Face_Identification_Test_Set (gallery, mated_probe, unmated_probe and two .mat lists) or
Face_Verification_Test_Set (two .mat lists of pairs). A gallery template is the mean of the unit embeddings of an
identity.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluate_options import rates
from launch.evaluate_source import add_out, add_source, finish, open_collection

if TYPE_CHECKING:
    from retrieval.protocols.collection import Collection

#: Parts of the record, metadata of the model, files, and arrays for --details.
_Found = tuple[dict[str, Any], Any, tuple[Path, ...], dict[str, Any]]
_FARS = "0.3,0.1,0.01,0.001"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--task", choices=("identification", "verification"), default="identification", help="%(default)s"
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the .mat lists")
    parser.add_argument(
        "--image-gallery", action="store_true", help="every gallery image for itself, ranks by identity"
    )
    add_source(parser, images="folder with gallery/, mated_probe/ and unmated_probe/, or the verification images")
    add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    with ExitStack() as stack:
        collection = open_collection(args, stack)
        evaluate = _identify if args.task == "identification" else _verify
        parts, model, files, details = evaluate(args, collection)
    parts["counts"]["missing"] = collection.missing
    finish(
        args,
        f"survface-{args.task}",
        parts,
        title=f"SurvFace, {args.task}",
        rule="canonical",
        model=model,
        files=files,
        details=details,
    )
    return 0


def _identify(args: argparse.Namespace, collection: "Collection") -> _Found:
    import numpy as np

    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.survface import FPIRS, LIST_LENGTH, read_survface, survface_samples
    from retrieval.results import identification_record
    from retrieval.templates import Pooling, pool_templates

    lists = read_survface(args.root)
    samples, count = survface_samples(lists, collection, image_gallery=args.image_gallery)
    chunks = collection.chunks(samples.keys, samples.stream_order())
    templates = pool_templates(samples, chunks, Pooling(keep_norm=False, media=False), name="SurvFace")
    rows = np.arange(len(templates))
    gallery, probes = templates.take(rows[:count]), templates.take(rows[count:])
    result = evaluate_identification(
        [gallery],
        probes,
        fpirs=[float(rate) for rate in FPIRS],
        candidates=LIST_LENGTH,
        rank_level="identity" if args.image_gallery else "entry",
        resamples=args.resamples,
    )
    parts = identification_record(result, fpir_labels=FPIRS)
    parts["counts"]["gallery"] = count
    return parts, templates.metadata, lists.files, search_details(result.searches, probes.subject_ids)


def _verify(args: argparse.Namespace, collection: "Collection") -> _Found:
    import numpy as np

    from retrieval.details import pair_details
    from retrieval.metrics import area_under_roc, evaluate_pairs, pair_scores
    from retrieval.protocols.collection import natural_embeddings
    from retrieval.protocols.survface import read_survface_pairs
    from retrieval.results import metric, verification_record

    left, right, same, files = read_survface_pairs(args.root)
    names = {key.rpartition("/")[2]: key for key in collection.keys}
    distinct, places = np.unique(np.array([*left, *right]), return_inverse=True)
    keys = np.array([names.get(name, name) for name in distinct.tolist()])
    faces = natural_embeddings(collection, keys, np.zeros(len(keys), np.int64), name="SurvFace")
    scores = pair_scores(faces, places[: len(left)], places[len(left) :])
    labels = rates(_FARS)
    result = evaluate_pairs(scores, same, fars=labels.values)
    parts = verification_record(result, far_labels=labels)
    parts["metrics"]["auc"] = metric(area_under_roc(result.genuine, result.impostor))
    sides = places[: len(left)], places[len(left) :]  # every image for itself: the lists name no people
    return parts, faces.metadata, files, pair_details(scores, same, sides)
