"""The HTTP interface on a small gallery, through the whole application."""

import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import ConfigError, DataError
from launch.cmd_serve import _directory, _freeze_what_stays
from launch.serve import service as service_module
from launch.serve.app import create_app
from launch.serve.guard import GuardSettings
from launch.serve.service import FaceService
from launch.serve.stats import ServiceStats
from retrieval.baselines import PixelEmbedder
from retrieval.embeddings import EmbeddingSet
from retrieval.gallery import Gallery
from retrieval.gallery import gallery as gallery_module
from retrieval.gallery.store import write_lock
from tests.helpers.services import HEADERS, KEY, face, image, png


def test_search_finds_the_enrolled_face_first(client):
    answer = client.post("/v1/search", files={"image": image(1)}, data={"top": "3"})
    assert answer.status_code == 200
    found = answer.json()
    assert [m["rank"] for m in found["matches"]] == [1, 2, 3]
    best = found["matches"][0]
    assert (best["subject_id"], best["entry_id"]) == ("bob", "bob/1")
    assert best["score"] == pytest.approx(1, abs=1e-6)
    assert not found["is_calibrated"]
    assert "not calibrated" in best["meaning"]


def test_an_id_that_is_no_unicode_is_spelt_out(gallery):
    odd = b"J\xf6rg"  # a folder with a name in Latin-1
    more = gallery.add(PixelEmbedder().embed(face(9)[None]), [os.fsdecode(odd)], [os.fsdecode(odd + b"/1.jpg")])
    app = create_app(FaceService(PixelEmbedder(), more, ServiceStats()), GuardSettings(KEY))
    with TestClient(app, headers=HEADERS) as client:
        found = client.post("/v1/search", files={"image": image(9)}, data={"top": "1"}).json()["matches"][0]
    assert (found["subject_id"], found["entry_id"]) == (r"J\xf6rg", r"J\xf6rg/1.jpg")


def test_enrol_search_delete(client, gallery):
    added = client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "eve", "entry_id": "eve/a"})
    assert added.status_code == 201
    assert added.json()["entry_id"] == "eve/a"
    assert len(Gallery.open(gallery.directory)) == 5  # on disk when the answer has come
    again = client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "eve", "entry_id": "eve/a"})
    assert again.status_code == 409
    assert "Entry eve/a is enrolled already" in again.json()["error"]
    assert "leave entry_id out" in again.json()["error"]
    assert "--" not in again.json()["error"]  # no option of the command line
    free = client.post("/v1/entries", files={"image": image(8)}, data={"subject_id": "eve"}).json()
    assert free["entry_id"].startswith("eve/")
    found = client.post("/v1/search", files={"image": image(9)}, data={"top": "1"}).json()["matches"]
    assert found[0]["subject_id"] == "eve"
    assert client.delete("/v1/entries", params={"entry_id": "eve/a"}).json() == {"entries": 1}
    assert client.delete("/v1/entries", params={"entry_id": "eve/a"}).status_code == 404
    assert client.delete("/v1/subjects", params={"subject_id": "eve"}).json() == {"entries": 1}
    assert client.delete("/v1/subjects", params={"subject_id": "eve"}).status_code == 404
    assert len(Gallery.open(gallery.directory)) == 4


def test_compare_is_the_cosine_of_the_embeddings(client):
    embeddings = PixelEmbedder().embed(np.stack([face(0), face(1)]))
    answer = client.post("/v1/compare", files={"first": image(0), "second": image(1)})
    assert answer.json()["score"] == pytest.approx(float(embeddings[0] @ embeddings[1]), abs=1e-6)


class Stalled(PixelEmbedder):
    """Embeds when it is told to."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    def embed(self, images):
        self.go_on.wait(30)
        return super().embed(images)


def test_too_many_requests_are_told_so_and_the_state_still_answers(gallery):
    embedder = Stalled()
    service = FaceService(embedder, gallery, ServiceStats(), max_batch=1, max_queue=4)
    app = create_app(service, GuardSettings(KEY, max_requests=5))
    with TestClient(app, headers=HEADERS) as client, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.post, "/v1/search", files={"image": image(1)}) for _ in range(12)]
        refused = [one.result() for one in islice(as_completed(asked, timeout=20), 7)]
        assert {answer.status_code for answer in refused} == {503}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert "try again" in refused[0].json()["error"]
        assert client.get("/health").status_code == 200
        assert client.get("/v1/status").json()["waiting"]["embed"] == 4
        assert 'status="503"} 7.0' in client.get("/metrics").text
        embedder.go_on.set()
        assert [one.result(20).status_code for one in asked].count(200) == 5
        assert client.post("/v1/search", files={"image": image(1)}).status_code == 200


def test_a_late_answer_is_a_503_and_its_work_is_not_done(gallery, monkeypatch):
    monkeypatch.setattr(service_module, "_ANSWER_TIMEOUT_S", 0.3)
    embedder = Stalled()
    counts = []
    service = FaceService(embedder, gallery, ServiceStats(), max_batch=1)
    monkeypatch.setattr(service.stats, "count_batch", lambda worker, size, seconds: counts.append(worker))
    with TestClient(create_app(service, GuardSettings(KEY)), headers=HEADERS) as client:
        for _ in range(3):
            late = client.post("/v1/search", files={"image": image(1)})
            assert late.status_code == 503
            assert "No answer within" in late.json()["error"]
        embedder.go_on.set()
    assert counts == ["embed"]  # the one that had begun


def test_deletions_beside_another_writer(client, gallery):
    with write_lock(gallery.directory):
        busy = client.delete("/v1/entries", params={"entry_id": "ann/1"})
    assert busy.status_code == 409
    assert "another process" in busy.json()["error"]
    more = PixelEmbedder().embed(np.stack([face(seed) for seed in range(20, 26)]))
    Gallery.open(gallery.directory).add(
        more, ["ann"] * 6, [f"ann/{i}" for i in range(2, 8)], model_id=PixelEmbedder().model_id
    )
    assert client.delete("/v1/entries", params={"entry_id": "bob/1"}).json() == {"entries": 1}
    assert client.delete("/v1/subjects", params={"subject_id": "ann"}).json() == {"entries": 7}


def test_a_deletion_counts_what_went_though_another_writer_came_in_between(client, gallery, monkeypatch):
    """The other process enrols and deletes just before this one has the lock."""

    @contextmanager
    def lock_after_another_writer(directory):
        monkeypatch.setattr(gallery_module, "write_lock", write_lock)
        other = Gallery.open(directory)
        more = PixelEmbedder().embed(np.stack([face(seed) for seed in range(20, 23)]))
        other = other.add(more, ["ann", "ann", "eve"], ["ann/2", "ann/3", "eve/1"], model_id=PixelEmbedder().model_id)
        other.remove(entry_ids=["bob/1"])
        with write_lock(directory):
            yield

    monkeypatch.setattr(gallery_module, "write_lock", lock_after_another_writer)
    assert client.delete("/v1/subjects", params={"subject_id": "ann"}).json() == {"entries": 3}
    assert set(Gallery.open(gallery.directory).entries.subject_ids) == {"cid", "dan", "eve"}


def test_a_photograph_with_landmarks_is_aligned(client):
    """A larger picture that holds the enrolled crop somewhere, and where its landmarks are."""
    photograph = np.zeros((300, 400, 3), np.uint8)
    photograph[100:212, 150:262] = face(2)
    files = {"image": ("photograph.png", png(photograph), "image/png")}
    data = {"landmarks": json.dumps((ARCFACE_TEMPLATE_112 + np.array([150, 100])).tolist()), "top": "1"}
    best = client.post("/v1/search", files=files, data=data).json()["matches"][0]
    assert best["subject_id"] == "cid"
    assert best["score"] > 0.98


def test_scores_get_the_meaning_that_was_calibrated(client, gallery):
    strangers = PixelEmbedder().embed(np.stack([face(seed) for seed in range(100, 160)]))
    subjects = np.array([f"stranger {row}" for row in range(60)])
    calibrated = gallery.calibrate(EmbeddingSet(strangers, subjects), [0.1, 0.5])
    service = FaceService(PixelEmbedder(), calibrated, ServiceStats())
    with TestClient(create_app(service, GuardSettings(KEY)), headers=HEADERS) as client:
        mate = client.post("/v1/search", files={"image": image(1)}, data={"top": "4"}).json()
        assert mate["is_calibrated"]
        assert mate["matches"][0]["fpir"] == 0.1
        assert "10 % of strangers" in mate["matches"][0]["meaning"]
        assert mate["matches"][3]["fpir"] is None
        assert "below every calibrated threshold" in mate["matches"][3]["meaning"]
        thresholds = client.get("/v1/gallery").json()["thresholds"]
        assert [(t["fpir"], t["score"], t["level"]) for t in thresholds] == [
            (p.fpir, p.threshold, "entry") for p in calibrated.info.calibration
        ]
        few = f"not supported: {calibrated.info.calibration[0].k} false alarms allowed, 30 needed"
        assert [t["doubts"] for t in thresholds] == [[few], []]  # the second allows 30
        assert f"(uncertain: {few})" in mate["matches"][0]["meaning"]
        count = len(calibrated)
        client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "new"})
        for threshold in client.get("/v1/gallery").json()["thresholds"]:
            assert threshold["doubts"][-1] == f"{count} entries then, {count + 1} now"


def test_a_level_without_a_calibration_says_that_there_is_none(gallery):
    strangers = PixelEmbedder().embed(np.stack([face(seed) for seed in range(100, 140)]))
    subjects = np.array([f"stranger-{i}" for i in range(40)])
    calibrated = gallery.calibrate(EmbeddingSet(strangers, subjects), [0.5], level="entry")
    service = FaceService(PixelEmbedder(), calibrated, ServiceStats())
    with TestClient(create_app(service, GuardSettings(KEY)), headers=HEADERS) as client:
        for level, is_calibrated in (("entry", True), ("subject", True), ("pooled", False)):
            found = client.post("/v1/search", files={"image": image(1)}, data={"level": level}).json()
            assert found["is_calibrated"] == is_calibrated
            assert found["matches"][0]["score"] == pytest.approx(1, abs=1e-6)
            assert (f"not calibrated at level {level}" in found["matches"][0]["meaning"]) != is_calibrated


def test_many_requests_at_once_give_the_answers_of_single_ones(client):
    """Each search is batched with others; every one must get its own answer."""

    def ask(seed):
        answer = client.post("/v1/search", files={"image": image(seed % 4)}, data={"top": str(1 + seed % 3)})
        return [(m["subject_id"], m["rank"]) for m in answer.json()["matches"]]

    single = [ask(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == single
    text = client.get("/metrics").text
    assert 'aroface_requests_total{route="/v1/search",status="200"} 24.0' in text
    assert "aroface_gallery_entries 4.0" in text


@pytest.mark.parametrize(
    ("fields", "files", "status", "message"),
    [
        ({}, {}, 422, "image"),
        ({"top": "0"}, {"image": image(0)}, 422, "top"),
        ({"level": "nobody"}, {"image": image(0)}, 422, "level"),
        ({}, {"image": ("x.png", b"garbage", "image/png")}, 415, "neither JPEG nor PNG"),
        ({}, {"image": ("x.png", png(np.zeros((112, 112, 3), np.uint8)), "image/png")}, 422, "shows no face"),
        ({"landmarks": "[]"}, {"image": image(0)}, 422, "landmarks"),
        ({"landmarks": "[[1,1],[2,2],[3,3],[4,4],[5,5]]"}, {"image": image(0)}, 422, "on one line"),
        (
            {"landmarks": json.dumps([[112 - x, y] for x, y in ARCFACE_TEMPLATE_112.tolist()])},
            {"image": image(0)},
            422,
            "mirrored",
        ),
        ({}, {"image": ("x.png", bytes(2 << 20), "image/png")}, 413, "limit of 1 MiB"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client, fields, files, status, message):
    answer = client.post("/v1/search", data=fields, files=files)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert client.post("/v1/search", files={"image": image(0)}).status_code == 200


@pytest.mark.parametrize(
    "subject", ["\u0436/\u65e5\u672c", "e\u0301", "\U0001f600", "../../etc/passwd", "..\\x", "%2e%2e", "'; --", "<b>"]
)
def test_any_printable_id_comes_back_as_it_was_and_touches_no_other_file(client, gallery, subject):
    around = sorted(gallery.directory.parent.iterdir())
    added = client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": subject})
    assert added.json()["entry_id"].startswith(f"{subject}/")
    best = client.post("/v1/search", files={"image": image(9)}, data={"top": "1"}).json()["matches"][0]
    assert best["subject_id"] == subject
    assert client.delete("/v1/subjects", params={"subject_id": subject}).json() == {"entries": 1}
    assert sorted(gallery.directory.parent.iterdir()) == around


@pytest.mark.parametrize("subject", ["a\nb", "a\x1b[31m", "\u202eabc", "a\x00", "a\u2028b", "\u200b", "\xa0", " "])
def test_ids_that_could_forge_a_line_or_hide_are_refused_and_not_logged(client, caplog, subject):
    caplog.set_level("DEBUG")
    for answer in (
        client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": subject}),
        client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "x", "entry_id": subject}),
        client.delete("/v1/subjects", params={"subject_id": subject}),
    ):
        assert answer.status_code == 422
        assert "an id is printable text" in answer.json()["error"]
    logged = [line.getMessage() for line in caplog.records if line.name.startswith(("launch", "retrieval", "uvicorn"))]
    assert not [line for line in logged if subject in line]


@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/..%2fapp.py",
        "/page.css/../../app.py",
        "//etc/passwd",
        "/page.js%00",
        "/page.js/",
        "/v1/gallery/",
    ],
)
def test_nothing_but_the_page_is_served_from_disk(client, path):
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code == 404
    assert answer.json() == {"error": "Not Found"}


def test_few_images_are_decoded_at_a_time(gallery, monkeypatch):
    """Each may take 36 MB for a file of a few kB."""
    lock, now, most = threading.Lock(), 0, 0

    def decode(data, **options):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return face(1)

    monkeypatch.setattr(service_module, "face_from_upload", decode)
    monkeypatch.setattr(service_module.os, "cpu_count", lambda: 3)
    service = FaceService(PixelEmbedder(), gallery, ServiceStats())
    with ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(lambda _: service.crop(b"", None), range(24)))) == 24
    service.close()
    assert most == 3


def test_an_id_that_is_too_long_is_counted_in_characters(client):
    answers = [
        client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": 201 * "x"}),
        client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "x", "entry_id": 201 * "x"}),
        client.delete("/v1/entries", params={"entry_id": 201 * "x"}),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "200 characters at the most, this one 201" in answer.json()["error"]


def test_an_empty_gallery_says_so(client):
    for subject in ("ann", "bob", "cid", "dan"):
        client.delete("/v1/subjects", params={"subject_id": subject})
    answer = client.post("/v1/search", files={"image": image(0)})
    assert answer.status_code == 409
    assert "empty" in answer.json()["error"]
    assert client.post("/v1/entries", files={"image": image(0)}, data={"subject_id": "ann"}).status_code == 201


def test_a_model_that_is_not_the_gallerys_is_refused(gallery):
    class Other(PixelEmbedder):
        model_id = "another"

    with pytest.raises(DataError, match="another"):
        FaceService(Other(), gallery, ServiceStats())


def test_the_page_runs_no_script_of_others(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text.replace("http://www.w3.org", "")
    for name in ("page.css", "page.js"):
        assert client.get(f"/{name}").status_code == 200


def test_what_is_there_at_the_start_is_not_collected_again():
    before = gc.get_freeze_count()
    try:
        _freeze_what_stays()
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()


def test_a_gallery_in_milvus_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="gallery build"):
        _directory("http://localhost:19530")
    assert str(_directory("some/folder")) == "some/folder"
