"""LFW, CFP, AgeDB, CALFW, CPLFW, VGG2-FP and XQLFW: 10-fold accuracy and TAR of listed pairs.

From an InsightFace .bin (read without running the pickle), or from a list of pairs and images: `name i j` and
`name1 i name2 j` lines as LFW has them, or `file label` lines, two a pair, as CALFW and CPLFW have them. Embeddings
of a .bin are its images in order. These sets are saturated: a check that all is well, not a headline.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import ConfigError
from launch.evaluate_options import add_rule, rates
from launch.evaluate_source import (
    add_out,
    add_similarity,
    add_source,
    finish,
    frozen,
    open_collection,
    quality_name,
)
from retrieval.metrics.rules import PAIR_RULES

if TYPE_CHECKING:
    from retrieval.embeddings import EmbeddingSet
    from retrieval.protocols.lfw_pairs import Pairs

_FARS = "1e-4,1e-3,1e-2"
#: Pairs of the originals.
_PAIRS = dict.fromkeys(("lfw", "agedb_30", "calfw", "cplfw", "xqlfw"), 6000) | {
    "cfp_fp": 7000,
    "cfp_ff": 7000,
    "vgg2_fp": 5000,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    lists = parser.add_mutually_exclusive_group(required=True)
    lists.add_argument("--bin", type=Path, metavar="FILE", help="verification set: .bin, or a saved folder of datasets")
    lists.add_argument("--pairs", type=Path, metavar="FILE", help="list of pairs; with --images, or `keys`")
    parser.add_argument("--max-missing-pairs", type=int, default=0, metavar="N", help="that may be left out")
    add_source(parser, images="folder or archive of name/image.jpg")
    parser.add_argument("--far", type=rates, default=rates(_FARS), metavar="RATE,..", help="FARs")
    add_similarity(parser)
    add_rule(parser, PAIR_RULES)
    add_out(parser, pairs=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    import numpy as np

    from retrieval.details import pair_details
    from retrieval.metrics import evaluate_pairs, pair_scores, wilson
    from retrieval.protocols.lfw_pairs import fold_accuracy
    from retrieval.results import metric, verification_record

    faces, pairs, notes, missing = _from_bin(args) if args.bin is not None else _from_list(args)
    first, second, same = pairs
    scores = pair_scores(faces, first, second, similarity=args.similarity)
    people = np.unique(faces.subject_ids, return_inverse=True)[1]
    result = evaluate_pairs(
        scores,
        same,
        fars=args.far.values,
        rule=args.rule,
        # A .bin does not tell who is who, nor does a folder without folders in it.
        subjects=(people[first], people[second]) if args.bin is None and people.max() > 0 else None,
        resamples=args.resamples,
    )
    parts = verification_record(
        result,
        far_labels=args.far,
        quality=faces.pair_quality(first[same], second[same]),
        quality_name=quality_name(args, faces),
    )
    parts["metrics"] |= frozen(args, genuine=result.genuine, impostor=result.impostor)
    parts["metrics"]["accuracy_best_threshold"] = parts["metrics"].pop("accuracy")
    found, reason = fold_accuracy(scores, same) if args.similarity == "cosine" else (None, "defined on cosines alone")
    parts["metrics"]["accuracy"] = metric(
        None if found is None else found.mean,
        interval=None if found is None else wilson(round(found.mean * len(same)), len(same)),
        reason=reason,
        std=None if found is None else found.std,
        folds=None if found is None else list(found.folds),
    )
    parts["counts"] |= {"missing": missing, "images": int(np.unique(np.concatenate([first, second])).size)}
    parts["warnings"] += notes
    finish(
        args,
        args.entry,
        parts,
        title=args.entry,
        rule=args.rule,
        model=faces.metadata,
        files=_files(args.bin or args.pairs),
        details=pair_details(scores, same, (people[first], people[second])),
        scores=scores,
        similarity=args.similarity,
        expected={"pairs": _PAIRS[args.entry]} if args.entry in _PAIRS else None,
    )
    return 0


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _from_bin(args: argparse.Namespace) -> "tuple[EmbeddingSet, Pairs, list[str], int]":
    import numpy as np

    from retrieval.embedding_files import read_embeddings
    from retrieval.protocols.lfw_pairs import bin_faces, bin_pairs
    from retrieval.protocols.pair_sets import read_pair_set

    if args.quality is not None:
        raise ConfigError(f"--quality {args.quality} names images, and a .bin has no names; give --pairs and --images.")
    content = read_pair_set(args.bin)
    pairs = bin_pairs(content)
    if args.embeddings is not None:
        faces = read_embeddings(args.embeddings)
        if len(faces) != len(content.images):
            raise ConfigError(
                f"{args.embeddings} has {len(faces)} rows, {args.bin} {len(content.images)} images; a row is an image "
                "of the .bin, in its order."
            )
        return faces, pairs, [], int((~faces.enrolled).sum())
    from launch.embedders import open_embedder
    from launch.progress import Progress
    from retrieval.extraction import embed_face_set

    embedder = open_embedder(args.model, threads=args.threads, batch_size=args.batch)
    with Progress("Embed", total=len(content.images), unit="images") as progress:
        found = embed_face_set(
            embedder, bin_faces(content), flip=args.flip, batch_size=args.batch, on_progress=progress.update
        )
    return found.embeddings, pairs, [], int(np.count_nonzero(~found.embeddings.enrolled))


def _from_list(args: argparse.Namespace) -> "tuple[EmbeddingSet, Pairs, list[str], int]":
    import numpy as np

    from retrieval.protocols.collection import natural_embeddings
    from retrieval.protocols.lfw_pairs import is_list_of_files, read_file_pairs, read_lfw_pairs

    with ExitStack() as stack:
        collection = open_collection(args, stack)
        keys = list(collection.keys)
        identities = [key.rpartition("/")[0].rpartition("/")[2] for key in keys]
        notes: list[str] = []
        if is_list_of_files(args.pairs):
            pairs = read_file_pairs(args.pairs, keys=keys)
        else:
            pairs, notes = read_lfw_pairs(
                args.pairs, keys=keys, identities=identities, max_missing=args.max_missing_pairs
            )
        used, places = np.unique(np.concatenate([pairs[0], pairs[1]]), return_inverse=True)
        names = np.array(keys)[used]
        faces = natural_embeddings(collection, names, np.array(identities)[used], name=str(args.pairs))
    half = len(pairs[0])
    return faces, (places[:half], places[half:], pairs[2]), notes, collection.missing
