"""A gallery of four, and the application around it."""

import numpy as np
import pytest
from fastapi.testclient import TestClient

from launch.serve.app import create_app
from launch.serve.guard import GuardSettings
from launch.serve.service import FaceService
from launch.serve.stats import ServiceStats
from retrieval.baselines import PixelEmbedder
from retrieval.gallery import Gallery
from tests.helpers.services import HEADERS, KEY, face


@pytest.fixture
def gallery(tmp_path):
    embedder = PixelEmbedder()
    enrolled = embedder.embed(np.stack([face(seed) for seed in range(4)]))
    return Gallery.build(
        tmp_path / "gallery",
        enrolled,
        np.array(["ann", "bob", "cid", "dan"]),
        np.array(["ann/1", "bob/1", "cid/1", "dan/1"]),
        model_id=embedder.model_id,
        contract=embedder.contract,
    )


@pytest.fixture
def client(gallery):
    service = FaceService(PixelEmbedder(), gallery, ServiceStats())
    app = create_app(service, GuardSettings(KEY, max_body_bytes=1 << 20))
    with TestClient(app, headers=HEADERS) as client:
        yield client
