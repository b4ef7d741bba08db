"""1:N search on embedding files: one embedding a template, ties counted against the probe.

Closed set (CMC) and open set (TPIR at FPIR, at rank 1 and within the candidate list). With a second gallery all probes
search both: ranks are pooled, open-set rates are formed per gallery and averaged.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.errors import DataError
from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_options import add_rule, counts, positive, rates
from launch.evaluate_source import add_out, add_similarity, finish, frozen

if TYPE_CHECKING:
    from retrieval.embeddings import EmbeddingSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--gallery", type=Path, required=True, metavar="G.npz", help="gallery templates")
    parser.add_argument("--gallery-2", type=Path, metavar="G2.npz", help="second gallery, searched on its own")
    parser.add_argument("--probes", type=Path, required=True, metavar="P.npz", help="probe templates")
    parser.add_argument("--ranks", type=counts, default=[1, 5, 10, 20], metavar="K,..", help="ranks")
    parser.add_argument("--fpir", type=rates, default=rates("0.001,0.01,0.1"), metavar="RATE,..", help="FPIRs")
    parser.add_argument("--candidates", type=positive, default=20, metavar="L", help="list length")
    parser.add_argument(
        "--rank-level",
        choices=("entry", "identity"),
        default="entry",
        help="rivals: every gallery entry, or every identity by its best entry",
    )
    parser.add_argument("--alignment", metavar="ID", help="how the crops were aligned, kept in the result")
    add_device(parser)
    add_similarity(parser)
    add_rule(parser)
    add_out(parser, searches=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.details import search_details
    from retrieval.embedding_files import read_embeddings
    from retrieval.metrics import evaluate_identification
    from retrieval.results import identification_record

    blocks = search_blocks(args)
    paths = [path for path in (args.gallery, args.gallery_2, args.probes) if path]
    *galleries, probes = (read_embeddings(path) for path in paths)
    for embeddings in (*galleries, probes):
        _refuse_twice(embeddings)
    result = evaluate_identification(
        galleries,
        probes,
        ranks=args.ranks,
        fpirs=args.fpir.values,
        candidates=args.candidates,
        rank_level=args.rank_level,
        rule=args.rule,
        similarity=args.similarity,
        resamples=args.resamples,
        blocks=blocks,
    )
    parts = identification_record(result, fpir_labels=args.fpir)
    parts["metrics"] |= frozen(args, searches=result.searches)
    parts["warnings"] = [*parts.get("warnings", ()), *_enrolled_probes(galleries, probes)]
    finish(
        args,
        "identification",
        parts,
        title="Identification",
        rule=args.rule,
        model=probes.metadata,
        files=paths,
        details=search_details(result.searches, probes.subject_ids),
        searched=(galleries, probes),
        similarity=args.similarity,
    )
    return 0


def _enrolled_probes(galleries: "Sequence[EmbeddingSet]", probes: "EmbeddingSet") -> list[str]:
    """A probe that is itself enrolled finds itself, and the rates say nothing."""
    import numpy as np

    found: list[str] = []
    for gallery in galleries:
        if gallery.keys is None or probes.keys is None:
            continue
        _, in_gallery, in_probes = np.intersect1d(gallery.keys, probes.keys, return_indices=True)
        rows = probes.embeddings[in_probes]
        same = in_probes[(gallery.embeddings[in_gallery] == rows).all(axis=1) & rows.any(axis=1)]
        if same.size:
            found.append(
                f"{same.size} of {len(probes.keys)} probes are enrolled in {gallery.name} themselves (such as "
                f"{probes.keys[same[0]].item()}) and find themselves: these rates are too good. Enrol one image of "
                "each person and search the others: `aroface embed --take first` and `--take rest`."
            )
    return found


def _refuse_twice(embeddings: "EmbeddingSet") -> None:
    """One row is one template: two rows of one template are samples that nobody has fused, or a row that slipped in."""
    import numpy as np

    for column in ("template_ids", "keys"):
        if (values := getattr(embeddings, column)) is None:
            continue
        names, counts_of = np.unique(values, return_counts=True)
        if (counts_of > 1).any():
            twice = names[counts_of > 1][0].item()
            raise DataError(
                f"{embeddings.name}: {column} holds {twice!r} twice. A template is one row, searched or enrolled once: "
                "remove the copy, or fuse its samples with `aroface evaluate templates`."
            )
