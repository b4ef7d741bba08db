"""Imported networks against the code of their projects; runs where AROFACE_PEERS names a folder with checkouts."""

import os
from pathlib import Path

import pytest

from tests.peers.compare_weights import LIMIT, compare
from tests.peers.public_code import Peer, peers

ROOT = os.environ.get("AROFACE_PEERS")
SMALL = ("r18", "mbf", "vit_t", "ir_18", "iresnet ir50 BGR")


def _small() -> list[Peer]:
    return [peer for peer in peers(Path(ROOT)) if peer.name in SMALL] if ROOT else []


@pytest.mark.skipif(not ROOT, reason="AROFACE_PEERS does not name a folder with insightface, AdaFace and CVLface")
@pytest.mark.parametrize("peer", _small(), ids=lambda peer: f"{peer.project}-{peer.name}")
def test_imported_networks_embed_as_their_own_code_does(tmp_path, peer):
    result = compare(Path(ROOT), peer, tmp_path)
    assert result["largest_1_minus_cosine"] <= LIMIT
    assert result["largest_relative_difference_of_norms"] < 1e-4
    assert (
        result["mean_1_minus_cosine_between_images"] > 1e-3
    )  # the images are told apart, so the cosines mean something
    if peer.arcface_name:
        assert result["back_in_arcface_torch"]["largest_1_minus_cosine"] <= LIMIT
