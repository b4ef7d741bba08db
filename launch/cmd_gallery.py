"""Build, change, search and inspect a gallery of enrolled faces.

Embeddings come from files that `aroface embed` writes. The key of an image is its entry id. Every change replaces the
whole gallery at once: a crash leaves the old one or the new one. Scores are cosines.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from launch.evaluate_options import positive

if TYPE_CHECKING:
    from aroface.contract import InputContract
    from retrieval.embeddings import EmbeddingSet
    from retrieval.gallery import Candidate, Gallery

_SHOWN_PROBES = 10


class _Model(TypedDict):
    model_id: str | None
    contract: "InputContract | None"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = _action(actions, "build", "make a gallery from an embedding file")
    build.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="who is enrolled")
    build.add_argument("--index", choices=("flat",), default="flat", help="flat compares with all (%(default)s)")
    build.add_argument("--replace", action="store_true", help="take the place of an existing gallery")
    add = _action(actions, "add", "enrol more")
    add.add_argument("--embeddings", type=Path, required=True, metavar="E.npz", help="who is added")
    remove = _action(actions, "remove", "remove entries or subjects")
    remove.add_argument("--subject", action="append", default=[], metavar="S", help="all entries of S (repeatable)")
    remove.add_argument("--entry", action="append", default=[], metavar="E", help="entry E (repeatable)")
    search = _action(actions, "search", "candidate lists of probes")
    search.add_argument("--probes", type=Path, required=True, metavar="P.npz", help="whom to look for")
    search.add_argument("--top", type=positive, default=5, metavar="K", help="length of the lists (%(default)s)")
    search.add_argument(
        "--level",
        choices=("entry", "subject"),
        default="entry",
        help="list entries, or each subject once by its best entry (%(default)s)",
    )
    search.add_argument("--out", type=Path, metavar="R.json", help="all candidate lists as JSON")
    info = _action(actions, "info", "what a gallery holds")
    info.add_argument("--entries", action="store_true", help="list every entry, its subject and its norm")


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("gallery", type=Path, metavar="GALLERY", help="directory of the gallery")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    match args.action:
        case "build":
            _build(args)
        case "add":
            _add(args)
        case "remove":
            _remove(args)
        case "search":
            _search(args)
        case "info":
            _info(args)
    return 0


def _build(args: argparse.Namespace) -> None:
    from retrieval.gallery import Gallery

    enrolled = _read_enrolled(args.embeddings)
    gallery = Gallery.build(
        args.gallery,
        enrolled.embeddings,
        enrolled.subject_ids,
        enrolled.keys,
        index=args.index,
        replace=args.replace,
        **_model(enrolled),
    )
    print(_summary(gallery))


def _add(args: argparse.Namespace) -> None:
    from retrieval.gallery import Gallery

    enrolled = _read_enrolled(args.embeddings)
    gallery = Gallery.open(args.gallery).add(
        enrolled.embeddings, enrolled.subject_ids, enrolled.keys, **_model(enrolled)
    )
    print(_summary(gallery))


def _remove(args: argparse.Namespace) -> None:
    from aroface.errors import ConfigError
    from retrieval.gallery import Gallery

    if not args.subject and not args.entry:
        raise ConfigError("nothing to remove: name entries with --entry or subjects with --subject.")
    print(_summary(Gallery.open(args.gallery).remove(entry_ids=args.entry, subject_ids=args.subject)))


def _search(args: argparse.Namespace) -> None:
    import logging

    from aroface.files import write_json
    from retrieval.gallery import Gallery

    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every build that it tries
    gallery = Gallery.open(args.gallery)
    probes = _read_enrolled(args.probes)
    found = gallery.search(probes.embeddings, top=args.top, level=args.level, **_model(probes))
    names = probes.keys if probes.keys is not None else range(len(probes))
    searches = [
        {
            "probe": str(name),
            "subject_id": str(subject),
            "candidates": [candidate._asdict() for candidate in candidates],
        }
        for name, subject, candidates in zip(names, probes.subject_ids, found, strict=True)
    ]
    if args.out:
        head = {"gallery": str(args.gallery), "generation": gallery.manifest.generation}
        write_json(args.out, {**head, "top": args.top, "level": args.level, "searches": searches})
    _print_candidates([str(name) for name in names], found)


def _info(args: argparse.Namespace) -> None:
    from retrieval.gallery import Gallery

    gallery = Gallery.open(args.gallery)
    manifest = gallery.manifest
    print(_summary(gallery))
    print(f"  model       {manifest.model_id or 'unknown'}")
    if manifest.contract:
        print(f"  input       {manifest.contract.image_size} px, {manifest.contract.colour_order}")
    print(f"  generation  {manifest.generation}, checksums verified")
    if args.entries:
        print("entry\tsubject\tnorm")
        entries = gallery.entries
        for entry, subject, norm in zip(entries.entry_ids, entries.subject_ids, entries.norms, strict=True):
            print(f"{entry}\t{subject}\t{norm:.3f}")


def _read_enrolled(path: Path) -> "EmbeddingSet":
    """The rows of an embedding file that have an embedding; the others are counted on stderr."""
    import logging

    from aroface.errors import DataError
    from retrieval.embedding_files import read_embeddings

    embeddings = read_embeddings(path)
    failed = int((~embeddings.enrolled).sum())
    if failed == len(embeddings):
        raise DataError(f"{path}: every row failed to enrol; look at the warnings of `aroface embed`.")
    if failed:
        logging.getLogger(__name__).warning("%s: %d rows failed to enrol and are left out.", path, failed)
        return embeddings.take(embeddings.enrolled)
    return embeddings


def _model(embeddings: "EmbeddingSet") -> _Model:
    from aroface.contract import InputContract

    contract = embeddings.metadata.get("contract")
    return {
        "model_id": embeddings.metadata.get("model_id"),
        "contract": InputContract.model_validate(contract) if contract is not None else None,
    }


def _summary(gallery: "Gallery") -> str:
    manifest = gallery.manifest
    return (
        f"{gallery.directory}: {manifest.count} entries of {manifest.num_subjects} subjects, "
        f"D = {manifest.dimension}, {manifest.metric}, index {manifest.index}"
    )


def _print_candidates(names: list[str], found: "list[list[Candidate]]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(names)} searches", title_justify="left", caption_justify="left")
    for heading in ("probe", "rank", "subject", "entry", "score"):
        table.add_column(heading, justify="right" if heading in {"rank", "score"} else "left")
    for name, candidates in zip(names[:_SHOWN_PROBES], found[:_SHOWN_PROBES], strict=True):
        for c in candidates:
            table.add_row(name if c.rank == 1 else "", str(c.rank), c.subject_id, c.entry_id, f"{c.score:.4f}")
        table.add_section()
    if len(names) > _SHOWN_PROBES:
        table.caption = f"{len(names) - _SHOWN_PROBES} more; --out writes all"
    Console().print(table)
