"""IJB-S: surveillance and UAV videos against single images, booking images and other videos, open and closed set.

Read from the csv files of the release, never from a pickle. Samples lie in `SUBJECT/videos_VIDEO_FRAME.jpg` and
`SUBJECT/img_ID.jpg`; what a detector did not find is not there, and a template without samples is a failure to enrol.

Source: Kalka et al., IJB-S: IARPA Janus Surveillance Video Benchmark, BTAS 2018; docs of the protocols, C.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from aroface.errors import DataError
from retrieval.protocols.text_tables import read_columns, read_lines
from retrieval.templates import TemplateSamples

__all__ = ["COUNTS", "EXPERIMENTS", "Experiment", "IjbsTemplates", "read_ijbs"]

_SAMPLE = re.compile(
    r"(?:^|/)(?P<subject>[^/]+)/(?:videos_(?P<video>[^_/]+)_(?P<frame>[^/]+)|img_(?P<image>[^/]+))\.\w+$"
)
#: Words without a digit, a dot or a slash: no file of the release is called so.
_COLUMN_NAME = re.compile(r"(?!(?:videos|img)$)[A-Za-z]+(?:[ _-][A-Za-z]+)*")


@dataclass(frozen=True)
class Experiment:
    """One of the five: which gallery, which probes."""

    gallery: str  #: part of the gallery's file name
    probes: str  #: file of the probe list
    multi_view: bool = False  #: all listed videos of a subject are one probe


EXPERIMENTS: dict[str, Experiment] = {
    "surveillance_to_single": Experiment("surveillance_to_single", "cs6_surveillance_to_single-booking_probe.csv"),
    "surveillance_to_booking": Experiment("surveillance_to_booking", "cs6_surveillance_to_single-booking_probe.csv"),
    "surveillance_to_surveillance": Experiment(
        "surveillance_to_surveillance", "cs6_surveillance_to_surveillance_probe.csv"
    ),
    "multiview_to_booking": Experiment(
        "surveillance_to_booking", "cs6_surveillance_to_single-booking_probe.csv", multi_view=True
    ),
    "uav_to_booking": Experiment("surveillance_to_booking", "cs6_uav_to_single-booking_probe.csv"),
}

#: Counts of the original metadata.
COUNTS = {"subjects": 202, "subject_videos": 3852}

#: A template: its subject, and the media that it is made of (`videos/5004`, `img/101146`).
_Template = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class IjbsTemplates:
    """Templates of one experiment; the parts of `samples` by role."""

    samples: TemplateSamples
    galleries: tuple[list[int], list[int]]  #: templates of G1 and of G2
    probes: list[int]
    files: tuple[Path, ...]
    counts: dict[str, int]  #: of the metadata, as in `COUNTS`


def read_ijbs(folder: Path, experiment: str, keys: Iterable[str], *, all_videos: bool = False) -> IjbsTemplates:
    """Templates of one experiment and the samples that there are of them.

    Args:
        folder: of `cs6_metadata.csv`, with `galleries/`.
        experiment: one of `EXPERIMENTS`.
        keys: names of all samples.
        all_videos: multi-view merges every video of the metadata, as public code does, and not the listed ones alone.

    Raises:
        DataError: a file is missing or malformed, a subject is in both galleries, a probe is in a gallery, or no sample
            has a name of the layout.
    """
    plan = EXPERIMENTS[experiment]
    by_media = _by_media(keys)
    paths = [folder / "galleries" / f"cs6_{plan.gallery}_g{number}.csv" for number in (1, 2)]
    metadata_path, probe_path = folder / "cs6_metadata.csv", folder / plan.probes
    galleries = [_gallery(path, plan.gallery) for path in paths]
    shown = _shown(metadata_path)
    probes = _probes(shown, metadata_path, probe_path, multi_view=plan.multi_view, all_videos=all_videos)
    _check_disjoint(galleries, probes, paths)
    templates = [*galleries[0], *galleries[1], *probes]
    edges = np.cumsum([0, len(galleries[0]), len(galleries[1]), len(probes)]).tolist()
    return IjbsTemplates(
        _samples(templates, by_media),
        (list(range(edges[0], edges[1])), list(range(edges[1], edges[2]))),
        list(range(edges[2], edges[3])),
        (metadata_path, *paths, probe_path),
        {
            "subjects": len({subject for subject, _ in shown}),
            "subject_videos": sum(name.startswith("videos/") for _, name in shown),
        },
    )


def _media(file_name: str, where: Path | str) -> str:
    """`videos/5004` or `img/101146` from a file name of the protocol."""
    pure = PurePosixPath(file_name)
    if len(pure.parts) < 2 or pure.parts[-2] not in ("videos", "img"):
        raise DataError(f"{where}: {file_name!r} is neither videos/NAME nor img/NAME.")
    return f"{pure.parts[-2]}/{pure.stem}"


def _gallery(path: Path, kind: str) -> list[_Template]:
    columns = read_columns(path, ("SUBJECT_ID", "FILENAME"))
    media: dict[str, set[str]] = defaultdict(set)
    for subject, name in zip(columns["SUBJECT_ID"].tolist(), columns["FILENAME"].tolist(), strict=True):
        media[subject].add(_media(name, path))
    if kind == "surveillance_to_booking":  # all booking images of a subject are one template
        return [(subject, tuple(sorted(media[subject]))) for subject in sorted(media)]
    return [(subject, (name,)) for subject in sorted(media) for name in sorted(media[subject])]


def _shown(metadata: Path) -> list[tuple[str, str]]:
    """Who is seen where: distinct (subject, media). A video listed twice for one subject is one template, one trial."""
    columns = read_columns(metadata, ("SUBJECT_ID", "FILENAME"))
    rows = zip(columns["SUBJECT_ID"].tolist(), columns["FILENAME"].tolist(), strict=True)
    return list(dict.fromkeys((subject, _media(name, metadata)) for subject, name in rows))


def _probes(
    shown: Sequence[tuple[str, str]], metadata: Path, listed: Path, *, multi_view: bool, all_videos: bool
) -> list[_Template]:
    wanted = _listed(listed)
    media: dict[str, set[str]] = defaultdict(set)
    for subject, found in shown:
        if found in wanted or (all_videos and multi_view and found.startswith("videos/")):
            media[subject].add(found)
    if unknown := wanted - {name for names in media.values() for name in names}:
        raise DataError(f"{listed} lists {sorted(unknown)[0]!r}, in which {metadata.name} shows nobody.")
    if multi_view:
        return [(subject, tuple(sorted(media[subject]))) for subject in sorted(media)]
    return [(subject, (name,)) for subject in sorted(media) for name in sorted(media[subject])]


def _listed(path: Path) -> set[str]:
    """The media of a list with one file name a line; its first line may be the name of the column."""
    names = [line.split(",")[0].strip() for line in read_lines(path)]
    start = 1 if names and _COLUMN_NAME.fullmatch(names[0]) else 0
    if start == len(names):
        raise DataError(f"{path} lists no probe.")
    return {_media(name, f"{path}, line {number}") for number, name in enumerate(names[start:], start=start + 1)}


def _check_disjoint(
    galleries: Sequence[Sequence[_Template]], probes: Sequence[_Template], paths: Sequence[Path]
) -> None:
    first, second = ({subject for subject, _ in gallery} for gallery in galleries)
    if both := first & second:
        raise DataError(
            f"Subject {sorted(both)[0]} is in {paths[0].name} and in {paths[1].name}; a probe has one mate."
        )
    enrolled = {(subject, name) for gallery in galleries for subject, media in gallery for name in media}
    twice = [(subject, name) for subject, media in probes for name in media if (subject, name) in enrolled]
    if twice:
        raise DataError(f"Subject {twice[0][0]} in {twice[0][1]} is a probe and in the gallery; it would find itself.")


def _by_media(keys: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """(subject, media) -> names of its samples, sorted."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    example = ""
    for key in keys:
        match = _SAMPLE.search(key)
        if match is None:
            example = example or key
            continue
        media = f"videos/{match['video']}" if match["video"] else f"img/{match['image']}"
        found[match["subject"], media].append(key)
    if not found:
        raise DataError(
            f"No sample is called SUBJECT/videos_VIDEO_FRAME.jpg or SUBJECT/img_ID.jpg; one is called {example!r}."
        )
    for names in found.values():
        names.sort()
    return found


def _samples(templates: Sequence[_Template], by_media: dict[tuple[str, str], list[str]]) -> TemplateSamples:
    rows = [
        (key, number, name)
        for number, (subject, media) in enumerate(templates)
        for name in media
        for key in by_media.get((subject, name), ())
    ]
    if not rows:
        raise DataError("None of the templates has a sample; the images belong to other subjects or videos.")
    return TemplateSamples(
        keys=np.array([row[0] for row in rows]),
        template=np.array([row[1] for row in rows], np.int64),
        media=np.array([row[2] for row in rows]),
        template_ids=np.array([f"{subject}:{media[0]}" for subject, media in templates]),
        subject_ids=np.array([subject for subject, _ in templates]),
    )
