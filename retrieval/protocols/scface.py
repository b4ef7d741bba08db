"""SCface: mugshots as gallery, surveillance cameras at three distances as probes.

Files are `NNN_frontal.jpg` (gallery) and `NNN_camC_D.jpg`: camera C of 1 to 5 in visible light, distance D of 1, 2, 3 =
4.20, 2.60, 1.00 m. Infrared cameras are left out.

Source: Grgic, Delac, Grgic, SCface - surveillance cameras face database, 2011; docs of the protocols, E.2.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aroface.errors import DataError
from retrieval.protocols.text_tables import read_lines

__all__ = ["DISTANCES_M", "ScfaceFiles", "expected_counts", "find_scface", "read_subjects"]

DISTANCES_M = {1: 4.20, 2: 2.60, 3: 1.00}
_CAMERAS = range(1, 6)
_SUBJECTS, _TEST_SUBJECTS = 130, 80
_FRONTAL = re.compile(r"(?:^|/)(\d{3})_frontal\.\w+$", re.IGNORECASE)
_SURVEILLANCE = re.compile(r"(?:^|/)(\d{3})_cam(\d)_(\d)\.\w+$", re.IGNORECASE)


@dataclass(frozen=True)
class ScfaceFiles:
    """Keys and subjects."""

    gallery: list[tuple[str, int]]
    probes: dict[int, list[tuple[str, int]]]  #: by distance


def find_scface(keys: Iterable[str], *, subjects: set[int] | None = None) -> ScfaceFiles:
    """Sort the samples by their names.

    Args:
        keys: names of all samples.
        subjects: only these, such as the 80 of a test after fine-tuning; None: all.

    Raises:
        DataError: no mugshot, no probe, two mugshots of one subject, or a probe without a mugshot.
    """
    gallery: dict[int, str] = {}
    probes: dict[int, list[tuple[str, int]]] = {distance: [] for distance in DISTANCES_M}
    for key in sorted(keys):
        if found := _FRONTAL.search(key):
            if gallery.setdefault(int(found[1]), key) != key:
                raise DataError(f"{key} and {gallery[int(found[1])]} are two mugshots of one subject; keep one.")
        elif found := _SURVEILLANCE.search(key):
            subject, camera, distance = (int(part) for part in found.groups())
            if camera in _CAMERAS and distance in probes:
                probes[distance].append((key, subject))
    everyone = set(gallery) | {subject for rows in probes.values() for _, subject in rows}
    chosen = everyone if subjects is None else subjects
    if not gallery or not any(probes.values()):
        raise DataError("SCface needs NNN_frontal.jpg and NNN_camC_D.jpg; the collection lacks one or the other.")
    if absent := chosen - set(gallery):
        raise DataError(f"Subject {min(absent):03d} has no mugshot NNN_frontal.jpg.")
    kept = {d: [(key, s) for key, s in rows if s in chosen] for d, rows in probes.items()}
    return ScfaceFiles([(key, subject) for subject, key in sorted(gallery.items()) if subject in chosen], kept)


def expected_counts(subjects: set[int] | None) -> dict[str, int]:
    """Counts of the track: all 130 subjects, or the 80 of the test after fine-tuning, five probes each a distance."""
    is_test = subjects is not None and len(subjects) == _TEST_SUBJECTS
    count = _TEST_SUBJECTS if is_test else _SUBJECTS
    return {"gallery": count} | {f"probes_d{distance}": count * len(_CAMERAS) for distance in DISTANCES_M}


def read_subjects(path: Path) -> set[int]:
    """Subject numbers, one a line.

    Raises:
        DataError: missing, or a line that is no number.
    """
    lines = read_lines(path)
    wrong = next((line for line in lines if not line.isdigit()), None)
    if wrong is not None or not lines:
        raise DataError(f"{path}: {wrong!r} is no subject number; each line holds one, such as 001.")
    return set(np.array(lines).astype(int).tolist())
