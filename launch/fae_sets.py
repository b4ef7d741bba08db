"""From the options of `aroface evaluate fae` to images and what is compared among them."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from aroface.errors import ConfigError, DataError
from launch.evaluate_source import open_images

if TYPE_CHECKING:
    from aroface.types import FaceSet
    from retrieval.protocols.fae_sets import FaeSet
    from retrieval.protocols.ijb import IjbName

__all__ = ["PAIR_SETS", "SETS", "TASKS", "open_fae_set"]

PAIR_SETS = ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw", "vgg2_fp", "xqlfw")
SETS = ("faces", *PAIR_SETS, "tinyface", "ijbb", "ijbc", "ijbs", "survface", "scface", "templates")
#: Sets with several tasks, the first of which is the default.
TASKS: Mapping[str, tuple[str, ...]] = {
    "ijbb": ("1:1", "1:N"),
    "ijbc": ("1:1", "1:N"),
    "ijbs": (
        "surveillance_to_single",
        "surveillance_to_booking",
        "surveillance_to_surveillance",
        "multiview_to_booking",
        "uav_to_booking",
    ),
}

_Opened = tuple["FaceSet", "FaeSet"]


def open_fae_set(args: argparse.Namespace) -> _Opened:
    """The images, and the references, probes and comparisons of `--on`.

    Raises:
        ConfigError: an option is missing, or does not go with the set.
        DataError: the lists are malformed, or nobody can be searched for.
    """
    if args.task is not None and args.task not in TASKS.get(args.on, ()):
        tasks = ", ".join(TASKS.get(args.on, ())) or "none"
        raise ConfigError(f"--task {args.task} does not go with --on {args.on}; its tasks: {tasks}.")
    if args.on not in ("faces", "scface") and args.lists is None:
        raise ConfigError(f"--on {args.on} needs --lists: the files of the protocol.")
    is_bin = args.on in PAIR_SETS and args.lists is not None and _is_set_of_pairs(args.lists)
    if args.faces is None and not is_bin:
        raise ConfigError(f"--on {args.on} needs --faces: where the images lie.")
    return _bin(args) if is_bin else _OPENERS.get(args.on, _pairs)(args)


def _is_set_of_pairs(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".bin"


def _faces(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_faces
    from shards.faces import open_face_set

    faces = open_face_set(args.faces)
    return faces, of_faces(faces)


def _bin(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_pairs
    from retrieval.protocols.lfw_pairs import bin_faces, bin_pairs
    from retrieval.protocols.pair_sets import read_pair_set

    content = read_pair_set(args.lists)
    faces = bin_faces(content)
    files = [args.lists] if args.lists.is_file() else []
    return faces, of_pairs(args.on, faces.keys, faces.identities, bin_pairs(content), files=files)


def _pairs(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_pairs
    from retrieval.protocols.lfw_pairs import is_list_of_files, read_file_pairs, read_lfw_pairs

    faces = open_images(args.faces)
    if is_list_of_files(args.lists):
        pairs = read_file_pairs(args.lists, keys=faces.keys)
    else:
        pairs, _ = read_lfw_pairs(
            args.lists, keys=faces.keys, identities=faces.identities, max_missing=args.max_missing_pairs
        )
    return faces, of_pairs(args.on, faces.keys, faces.identities, pairs, files=[args.lists])


def _tinyface(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_tinyface
    from retrieval.protocols.tinyface import read_tinyface_lists

    faces = open_images(args.faces)
    return faces, of_tinyface(read_tinyface_lists(args.lists), faces.keys)


def _ijb(args: argparse.Namespace) -> _Opened:
    from dataclasses import replace

    from retrieval.protocols import fae_sets, ijb
    from retrieval.templates import Pooling

    name = cast("IjbName", args.on)
    pooling = Pooling.parse(args.pooling or "N1D1")
    samples = ijb.read_ijb_samples(args.lists, name)
    joined = [args.lists / f"{name}_face_tid_mid.txt", args.lists / f"{name}_name_5pts_score.txt"]
    faces = open_images(args.faces)
    if args.task == "1:N":
        paths = [args.lists / f"{name}_1N_gallery_{part}.csv" for part in ijb.GALLERIES[name]]
        paths.append(args.lists / f"{name}_1N_probe_mixed.csv")
        lists = tuple(ijb.read_template_list(path) for path in paths)
        named = ijb.with_subjects(samples, lists)
        return faces, fae_sets.of_template_lists(f"{name}-1N", named, lists, pooling=pooling, files=[*joined, *paths])
    path = args.lists / f"{name}_template_pair_label.txt"
    pairs = ijb.read_ijb_pairs(path, samples.template_ids)
    subjects = ijb.subjects_of_pairs(pairs, len(samples.template_ids))
    data_set = fae_sets.of_template_pairs(f"{name}-11", samples, pairs, subjects, pooling=pooling)
    return faces, replace(data_set, files=(*joined, path))


def _ijbs(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_templates
    from retrieval.protocols.ijbs import read_ijbs
    from retrieval.templates import Pooling

    task = args.task or TASKS["ijbs"][0]
    faces = open_images(args.faces)
    plan = read_ijbs(args.lists, task, faces.keys)
    pooling = Pooling.parse(args.pooling or "N1D0", media=False)
    name = f"ijbs-{task}"
    return faces, of_templates(name, plan.samples, plan.galleries, plan.probes, pooling=pooling, files=plan.files)


def _survface(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_templates
    from retrieval.protocols.survface import read_survface, survface_samples
    from retrieval.templates import Pooling

    faces = open_images(args.faces)
    lists = read_survface(args.lists)
    samples, count = survface_samples(lists, faces.keys)
    rows = list(range(len(samples.template_ids)))
    pooling = Pooling.parse(args.pooling or "N0D0", media=False)
    return faces, of_templates("survface", samples, [rows[:count]], rows[count:], pooling=pooling, files=lists.files)


def _scface(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_scface
    from retrieval.protocols.scface import find_scface

    faces = open_images(args.faces)
    return faces, of_scface(find_scface(faces.keys))


def _templates(args: argparse.Namespace) -> _Opened:
    from retrieval.protocols.fae_sets import of_templates
    from retrieval.protocols.manifest import read_template_manifest
    from retrieval.templates import Pooling

    manifest = read_template_manifest(args.lists)
    if len(manifest.galleries) > 2:
        raise DataError(f"templates.csv names {len(manifest.galleries)} galleries; one or two are searched.")
    galleries = list(manifest.galleries.values())
    pooling = Pooling.parse(args.pooling or "N1D0")
    return open_images(args.faces), of_templates(
        args.lists.name, manifest.samples, galleries, manifest.probes, pooling=pooling, files=manifest.files
    )


_OPENERS: Mapping[str, Callable[[argparse.Namespace], _Opened]] = {
    "faces": _faces,
    "tinyface": _tinyface,
    "ijbb": _ijb,
    "ijbc": _ijb,
    "ijbs": _ijbs,
    "survface": _survface,
    "scface": _scface,
    "templates": _templates,
}
