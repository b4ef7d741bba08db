"""IJB-B and IJB-C in the layout of the InsightFace release: 1:1, covariates, and 1:N mixed media.

`meta/` holds the join of images, templates and media, five landmarks and a detector score per row, the pairs, and the
1:N lists; a row is one image in one template. Landmarks are pixels of the loose crops.

Source: Maze et al., IARPA Janus Benchmark C, ICB 2018; docs of the protocols, B.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.protocols.text_tables import as_ids, read_columns, read_integers, read_lines
from retrieval.templates import TemplateSamples

__all__ = [
    "COUNTS",
    "GALLERIES",
    "IjbName",
    "IjbPairs",
    "TemplateList",
    "covariate_codes",
    "match_templates",
    "read_covariates",
    "read_ijb_pairs",
    "read_ijb_samples",
    "read_template_list",
    "subjects_of_pairs",
    "with_subjects",
]

IjbName = Literal["ijbb", "ijbc"]
#: File names of the two 1:N galleries.
GALLERIES: dict[str, tuple[str, str]] = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
#: Counts of the originals, as published with the release.
COUNTS: dict[str, dict[str, int]] = {
    "ijbb": {
        "images": 227630,
        "templates": 12115,
        "pairs": 8010270,
        "genuine": 10270,
        "gallery_1": 931,
        "gallery_2": 914,
    }
    | {"probes": 10270},
    "ijbc": {"images": 469375, "templates": 23124, "pairs": 15658489, "genuine": 19557}
    | {"gallery_1": 1772, "gallery_2": 1759, "probes": 19593},
}

_FACE_FIELDS = 12


@dataclass(frozen=True)
class IjbPairs:
    """Pairs of templates: rows of the template table, and whether they are genuine."""

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    same: NDArray[np.bool_]


@dataclass(frozen=True)
class TemplateList:
    """Templates of one 1:N list, each once, in the order of the file."""

    template_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]


def read_ijb_samples(meta: Path, name: IjbName) -> TemplateSamples:
    """Read the join of images with templates and media, and landmarks and detector scores.

    The two files are joined by row number, so their names must agree in every row.

    Raises:
        DataError: a file is missing or malformed, or the two contradict one another.
    """
    joined_path, faces_path = meta / f"{name}_face_tid_mid.txt", meta / f"{name}_name_5pts_score.txt"
    joined = [line.split() for line in read_lines(joined_path)]
    faces = [line.split() for line in read_lines(faces_path)]
    for number, row in enumerate(joined, start=1):
        if len(row) != 3:
            raise DataError(f"{joined_path}, line {number}: {' '.join(row)[:60]!r} is not `image template media`.")
    for number, row in enumerate(faces, start=1):
        if len(row) != _FACE_FIELDS:
            raise DataError(f"{faces_path}, line {number} has {len(row)} fields; it is `image x1 y1 ... x5 y5 score`.")
    if len(joined) != len(faces):
        raise DataError(
            f"{joined_path} has {len(joined)} rows, {faces_path.name} {len(faces)}; the files are joined by row."
        )
    for number, (one, other) in enumerate(zip(joined, faces, strict=True), start=1):
        if one[0] != other[0]:
            raise DataError(f"Row {number}: {joined_path.name} names {one[0]!r}, {faces_path.name} {other[0]!r}.")
    if not joined:
        raise DataError(f"{joined_path} is empty.")
    try:
        numbers = np.array([row[1:] for row in faces], np.float32)
    except ValueError as error:
        raise DataError(f"{faces_path}: landmarks and scores must be numbers ({error}).") from error
    wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(wrong):
        raise DataError(f"{faces_path}, line {wrong[0] + 1}: landmarks and scores must be finite numbers.")
    templates = as_ids(np.array([row[1] for row in joined]), path=joined_path, what="template id")
    template_ids, codes = np.unique(templates, return_inverse=True)
    return TemplateSamples(
        keys=np.array([row[0] for row in joined]),
        template=codes.astype(np.int64),
        media=as_ids(np.array([row[2] for row in joined]), path=joined_path, what="media id"),
        template_ids=template_ids,
        subject_ids=np.zeros(len(template_ids), np.int64),
        det_scores=numbers[:, 10],
        landmarks=numbers[:, :10],
    )


def read_ijb_pairs(path: Path, template_ids: NDArray[np.int64]) -> IjbPairs:
    """Read `template template label` rows.

    Raises:
        DataError: missing, malformed, a template that has no samples listed, or a label other than 0 and 1.
    """
    rows = read_integers(path, columns=3, what="`template template label`")
    labels = rows[:, 2]
    if not np.isin(labels, (0, 1)).all():
        wrong = int(np.flatnonzero(~np.isin(labels, (0, 1)))[0])
        raise DataError(f"{path}, line {wrong + 1}: label {int(labels[wrong])}; 1 is genuine, 0 impostor.")
    first, second = (match_templates(rows[:, side], template_ids, path=path) for side in (0, 1))
    return IjbPairs(first, second, labels == 1)


def match_templates(ids: NDArray[Any], template_ids: NDArray[np.int64], *, path: Path) -> NDArray[np.int32]:
    """Place of each id in the ascending `template_ids`.

    Raises:
        DataError: an id is not there.
    """
    places = np.searchsorted(template_ids, ids).astype(np.int32)
    np.minimum(places, len(template_ids) - 1, out=places)
    unknown = template_ids[places] != ids
    if unknown.any():
        line = int(unknown.argmax())
        raise DataError(f"{path}, line {line + 1}: template {int(ids[line])} has no samples in the list of images.")
    return places


def read_template_list(path: Path) -> TemplateList:
    """Templates of a 1:N list, which has one row per image: each template once, with its subject.

    Raises:
        DataError: missing, malformed, or a template with two subjects.
    """
    columns = read_columns(path, ("TEMPLATE_ID", "SUBJECT_ID"))
    templates = as_ids(columns["TEMPLATE_ID"], path=path, what="TEMPLATE_ID")
    subjects = as_ids(columns["SUBJECT_ID"], path=path, what="SUBJECT_ID")
    _, first, codes = np.unique(templates, return_index=True, return_inverse=True)
    differs = subjects != subjects[first][codes]
    if differs.any():
        row = int(differs.argmax())
        raise DataError(
            f"{path}: template {int(templates[row])} has the subjects {int(subjects[first][codes[row]])} and "
            f"{int(subjects[row])}; a template shows one person."
        )
    order = np.sort(first)
    return TemplateList(templates[order], subjects[order])


def read_covariates(path: Path, covariate: str | None = None) -> tuple[TemplateList, NDArray[Any] | None]:
    """Single-image templates of the covariate protocol, and one of their columns as strata.

    Raises:
        DataError: as `read_template_list`; or the file has no such column.
    """
    listed = read_template_list(path)
    if covariate is None:
        return listed, None
    columns = read_columns(path, ("TEMPLATE_ID", covariate))
    values = dict(zip(columns["TEMPLATE_ID"].astype(np.int64).tolist(), columns[covariate].tolist(), strict=True))
    return listed, np.array([values[template] for template in listed.template_ids.tolist()])


def covariate_codes(
    path: Path, covariate: str, template_ids: NDArray[np.int64], *, used: NDArray[np.int32]
) -> tuple[list[str], NDArray[np.int16]]:
    """Strata of templates by one column of the covariate list.

    Args:
        path: the list.
        covariate: name of the column.
        template_ids: (T,) ascending.
        used: places of the templates that need a stratum.

    Returns:
        Names of the strata, and (T,) the index of each template's stratum; -1 where it is not listed and not used.

    Raises:
        DataError: as `read_covariates`; or a used template is not listed.
    """
    listed, values = read_covariates(path, covariate)
    names, codes = np.unique(np.asarray(values), return_inverse=True)
    order = np.argsort(listed.template_ids)
    ids, codes = listed.template_ids[order], codes[order]
    match_templates(template_ids[np.unique(used)], ids, path=path)
    places = np.minimum(np.searchsorted(ids, template_ids), len(ids) - 1)
    return names.tolist(), np.where(ids[places] == template_ids, codes[places], -1).astype(np.int16)


def subjects_of_pairs(pairs: IjbPairs, templates: int) -> NDArray[np.int64]:
    """(T,) a subject code per template where only pairs are labelled: genuine pairs join templates of one person.

    Raises:
        DataError: an impostor pair joins two templates of one person.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = pairs.first[pairs.same], pairs.second[pairs.same]
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(templates, templates))
    codes: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    wrong = ~pairs.same & (codes[pairs.first] == codes[pairs.second])
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"Pair {row + 1} is labelled impostor, but genuine pairs join its templates; the labels contradict."
        )
    return codes


def with_subjects(samples: TemplateSamples, lists: tuple[TemplateList, ...]) -> TemplateSamples:
    """The samples of the listed templates alone, with their subjects.

    Raises:
        DataError: a template of two lists has two subjects.
    """
    known: dict[int, int] = {}
    for listed in lists:
        for template, subject in zip(listed.template_ids.tolist(), listed.subject_ids.tolist(), strict=True):
            if known.setdefault(template, subject) != subject:
                raise DataError(f"Template {template} has the subjects {known[template]} and {subject} in two lists.")
    rows = np.array([place for place, t in enumerate(samples.template_ids.tolist()) if t in known], np.int64)
    chosen = samples.take(rows)
    absent = np.setdiff1d(np.array(sorted(known)), chosen.template_ids)  # listed, without images: failures to enrol
    template_ids = np.concatenate([chosen.template_ids, absent])
    return replace(
        chosen, template_ids=template_ids, subject_ids=np.array([known[t] for t in template_ids.tolist()], np.int64)
    )
