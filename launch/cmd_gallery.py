"""Build, change, calibrate, search and inspect a gallery of enrolled faces.

Embeddings come from files that `aroface embed` writes. The key of an image is its entry id. Every change of a directory
replaces the whole gallery at once: a crash leaves the old one or the new one. On Milvus a change of many rows is not
one transaction. Scores are cosines. docs/galleries.md tells which kind of index to choose, and what it costs.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from launch.console import new_table, show
from launch.evaluate_options import finite, positive, rate, rates
from launch.gallery_options import add_device, add_gallery, milvus_token, open_gallery
from launch.outputs import output_file

if TYPE_CHECKING:
    from aroface.contract import InputContract
    from retrieval.embeddings import EmbeddingSet
    from retrieval.gallery import Candidate, FaceGallery, Gallery, IndexWish

_KINDS = ("flat", "fp16", "sq8", "pq", "ivf", "ivf-fp16", "ivf-sq8", "ivf-pq", "hnsw", "hnsw-fp16", "hnsw-sq8")
_LEVELS = ("entry", "subject", "pooled")
_SHOWN_PROBES = 10

logger = logging.getLogger(__name__)


class _Model(TypedDict):
    model_id: str | None
    contract: "InputContract | None"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = _action(actions, "build", "make a gallery from an embedding file or a folder of parts")
    build.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="who is enrolled")
    _add_index(build, "flat")
    build.add_argument("--replace", action="store_true", help="take the place of an existing gallery")
    add = _action(actions, "add", "enrol more")
    add.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="who is added")
    add.add_argument("--upsert", action="store_true", help="replace entries whose id is enrolled already")
    remove = _action(actions, "remove", "remove entries or subjects")
    remove.add_argument("--subject", action="append", default=[], metavar="S", help="all entries of S (repeatable)")
    remove.add_argument("--entry", action="append", default=[], metavar="E", help="entry E (repeatable)")
    compact = _action(actions, "compact", "join small segments and make the index anew, or another one")
    _add_index(compact, None)
    calibrate = _action(actions, "calibrate", "find thresholds for false-positive identification rates")
    calibrate.add_argument("--probes", type=Path, required=True, metavar="P.npz", help="strangers, and maybe mates")
    calibrate.add_argument("--fpir", type=rates, default=rates("0.001,0.01,0.1"), metavar="F,...", help="wanted rates")
    calibrate.add_argument("--level", choices=_LEVELS, default="entry", help="what a candidate is")
    _add_search(_action(actions, "search", "candidate lists of probes"))
    info = _action(actions, "info", "what a gallery holds")
    info.add_argument("--entries", action="store_true", help="list every entry, its subject and its norm (directory)")


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    add_gallery(parser)
    return parser


def _add_index(parser: argparse.ArgumentParser, default: str | None) -> None:
    text = "how to search; flat is exact" + ("" if default else " (default: as before)")
    parser.add_argument("--index", choices=_KINDS, default=default, help=text)
    parser.add_argument("--recall", type=rate, default=0.98, metavar="R", help="recall@1 to reach")
    parser.add_argument("--recall-probes", type=Path, metavar="P.npz", help="measure it with these, not drawn probes")
    parser.add_argument(
        "--recall-sample", type=positive, default=4000, metavar="N", help="probes that recall is measured with"
    )


def _add_search(search: argparse.ArgumentParser) -> None:
    search.add_argument("--probes", type=Path, required=True, metavar="P.npz", help="whom to look for")
    search.add_argument("--top", type=positive, default=5, metavar="K", help="length of the lists")
    search.add_argument("--all", action="store_true", help="every candidate above the threshold, in place of --top")
    search.add_argument(
        "--level",
        choices=_LEVELS,
        default="entry",
        help="list entries, subjects by their best entry, or subjects by their pooled template",
    )
    limit = search.add_mutually_exclusive_group()
    limit.add_argument("--threshold", type=finite, metavar="T", help="only candidates that score higher")
    limit.add_argument("--fpir", type=rate, metavar="F", help="the calibrated threshold of this rate")
    search.add_argument(
        "--templates",
        choices=("best", "pooled"),
        help="search the probes of one template (template_ids of the file) together: the best score of each, or fused",
    )
    search.add_argument(
        "--where",
        metavar="FILTER",
        help="only entries that match a filter of Milvus over entry_id, subject_id, norm and number, such as "
        """'subject_id like "dept-7/%%"' (with --milvus only)""",
    )
    add_device(search)
    search.add_argument("--out", type=output_file, metavar="R.json", help="all candidate lists as JSON")


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    actions = {
        "build": _build,
        "add": _add,
        "remove": _remove,
        "compact": _compact,
        "calibrate": _calibrate,
        "search": _search,
        "info": _info,
    }
    actions[args.action](args)
    return 0


def _build(args: argparse.Namespace) -> None:
    from itertools import chain

    from retrieval.embedding_files import iterate_embeddings
    from retrieval.gallery import Gallery, MilvusGallery

    parts = iterate_embeddings(args.embeddings)
    first = next(parts)
    usable = _usable(chain([first], parts), args.embeddings)
    if args.milvus:
        made: FaceGallery = MilvusGallery.build_from(
            args.gallery,
            usable,
            collection=args.collection,
            index=_wish(args, args.index),
            consistency=args.consistency,
            token=milvus_token(),
            replace=args.replace,
            **_model(first),
        )
    else:
        made = Gallery.build_from(
            Path(args.gallery), usable, index=_wish(args, args.index), replace=args.replace, **_model(first)
        )
    print(_summary(made))


def _add(args: argparse.Namespace) -> None:
    enrolled = _read_enrolled(args.embeddings)
    gallery = open_gallery(args)
    changed = gallery.add(
        enrolled.embeddings, enrolled.subject_ids, enrolled.keys, upsert=args.upsert, **_model(enrolled)
    )
    print(_summary(changed))


def _remove(args: argparse.Namespace) -> None:
    from aroface.errors import ConfigError

    if not args.subject and not args.entry:
        raise ConfigError("nothing to remove: name entries with --entry or subjects with --subject.")
    print(_summary(open_gallery(args).remove(entry_ids=args.entry, subject_ids=args.subject)))


def _compact(args: argparse.Namespace) -> None:
    gallery = _local(args)
    print(_summary(gallery.compact(_wish(args, args.index or gallery.manifest.index))))


def _calibrate(args: argparse.Namespace) -> None:
    from retrieval.embedding_files import read_embeddings

    gallery = open_gallery(args)
    probes = read_embeddings(args.probes)
    gallery.check_model(**_model(probes))
    if failed := int((~probes.enrolled).sum()):
        logger.warning("%s: %d rows failed to enrol; they count, as no alarm or as a miss.", args.probes, failed)
    _print_calibration(gallery.calibrate(probes, args.fpir.values, level=args.level))


def _search(args: argparse.Namespace) -> None:
    from aroface.files import write_json

    _check_where(args)
    gallery = open_gallery(args, device=args.device)
    probes = _read_enrolled(args.probes)
    threshold = _threshold(args, gallery)
    names, found = _found(args, gallery, probes, threshold)
    subjects = {} if args.templates else dict(zip(names, map(str, probes.subject_ids), strict=True))
    if args.out:
        searches = [
            {
                "probe": name,
                "subject_id": subjects.get(name),
                "candidates": [c._asdict() | {"fpir": _fpir(args, gallery, c.score)} for c in candidates],
            }
            for name, candidates in zip(names, found, strict=True)
        ]
        head = {"gallery": gallery.info.name, "top": None if args.all else args.top, "level": args.level}
        head |= {"templates": args.templates, "where": args.where, "threshold": threshold}
        write_json(args.out, {**head, "searches": searches})
    _print_candidates(args, gallery, names, found)


def _check_where(args: argparse.Namespace) -> None:
    from aroface.errors import ConfigError

    if args.where is None:
        return
    if not args.milvus:
        raise ConfigError(
            f"--where {args.where!r} is a filter of Milvus, and {args.gallery} is a directory, which has none. Leave "
            "it away, or search a gallery of Milvus (--milvus)."
        )
    other = next((name for name, value in (("--templates", args.templates), ("--all", args.all)) if value), None)
    if other is not None:
        raise ConfigError(f"--where gives lists of --top candidates of single probes; leave {other} away.")


def _found(
    args: argparse.Namespace, gallery: "FaceGallery", probes: "EmbeddingSet", threshold: float | None
) -> "tuple[list[str], list[list[Candidate]]]":
    """Names of the searches and their candidates."""
    from aroface.errors import ConfigError, DataError
    from retrieval.gallery import MilvusGallery

    model = _model(probes)
    if args.templates:
        if probes.template_ids is None:
            raise DataError(f"{args.probes} has no template_ids; leave --templates away, or add that column.")
        if args.all:
            raise ConfigError("--templates gives lists of --top candidates; leave --all away.")
        lists = gallery.search_templates(
            *(probes.embeddings, probes.template_ids),
            top=args.top,
            fusion=args.templates,
            level=args.level,
            threshold=threshold,
            **model,
        )
        return list(lists), list(lists.values())
    names = [str(name) for name in (probes.keys if probes.keys is not None else range(len(probes)))]
    if args.where is not None and isinstance(gallery, MilvusGallery):
        return names, gallery.search_where(
            *(probes.embeddings, args.where), top=args.top, level=args.level, threshold=threshold, **model
        )
    if not args.all:
        return names, gallery.search(probes.embeddings, top=args.top, level=args.level, threshold=threshold, **model)
    if threshold is None:
        raise ConfigError("--all lists every candidate above a threshold; give --threshold or --fpir.")
    return names, gallery.search_range(probes.embeddings, threshold=threshold, level=args.level, **model)


def _threshold(args: argparse.Namespace, gallery: "FaceGallery") -> float | None:
    from aroface.errors import ConfigError

    if args.fpir is None:
        return None if args.threshold is None else float(args.threshold)
    if args.templates:
        raise ConfigError(
            f"--fpir {args.fpir:g} holds for single probes, not for several searched together (--templates "
            f"{args.templates}). Give a --threshold, or leave --templates away."
        )
    points = {point.fpir: point for point in gallery.calibration_at(args.level)}
    if args.fpir not in points:
        known = ", ".join(f"{point.fpir:g} ({point.level})" for point in gallery.info.calibration) or "none"
        raise ConfigError(
            f"--fpir {args.fpir:g}: the gallery is not calibrated for it at --level {args.level} (calibrated: {known}; "
            "entry and subject share theirs, pooled has its own). Run `aroface gallery calibrate --level "
            f"{args.level}`."
        )
    for doubt in points[args.fpir].doubts(len(gallery)):
        logger.warning("--fpir %g is uncertain: %s. Calibrate again, with more strangers.", args.fpir, doubt)
    return points[args.fpir].threshold


def _fpir(args: argparse.Namespace, gallery: "FaceGallery", score: float) -> float | None:
    """The calibrated rate of a score; None for probes searched together, which no calibration covers."""
    return None if args.templates else gallery.fpir_of(score, args.level)


def _info(args: argparse.Namespace) -> None:
    gallery = _local(args) if args.entries else open_gallery(args)
    info = gallery.info
    print(_summary(gallery))
    print(f"  model       {info.model_id or 'unknown'}")
    if info.contract:
        print(f"  input       {info.contract.image_size} px, {info.contract.colour_order}")
    if info.recall:
        recall = info.recall
        print(f"  recall      @1 {recall.at_1:.4f}, @10 {recall.at_10:.4f} of {recall.probes} probes ({recall.source})")
    if info.how:
        print(f"  index       {info.how}")
    _print_calibration(gallery)
    if not args.milvus:
        _print_state(_local(args), with_entries=args.entries)


def _print_state(gallery: "Gallery", *, with_entries: bool) -> None:
    manifest = gallery.manifest
    print(f"  generation  {manifest.generation}, {len(manifest.segments)} segments, checksums verified")
    if manifest.index_record:
        outside, removed = gallery.outside_index
        print(f"  changes     {outside} entries outside the index, {removed} removed ones still in it")
    if with_entries:
        print("entry\tsubject\tnorm")
        entries = gallery.entries
        for entry, subject, norm in zip(entries.entry_ids, entries.subject_ids, entries.norms, strict=True):
            print(f"{entry}\t{subject}\t{norm:.3f}")


def _print_calibration(gallery: "FaceGallery") -> None:
    count = len(gallery)
    for point in gallery.info.calibration:
        tpir = "" if point.tpir is None else f", TPIR {point.tpir:.4f} of {point.mated}"
        print(
            f"  FPIR {point.fpir:<6g} score > {point.threshold:.4f} ({point.non_mated} strangers{tpir}, {point.level})"
            + "".join(f"; {doubt}" for doubt in point.doubts(count))
        )


def _local(args: argparse.Namespace) -> "Gallery":
    from aroface.errors import ConfigError
    from retrieval.gallery import Gallery

    gallery = open_gallery(args)
    if not isinstance(gallery, Gallery):
        raise ConfigError("compact and info --entries work on a directory; Milvus compacts and lists by itself.")
    return gallery


def _wish(args: argparse.Namespace, kind: Any) -> "IndexWish":
    from retrieval.gallery import IndexWish

    probes = None if args.recall_probes is None else _read_enrolled(args.recall_probes).embeddings
    return IndexWish(kind, args.recall, args.recall_sample, probes)


def _read_enrolled(path: Path) -> "EmbeddingSet":
    """The rows of an embedding file that have an embedding; the others are counted on stderr."""
    from retrieval.embedding_files import read_embeddings

    embeddings = read_embeddings(path)
    return next(_usable([embeddings], path)) if not embeddings.enrolled.all() else embeddings


def _usable(parts: "Iterable[EmbeddingSet]", path: Path) -> "Iterator[EmbeddingSet]":
    """The rows of each part that have an embedding; the others are counted on stderr."""
    from aroface.errors import DataError

    is_empty = True
    for part in parts:
        failed = int((~part.enrolled).sum())
        if failed:
            logger.warning("%s: %d rows failed to enrol and are left out.", part.name, failed)
        if failed < len(part):
            is_empty = False
            yield part.take(part.enrolled) if failed else part
    if is_empty:
        raise DataError(f"{path}: every row failed to enrol; look at the warnings of `aroface embed`.")


def _model(embeddings: "EmbeddingSet") -> _Model:
    return {"model_id": embeddings.metadata.get("model_id"), "contract": embeddings.contract}


def _summary(gallery: "FaceGallery") -> str:
    info = gallery.info
    subjects = "" if info.num_subjects is None else f" of {info.num_subjects} subjects"
    recall = f", recall@1 {info.recall.at_1:.4f}" if info.recall else ""
    return f"{info.name}: {info.count} entries{subjects}, D = {info.dimension}, cosine, index {info.index}{recall}"


def _print_candidates(
    args: argparse.Namespace, gallery: "FaceGallery", names: list[str], found: "list[list[Candidate]]"
) -> None:
    is_calibrated = bool(gallery.calibration_at(args.level)) and not args.templates
    columns = ("probe", "rank", "subject", "entry", "score", *(["FPIR"] if is_calibrated else []))
    table = new_table(*columns, title=f"{len(names)} searches", numbers=("rank", "score"))
    for name, candidates in zip(names[:_SHOWN_PROBES], found[:_SHOWN_PROBES], strict=True):
        for c in candidates:
            line = [name if c.rank == 1 else "", str(c.rank), c.subject_id, c.entry_id, f"{c.score:.4f}"]
            if is_calibrated:
                fpir = _fpir(args, gallery, c.score)
                line.append("" if fpir is None else f"{fpir:g}")
            table.add_row(*line)
        if not candidates:
            table.add_row(name, "", "nobody", "", "")
        table.add_section()
    if len(names) > _SHOWN_PROBES:
        table.caption = f"{len(names) - _SHOWN_PROBES} more; --out writes all"
    show(table)
