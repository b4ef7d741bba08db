"""QMUL-SurvFace: native surveillance faces, open-set identification and verification.

`Face_Identification_Test_Set/{gallery,mated_probe,unmated_probe}/` with two .mat lists, and
`Face_Verification_Test_Set/{positive,negative}_pairs_names.mat`. Counts are read and printed, not assumed.

Source: Cheng, Zhu, Gong, Surveillance Face Recognition Challenge (arXiv:1804.09691); docs of the protocols, E.1.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.protocols.collection import by_stem
from retrieval.protocols.text_tables import matlab_cells
from retrieval.templates import TemplateSamples

__all__ = [
    "FPIRS",
    "LIST_LENGTH",
    "PAIR_COUNTS",
    "SurvFaceLists",
    "read_survface",
    "read_survface_pairs",
    "survface_samples",
]

#: The operating points of the challenge: TPIR within 20 candidates.
FPIRS, LIST_LENGTH = ("0.3", "0.2", "0.1", "0.01"), 20
#: Pairs of the verification test.
PAIR_COUNTS = {"genuine": 5320, "impostor": 5320}
_GALLERY, _MATED, _UNMATED = "gallery", "mated_probe", "unmated_probe"


@dataclass(frozen=True)
class SurvFaceLists:
    """Names and identities of gallery and mated probes."""

    gallery: list[str]
    gallery_ids: NDArray[np.int64]
    probes: list[str]
    probe_ids: NDArray[np.int64]
    files: tuple[Path, Path]


def read_survface(folder: Path) -> SurvFaceLists:
    """Read the lists of the identification test.

    Raises:
        DataError: missing, malformed, a name that is listed twice, or an identity that is not positive.
    """
    paths = folder / "gallery_img_ID_pairs.mat", folder / "mated_probe_img_ID_pairs.mat"
    gallery, gallery_ids = matlab_cells(paths[0], "gallery_set", "gallery_ids")
    probes, probe_ids = matlab_cells(paths[1], "mated_probe_set", "mated_probe_ids")
    for path, names in zip(paths, (gallery, probes), strict=True):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{path} lists {twice!r} twice; every image is searched or enrolled once.")
    if min(gallery_ids.min(initial=1), probe_ids.min(initial=1)) <= 0:
        raise DataError(f"{folder}: an identity is not positive; only unmated probes are nobody.")
    return SurvFaceLists(gallery, gallery_ids, probes, probe_ids, paths)


def survface_samples(
    lists: SurvFaceLists, names: Sequence[str], *, image_gallery: bool = False
) -> tuple[TemplateSamples, int]:
    """Templates: the gallery (one per identity, or one per image), then mated, then unmated probes.

    Args:
        lists: from `read_survface`.
        names: of all images.
        image_gallery: every gallery image is a template.

    Returns:
        The templates, and how many of them are the gallery.
    """
    stems = {folder: by_stem(names, folder) for folder in (_GALLERY, _MATED, _UNMATED)}

    def keys(folder: str, listed: list[str]) -> list[str]:
        return [stems[folder].get(name.rpartition(".")[0] or name, f"{folder}/{name}") for name in listed]

    unmated = sorted(stems[_UNMATED].values())
    gallery_keys, probe_keys = keys(_GALLERY, lists.gallery), keys(_MATED, lists.probes)
    if image_gallery:
        subjects, template = lists.gallery_ids, np.arange(len(gallery_keys))
    else:
        subjects, template = np.unique(lists.gallery_ids, return_inverse=True)
    count = len(subjects)
    probes = len(probe_keys) + len(unmated)
    return (
        TemplateSamples(
            keys=np.array([*gallery_keys, *probe_keys, *unmated]),
            template=np.concatenate([template, count + np.arange(probes)]).astype(np.int64),
            media=np.arange(len(gallery_keys) + probes),
            template_ids=np.arange(count + probes),
            subject_ids=np.concatenate([subjects, lists.probe_ids, -1 - np.arange(len(unmated))]),
        ),
        count,
    )


def read_survface_pairs(folder: Path) -> tuple[list[str], list[str], NDArray[np.bool_], tuple[Path, Path]]:
    """Names of both sides of the verification pairs, genuine ones first.

    Raises:
        DataError: missing, or not a list of pairs.
    """
    paths = folder / "positive_pairs_names.mat", folder / "negative_pairs_names.mat"
    sides: list[list[str]] = [[], []]
    labels: list[bool] = []
    for path, label in zip(paths, (True, False), strict=True):
        names, _ = matlab_cells(path, path.stem)
        if not names or len(names) % 2:
            raise DataError(f"{path} holds {len(names)} names, not pairs of them.")
        sides[0] += names[::2]
        sides[1] += names[1::2]
        labels += [label] * (len(names) // 2)
    return sides[0], sides[1], np.array(labels), paths
