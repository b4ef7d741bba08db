"""A small packed data set of drawn identities, made once per test run."""

from pathlib import Path

import pytest

from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic


@pytest.fixture(scope="session")
def drawn_faces(tmp_path_factory) -> Path:
    """Folder of 12 identities with 6 images each."""
    out = tmp_path_factory.mktemp("drawn") / "faces"
    write_synthetic(out, identities=12, images_per_identity=6, seed=0)
    return out


@pytest.fixture(scope="session")
def drawn_shards(drawn_faces, tmp_path_factory) -> Path:
    """The same as shards."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(drawn_faces, out, PackOptions())
    return out
