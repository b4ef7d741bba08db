"""QMUL-SurvFace: open-set identification (TPIR within 20 candidates at FPIR 30, 20, 10, 1 %) and verification.

--root holds Face_Identification_Test_Set (gallery, mated_probe, unmated_probe and two .mat lists) or
Face_Verification_Test_Set (two .mat lists of pairs). A gallery template is the mean of the unit embeddings of an
identity.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_options import rates, refuse_options
from launch.evaluate_source import RESAMPLES, add_out, add_source, finish, frozen, open_collection, quality_name

if TYPE_CHECKING:
    from retrieval.metrics import GallerySearch
    from retrieval.protocols.collection import Collection

#: Parts of the record, metadata of the model, files, and more for `finish`.
_Found = tuple[dict[str, Any], Any, tuple[Path, ...], dict[str, Any]]
_FARS = "0.3,0.1,0.01,0.001"
#: Options that one of the tasks uses.
_USED_BY = {
    "save_scores": ("verification",),
    **dict.fromkeys(("save_candidates", "image_gallery", "resamples", "device"), ("identification",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--task", choices=("identification", "verification"), default="identification", help="what is evaluated"
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the .mat lists")
    parser.add_argument(
        "--image-gallery", action="store_true", help="every gallery image for itself, ranks by identity"
    )
    add_device(parser)
    add_source(parser, images="folder with gallery/, mated_probe/ and unmated_probe/, or the verification images")
    add_out(parser, pairs=True, searches=True)
    parser.set_defaults(resamples=None)  # the lists of pairs name no people: nothing to resample


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    refuse_options(args, _USED_BY)
    search_blocks(args)  # before the images are embedded
    with ExitStack() as stack:
        collection = open_collection(args, stack)
        evaluate = _identify if args.task == "identification" else _verify
        parts, model, files, saved = evaluate(args, collection)
    parts["counts"]["missing"] = collection.missing
    finish(
        args,
        f"survface-{args.task}",
        parts,
        title=f"SurvFace, {args.task}",
        rule="canonical",
        model=model,
        files=files,
        **saved,
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
    samples, count = survface_samples(lists, collection.keys, image_gallery=args.image_gallery)
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
        resamples=RESAMPLES if args.resamples is None else args.resamples,
        blocks=search_blocks(args),
    )
    parts = identification_record(result, fpir_labels=FPIRS)
    parts["metrics"]["auc_tpir_l"] = _area(result.searches[0], LIST_LENGTH)
    parts["metrics"] |= frozen(args, searches=result.searches)
    parts["counts"]["gallery"] = count
    saved = {"details": search_details(result.searches, probes.subject_ids), "searched": ([gallery], probes)}
    return parts, templates.metadata, lists.files, saved


def _area(search: "GallerySearch", listed: int) -> dict[str, Any]:
    """Area under TPIR (within the list) against FPIR: a miss is found at no threshold."""
    from retrieval.metrics import area_under_roc
    from retrieval.results import metric

    mated, strangers = search.mated_best, search.non_mated_best
    found = mated[search.rank[search.is_mated] <= listed]
    if not len(found) or not len(strangers):
        return metric(None, reason="no stranger, or nobody found within the list")
    return metric(area_under_roc(found, strangers) * len(found) / len(mated))


def _verify(args: argparse.Namespace, collection: "Collection") -> _Found:
    import numpy as np

    from retrieval.details import pair_details
    from retrieval.metrics import area_under_roc, evaluate_pairs, pair_scores
    from retrieval.protocols.collection import natural_embeddings
    from retrieval.protocols.survface import PAIR_COUNTS, read_survface_pairs
    from retrieval.results import metric, verification_record

    left, right, same, files = read_survface_pairs(args.root)
    names = {key.rpartition("/")[2]: key for key in collection.keys}
    distinct, places = np.unique(np.array([*left, *right]), return_inverse=True)
    keys = np.array([names.get(name, name) for name in distinct.tolist()])
    faces = natural_embeddings(collection, keys, np.zeros(len(keys), np.int64), name="SurvFace")
    scores = pair_scores(faces, places[: len(left)], places[len(left) :])
    labels = rates(_FARS)
    sides = places[: len(left)], places[len(left) :]  # every image for itself: the lists name no people
    result = evaluate_pairs(scores, same, fars=labels.values)
    quality = faces.pair_quality(sides[0][same], sides[1][same])
    parts = verification_record(result, far_labels=labels, quality=quality, quality_name=quality_name(args, faces))
    parts["metrics"] |= frozen(args, genuine=result.genuine, impostor=result.impostor)
    parts["metrics"]["auc"] = metric(area_under_roc(result.genuine, result.impostor))
    saved = {"details": pair_details(scores, same, sides), "scores": scores, "expected": PAIR_COUNTS}
    return parts, faces.metadata, files, saved
