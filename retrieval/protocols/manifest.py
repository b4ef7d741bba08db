"""Any other set of templates, from two tables.

`templates.csv`: template_id, subject_id, role (`gallery` or `probe`), gallery_name (of gallery templates; at most two
names are searched one by one), and any further column as a condition of the probe, such as distance_m.
`samples.csv`: template_id, media_id, path; optional det_score and x1, y1, ..., x5, y5 in pixels of the image.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.protocols.text_tables import read_columns, read_lines
from retrieval.templates import TemplateSamples

__all__ = ["TemplateManifest", "read_template_manifest"]

_POINTS = tuple(f"{axis}{number}" for number in range(1, 6) for axis in "xy")
_ROLES = ("gallery", "probe")


@dataclass(frozen=True)
class TemplateManifest:
    """Templates with their roles."""

    samples: TemplateSamples
    galleries: dict[str, NDArray[np.int64]]  #: name -> its templates
    probes: NDArray[np.int64]  #: templates
    conditions: dict[str, NDArray[Any]]  #: column -> (probes,) values
    files: tuple[Path, Path]


def read_template_manifest(folder: Path) -> TemplateManifest:
    """Read both tables.

    Raises:
        DataError: missing or malformed, a template listed twice, an unknown role, a sample of an unlisted template, no
            gallery or no probe, or numbers that are none.
    """
    templates_path, samples_path = folder / "templates.csv", folder / "samples.csv"
    required = ("template_id", "subject_id", "role", "gallery_name")
    header = read_lines(templates_path)[:1]
    others = [name.strip() for name in (header[0].split(",") if header else []) if name.strip() not in required]
    columns = read_columns(templates_path, required, optional=others)
    ids, roles = columns["template_id"], columns["role"]
    twice = next((name for name, count in Counter(ids.tolist()).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{templates_path} lists template {twice!r} twice; a template is searched or enrolled once.")
    wrong = ~np.isin(roles, _ROLES)
    if wrong.any():
        raise DataError(
            f"{templates_path}: role {str(roles[wrong][0])!r} of template {str(ids[wrong][0])!r} is none of {_ROLES}."
        )
    names = columns["gallery_name"]
    galleries = {
        str(name): np.flatnonzero((roles == "gallery") & (names == name))
        for name in np.unique(names[roles == "gallery"]).tolist()
    }
    probes = np.flatnonzero(roles == "probe")
    if not galleries or not len(probes):
        raise DataError(
            f"{templates_path} needs templates of both roles; it lacks a {'probe' if galleries else 'gallery'}."
        )
    samples = _samples(samples_path, ids, columns["subject_id"])
    conditions = {name: columns[name][probes] for name in others}
    return TemplateManifest(samples, galleries, probes, conditions, (templates_path, samples_path))


def _samples(path: Path, ids: NDArray[Any], subjects: NDArray[Any]) -> TemplateSamples:
    columns = read_columns(path, ("template_id", "media_id", "path"), optional=("det_score", *_POINTS))
    place = {template: number for number, template in enumerate(ids.tolist())}
    unknown = next((t for t in columns["template_id"].tolist() if t not in place), None)
    if unknown is not None:
        raise DataError(f"{path}: template {unknown!r} is not in templates.csv.")
    return TemplateSamples(
        keys=columns["path"],
        template=np.array([place[t] for t in columns["template_id"].tolist()], np.int64),
        media=columns["media_id"],
        template_ids=ids,
        subject_ids=subjects,
        det_scores=_numbers(path, columns, ("det_score",))[:, 0] if "det_score" in columns else None,
        landmarks=_numbers(path, columns, _POINTS) if all(name in columns for name in _POINTS) else None,
    )


def _numbers(path: Path, columns: dict[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[np.float32]:
    try:
        values = np.stack([columns[name].astype(np.float32) for name in names], axis=1)
    except ValueError as error:
        raise DataError(f"{path}: {', '.join(names)} must be numbers ({error}).") from error
    if not np.isfinite(values).all():
        raise DataError(f"{path}: {', '.join(names)} must be finite numbers.")
    return values
