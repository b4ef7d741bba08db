"""IJB-B and IJB-C: verification of template pairs (1:1), covariates, and search of mixed media (1:N).

--meta holds the files of the InsightFace release (ijbc_face_tid_mid.txt, ijbc_name_5pts_score.txt, the pairs, the 1:N
lists). With --model the loose crops are aligned by their landmarks and embedded; with --embeddings the rows are those
of the list of images, by `keys` or in its order. Both galleries of 1:N are searched on their own with all probes.

--task covariates reads NIST's ijbX_11_covariate_probe_reference.csv and ijbX_11_covariate_matches.csv from --meta; its
images are aligned faces named as FILENAME, or TEMPLATE_ID.jpg.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aroface.errors import ConfigError, DataError
from launch.evaluate_device import add_device, search_blocks
from launch.evaluate_options import add_rule, positive, rates, refuse_options
from launch.evaluate_source import (
    add_out,
    add_pooling,
    add_similarity,
    add_source,
    finish,
    frozen,
    open_collection,
    quality_name,
)

if TYPE_CHECKING:
    from retrieval.embeddings import EmbeddingSet
    from retrieval.protocols.collection import Collection
    from retrieval.protocols.ijb import IjbName, TemplateList
    from retrieval.templates import TemplateSamples

_FARS = "1e-6,1e-5,1e-4,1e-3,1e-2,1e-1"
_FPIRS = "0.001,0.01,0.1"
_CANDIDATES = 20
#: Options that some of the tasks use.
_USED_BY = {
    **dict.fromkeys(("far", "save_scores", "covariates", "covariate", "pairs"), ("1:1", "covariates")),
    **dict.fromkeys(("fpir", "candidates", "save_candidates", "device"), ("1:N",)),
}


@dataclass(frozen=True)
class _Found:
    """What a task gives."""

    parts: dict[str, Any]  #: of the record
    expected: dict[str, int]  #: counts of the original
    files: list[Path]
    details: dict[str, Any]
    scores: Any = None
    searched: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--task", choices=("1:1", "1:N", "covariates"), default="1:1", help="what is evaluated")
    parser.add_argument("--meta", type=Path, required=True, metavar="DIR", help="folder of the protocol files")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="other pairs (default: the release's list)")
    parser.add_argument(
        "--covariates", type=Path, metavar="CSV", help="templates with covariates (of --task covariates: its own list)"
    )
    parser.add_argument("--covariate", metavar="COLUMN", help="TAR and FMR by this column of the first side")
    add_source(parser, images="folder of the loose crops")
    add_pooling(parser, "N1D1")
    parser.add_argument(
        "--far", type=rates, metavar="RATE,..", help=f"FARs of pairs: 1:1, covariates (default: {_FARS})"
    )
    parser.add_argument("--fpir", type=rates, metavar="RATE,..", help=f"FPIRs of searches: 1:N (default: {_FPIRS})")
    parser.add_argument("--candidates", type=positive, metavar="L", help=f"1:N list length (default: {_CANDIDATES})")
    add_device(parser)
    add_similarity(parser)
    add_rule(parser)
    add_out(parser, pairs=True, searches=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from retrieval.templates import Pooling, pool_templates

    _check(args)
    name = cast("IjbName", args.entry)
    pooling = Pooling.parse(args.pooling)
    if args.task == "covariates":  # one image a template: no detector scores, and nothing that they could weight
        pooling = replace(pooling, detector=False)
    lists, files = _lists(args, name)
    with ExitStack() as stack:
        samples, collection = _samples(args, stack, name, lists)
        landmarks = None if args.embeddings is not None else samples.landmarks
        chunks = collection.chunks(samples.keys, samples.stream_order(), landmarks=landmarks)
        templates = pool_templates(samples, chunks, pooling, name=name)
    evaluate = _search if args.task == "1:N" else _verify
    found = evaluate(args, name, samples, templates, lists)
    found.parts["counts"] |= {"images": len(samples.keys), "templates": len(templates), "missing": collection.missing}
    found.parts["counts"]["fte_samples"] = len(samples.keys) - int(templates.metadata["samples_used"])
    finish(
        args,
        f"{name}-{args.task.replace(':', '')}",
        found.parts,
        title=f"{name.upper()} {args.task}",
        rule=args.rule,
        model=templates.metadata,
        files=[*files, *found.files],
        expected=found.expected,
        details=found.details,
        scores=found.scores,
        searched=found.searched,
        similarity=args.similarity,
        pooling=f"{pooling}, F{int(templates.metadata.get('flip') == 'sum')}",
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what the task does not use, and fill in what it does."""
    from retrieval.metrics.rules import PAIR_RULES

    refuse_options(args, _USED_BY)
    if args.task == "covariates" and args.covariate is not None and args.covariates is None:
        args.covariates = _covariate_list(args)
    if args.covariate is not None and args.covariates is None:
        raise ConfigError(f"--covariate {args.covariate} needs --covariates, the file that has this column.")
    if args.covariates is not None and args.covariate is None:
        raise ConfigError(f"--covariates {args.covariates} needs --covariate, the name of a column.")
    if args.task != "1:N" and args.rule not in PAIR_RULES:
        raise ConfigError(f"--rule {args.rule} is about searches; --task {args.task} has {', '.join(PAIR_RULES)}.")
    search_blocks(args)  # before the images are embedded
    args.far, args.fpir = args.far or rates(_FARS), args.fpir or rates(_FPIRS)
    args.candidates = args.candidates or _CANDIDATES


def _lists(args: argparse.Namespace, name: "IjbName") -> "tuple[tuple[TemplateList, ...], list[Path]]":
    """The 1:N lists where subjects are needed, and the files that were read."""
    from retrieval.protocols.ijb import GALLERIES, read_template_list
    from retrieval.protocols.ijb_covariates import has_labels

    if args.task == "covariates":
        return (), [_covariate_list(args)]
    files = [args.meta / f"{name}_face_tid_mid.txt", args.meta / f"{name}_name_5pts_score.txt"]
    if args.task == "1:1" and has_labels(_pairs_path(args)):
        return (), files
    paths = [args.meta / f"{name}_1N_gallery_{gallery}.csv" for gallery in GALLERIES[name]]
    paths.append(args.meta / f"{name}_1N_probe_mixed.csv")
    return tuple(read_template_list(path) for path in paths), [*files, *paths]


def _covariate_list(args: argparse.Namespace) -> Path:
    return Path(args.meta, f"{args.entry}_11_covariate_probe_reference.csv")


def _pairs_path(args: argparse.Namespace) -> Path:
    listed = "11_covariate_matches.csv" if args.task == "covariates" else "template_pair_label.txt"
    return Path(args.pairs or args.meta / f"{args.entry}_{listed}")


def _samples(
    args: argparse.Namespace, stack: ExitStack, name: "IjbName", lists: "tuple[TemplateList, ...]"
) -> "tuple[TemplateSamples, Collection]":
    """Templates of the task, with their subjects where these are listed, and where their images are."""
    from retrieval.protocols.ijb import read_ijb_samples, with_subjects
    from retrieval.protocols.ijb_covariates import read_covariate_samples

    if args.task == "covariates":
        collection = open_collection(args, stack)
        return read_covariate_samples(_covariate_list(args), collection.keys), collection
    samples = read_ijb_samples(args.meta, name)
    if lists:
        samples = with_subjects(samples, lists)
    return samples, open_collection(args, stack, total=len(samples.keys))


def _verify(
    args: argparse.Namespace,
    name: "IjbName",
    samples: "TemplateSamples",
    templates: "EmbeddingSet",
    lists: "tuple[TemplateList, ...]",
) -> _Found:
    import numpy as np

    from retrieval.details import pair_details
    from retrieval.metrics import evaluate_pairs, pair_scores
    from retrieval.protocols import ijb_covariates
    from retrieval.protocols.ijb import COUNTS, covariate_codes, read_ijb_pairs, subjects_of_pairs
    from retrieval.results import pair_strata_records, verification_record

    path = _pairs_path(args)
    if lists or args.task == "covariates":
        pairs = ijb_covariates.read_matches(path, samples)
        subjects = np.unique(samples.subject_ids, return_inverse=True)[1]
    else:
        pairs = read_ijb_pairs(path, samples.template_ids)
        subjects = subjects_of_pairs(pairs, len(templates))
    scores = pair_scores(templates, pairs.first, pairs.second, similarity=args.similarity)
    sides = subjects[pairs.first], subjects[pairs.second]
    result = evaluate_pairs(
        scores, pairs.same, fars=args.far.values, rule=args.rule, subjects=sides, resamples=args.resamples
    )
    parts = verification_record(
        result,
        far_labels=args.far,
        quality=templates.pair_quality(pairs.first[pairs.same], pairs.second[pairs.same]),
        quality_name=quality_name(args, templates),
    )
    parts["metrics"] |= frozen(args, genuine=result.genuine, impostor=result.impostor)
    files = [path]
    if args.covariates is not None:
        names, of_template = covariate_codes(
            args.covariates, args.covariate, np.asarray(samples.template_ids), used=pairs.first
        )
        strata = names, of_template[pairs.first]
        parts["conditions"] = pair_strata_records(
            result, scores, pairs.same, strata, args.covariate, far_labels=args.far
        )
        files.append(args.covariates)
    counts = ijb_covariates.COUNTS if args.task == "covariates" else COUNTS
    expected = counts[name] if args.pairs is None else {}
    return _Found(parts, expected, files, pair_details(scores, pairs.same, sides), scores)


def _search(
    args: argparse.Namespace,
    name: "IjbName",
    samples: "TemplateSamples",
    templates: "EmbeddingSet",
    lists: "tuple[TemplateList, ...]",
) -> _Found:
    import numpy as np

    from retrieval.details import search_details
    from retrieval.metrics import evaluate_identification
    from retrieval.protocols.ijb import COUNTS
    from retrieval.results import identification_record

    place = {template: row for row, template in enumerate(np.asarray(templates.template_ids).tolist())}
    one, two, probes = (
        templates.take(np.array([place[t] for t in listed.template_ids.tolist()], np.int64)) for listed in lists
    )
    mates = np.isin(probes.subject_ids, one.subject_ids).astype(int) + np.isin(probes.subject_ids, two.subject_ids)
    if (mates != 1).any():
        raise DataError(
            f"{int((mates != 1).sum())} probes have their subject in no gallery or in both; each has it in exactly one."
        )
    result = evaluate_identification(
        [one, two],
        probes,
        ranks=(1, 5, 10),
        fpirs=args.fpir.values,
        candidates=args.candidates,
        rule=args.rule,
        similarity=args.similarity,
        resamples=args.resamples,
        blocks=search_blocks(args),
    )
    parts = identification_record(result, fpir_labels=args.fpir)
    parts["metrics"] |= frozen(args, searches=result.searches)
    parts["counts"] |= {"gallery_1": len(one), "gallery_2": len(two)}
    expected = {key: COUNTS[name][key] for key in ("gallery_1", "gallery_2", "probes")}
    details = search_details(result.searches, probes.subject_ids)
    return _Found(parts, expected, [], details, searched=((one, two), probes))
