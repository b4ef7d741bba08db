"""The covariate test of IJB-B and IJB-C in NIST's layout: single-image templates, and matches without labels.

`ijbX_11_covariate_probe_reference.csv` has a row per template (TEMPLATE_ID, SUBJECT_ID, FILENAME, covariates),
`ijbX_11_covariate_matches.csv` lines `enrol_template,probe_template` without header; a match is genuine when both show
one subject. The 1:1 matches of NIST (`ijbc_11_G1_G2_matches.csv`) are such lines too.

Source: Maze et al., IARPA Janus Benchmark C, ICB 2018; docs of the protocols, B.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aroface.errors import DataError
from retrieval.protocols.ijb import IjbPairs, match_templates
from retrieval.protocols.text_tables import as_ids, read_columns, read_integers
from retrieval.templates import TemplateSamples

__all__ = ["COUNTS", "has_labels", "read_covariate_samples", "read_matches"]

#: Counts of the originals that are known.
COUNTS: dict[str, dict[str, int]] = {"ijbb": {}, "ijbc": {"templates": 140739, "pairs": 47404001}}


def read_covariate_samples(path: Path, names: Sequence[str]) -> TemplateSamples:
    """The single-image templates, in ascending order.

    An image with several faces has one FILENAME for all of them. Crops are found by FILENAME, or else by a file called
    after the template, `TEMPLATE_ID.jpg`, in any folder.

    Args:
        path: `ijbX_11_covariate_probe_reference.csv`.
        names: of all images that there are; none: embeddings in the order of the file.

    Raises:
        DataError: missing, malformed, a template listed twice, or two templates would share one crop.
    """
    columns = read_columns(path, ("TEMPLATE_ID", "SUBJECT_ID", "FILENAME"))
    ids = as_ids(columns["TEMPLATE_ID"], path=path, what="TEMPLATE_ID")
    subjects = as_ids(columns["SUBJECT_ID"], path=path, what="SUBJECT_ID")
    template_ids, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    if len(template_ids) != len(ids):
        twice = int(template_ids[np.bincount(codes) > 1][0])
        raise DataError(f"{path} lists template {twice} twice; the covariate test has one image a template.")
    return TemplateSamples(
        keys=_keys(path, columns["FILENAME"], ids, names),
        template=codes.astype(np.int64),
        media=np.zeros(len(ids), np.int64),
        template_ids=template_ids,
        subject_ids=subjects[first],
    )


def _keys(path: Path, files: NDArray[Any], ids: NDArray[np.int64], names: Sequence[str]) -> NDArray[Any]:
    """(N,) the crop of each row."""
    if not names:
        return files
    by_stem = {PurePosixPath(name).stem: name for name in names}
    if np.isin(files, np.array(names)).any():
        distinct, counts = np.unique(files, return_counts=True)
        if (counts > 1).any():
            raise DataError(
                f"{path}: {distinct[counts > 1][0]} shows the faces of several templates, so its name does not tell "
                "which crop is whose; call crops after their template, TEMPLATE_ID.jpg."
            )
        return files
    return np.array([by_stem.get(str(template), f"{template}.jpg") for template in ids.tolist()])


def has_labels(path: Path) -> bool:
    """Whether lines are `template template label` and not NIST's `template,template`.

    Raises:
        DataError: missing or not text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return len(line.replace(",", " ").split()) != 2


def read_matches(path: Path, samples: TemplateSamples) -> IjbPairs:
    """Read `template,template` lines; genuine where both show one subject.

    Args:
        path: the file.
        samples: with the subjects of all templates.

    Raises:
        DataError: missing, malformed, or a template that has no samples listed.
    """
    rows = read_integers(path, columns=2, what="`template,template`")
    order = np.argsort(samples.template_ids)
    ids = samples.template_ids[order]
    first, second = (order[match_templates(rows[:, side], ids, path=path)].astype(np.int32) for side in (0, 1))
    return IjbPairs(first, second, samples.subject_ids[first] == samples.subject_ids[second])
