"""TinyFace identification: 3,728 probes among 4,443 mated images and 153,428 distractors, closed set.

Lists come from the official .mat files; images lie in `Probe/`, `Gallery_Match/` and `Gallery_Distractor/`. Every
distractor is an identity of its own. An image that is missing is a miss, never left out.

Source: Cheng, Zhu, Gong, Low-Resolution Face Recognition, ACCV 2018 (arXiv:1811.08965); docs of the protocols, D.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.embeddings import EmbeddingSet, concatenate
from retrieval.protocols.collection import Collection, by_stem, natural_embeddings
from retrieval.protocols.text_tables import matlab_cells

__all__ = ["COUNTS", "RANKS", "TinyFaceLists", "embed_tinyface", "read_tinyface_lists"]
__all__ += ["tinyface_keys"]

PROBE, MATCH, DISTRACTOR = "Probe", "Gallery_Match", "Gallery_Distractor"
RANKS = (1, 5, 10, 20, 50)
#: Probes, mated gallery images and distractors of the original.
COUNTS = {"probes": 3728, "gallery_match": 4443, "distractors": 153428}

_MATCH_FILE, _PROBE_FILE = "gallery_match_img_ID_pairs.mat", "probe_img_ID_pairs.mat"


@dataclass(frozen=True)
class TinyFaceLists:
    """File names and identities of the official lists."""

    probes: list[str]
    probe_ids: NDArray[np.int64]
    matches: list[str]
    match_ids: NDArray[np.int64]
    files: tuple[Path, Path]


def read_tinyface_lists(folder: Path) -> TinyFaceLists:
    """Read both .mat files.

    Raises:
        DataError: a file is missing or of another form, a name is listed twice, or an identity is not positive (the
            distractors have the negative numbers).
    """
    matches, match_ids = matlab_cells(folder / _MATCH_FILE, "gallery_set", "gallery_ids")
    probes, probe_ids = matlab_cells(folder / _PROBE_FILE, "probe_set", "probe_ids")
    for path, names, ids in ((_MATCH_FILE, matches, match_ids), (_PROBE_FILE, probes, probe_ids)):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{folder / path} lists {twice!r} twice; every image is searched or enrolled once.")
        if (ids <= 0).any():
            raise DataError(f"{folder / path}: identity {int(ids.min())} is not positive; a distractor is no identity.")
    return TinyFaceLists(probes, probe_ids, matches, match_ids, (folder / _MATCH_FILE, folder / _PROBE_FILE))


def tinyface_keys(lists: TinyFaceLists, names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of the probes, the mated gallery images and the distractors among all images.

    Files are found by their name without suffix within their own folder, so that copies in another image format fit;
    one that is missing keeps the name that was asked for.
    """
    stems = {folder: by_stem(names, folder) for folder in (PROBE, MATCH, DISTRACTOR)}

    def found(folder: str, listed: list[str]) -> list[str]:
        return [stems[folder].get(name.rpartition(".")[0], f"{folder}/{name}") for name in listed]

    return found(PROBE, lists.probes), found(MATCH, lists.matches), sorted(stems[DISTRACTOR].values())


def embed_tinyface(lists: TinyFaceLists, collection: Collection) -> tuple[EmbeddingSet, EmbeddingSet]:
    """Gallery (matches, then distractors) and probes."""
    probe_keys, match_keys, others = tinyface_keys(lists, collection.keys)
    matches = natural_embeddings(collection, np.array(match_keys), lists.match_ids, name=f"TinyFace {MATCH}")
    probes = natural_embeddings(collection, np.array(probe_keys), lists.probe_ids, name=f"TinyFace {PROBE}")
    if not others:
        return matches, probes
    unknown = -1 - np.arange(len(others))  # each one somebody else
    distractors = natural_embeddings(collection, np.array(others), unknown, name=f"TinyFace {DISTRACTOR}")
    return concatenate([matches, distractors]), probes
