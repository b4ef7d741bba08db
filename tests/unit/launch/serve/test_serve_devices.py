"""A service whose gallery is searched on GPUs: what was acknowledged is found, and what is there is not moved anew.

Indexes of the CPU stand in for those of the GPUs.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aroface.errors import ConfigError
from launch.serve.app import create_app
from launch.serve.guard import GuardSettings
from launch.serve.service import FaceService
from launch.serve.stats import ServiceStats
from retrieval.baselines import PixelEmbedder
from retrieval.gallery import Gallery, on_gpu
from tests.helpers.search_devices import stand_in_devices
from tests.helpers.services import HEADERS, KEY, face, image


@pytest.fixture
def used(monkeypatch):
    return stand_in_devices(monkeypatch, 2)


@pytest.fixture
def on_devices(gallery, used):
    """A client of a service on two devices, which are filled."""
    opened = Gallery.open(gallery.directory, device="cuda")
    service = FaceService(PixelEmbedder(), opened, ServiceStats())
    opened.make_ready()
    assert used == {0, 1}
    used.clear()
    with TestClient(create_app(service, GuardSettings(KEY)), headers=HEADERS) as client:
        yield client


def best(client, seed):
    found = client.post("/v1/search", files={"image": image(seed)}, data={"top": "1"}).json()["matches"]
    return found[0]["entry_id"] if found else None


def enrol(client, seed, entry_id):
    data = {"subject_id": f"s{seed}", "entry_id": entry_id}
    return client.post("/v1/entries", files={"image": image(seed)}, data=data).status_code


def test_enrolments_and_deletions_are_seen_and_fill_nothing(on_devices, used):
    assert best(on_devices, 1) == "bob/1"
    for seed in range(10, 16):
        assert enrol(on_devices, seed, f"e{seed}") == 201
        assert best(on_devices, seed) == f"e{seed}"
    assert on_devices.delete("/v1/entries", params={"entry_id": "bob/1"}).status_code == 200
    assert on_devices.delete("/v1/entries", params={"entry_id": "e12"}).status_code == 200
    assert best(on_devices, 1) != "bob/1"
    assert best(on_devices, 12) != "e12"
    assert used == set()


def test_a_gallery_that_was_emptied_serves_again(on_devices):
    for subject in ("ann", "bob", "cid", "dan"):
        assert on_devices.delete("/v1/subjects", params={"subject_id": subject}).status_code == 200
    assert on_devices.post("/v1/search", files={"image": image(1)}).status_code == 409
    assert enrol(on_devices, 1, "again") == 201
    assert best(on_devices, 1) == "again"


def test_what_was_acknowledged_is_found_while_others_write_and_the_devices_are_filled(on_devices, used, monkeypatch):
    monkeypatch.setattr(on_gpu, "_MOST_ADDED", 5)

    def one(seed):
        assert enrol(on_devices, seed, f"e{seed}") == 201
        seen = best(on_devices, seed) == f"e{seed}"
        if seed % 3 == 0:
            on_devices.delete("/v1/entries", params={"entry_id": f"e{seed}"})
            seen = seen and best(on_devices, seed) != f"e{seed}"
        return seen

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100, 140)))
    assert used == {0, 1}


def test_no_room_for_a_new_copy_is_a_fault_that_says_so(on_devices, used, monkeypatch):
    def full(*args):
        raise RuntimeError("cudaMalloc error out of memory")

    monkeypatch.setattr(on_gpu, "_MOST_ADDED", 0)
    monkeypatch.setattr(on_gpu, "on_devices", full)
    assert enrol(on_devices, 9, "e9") == 201
    answer = on_devices.post("/v1/search", files={"image": image(9)})
    assert answer.status_code == 500
    assert "could not be put on the GPUs [0, 1] (cudaMalloc error out of memory)" in answer.json()["error"]


def test_kinds_of_the_cpu_are_refused_before_the_service_starts(gallery, used):
    enrolled = PixelEmbedder().embed(np.stack([face(seed) for seed in range(200, 300)]))
    gallery.add(enrolled, np.arange(100), model_id=PixelEmbedder().model_id).compact("hnsw")
    with pytest.raises(ConfigError, match="kind hnsw is searched on the CPU only"):
        Gallery.open(gallery.directory, device="cuda").make_ready()
