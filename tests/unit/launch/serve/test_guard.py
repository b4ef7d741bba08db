"""Who may ask the service what: the key, names of the machine, other sites."""

import pytest
from fastapi.testclient import TestClient

from aroface.errors import ConfigError
from launch.cmd_serve import _access_key
from launch.serve.app import create_app
from launch.serve.guard import GuardSettings, is_loopback
from launch.serve.service import FaceService
from launch.serve.stats import ServiceStats
from retrieval.baselines import PixelEmbedder
from tests.helpers.services import KEY, image


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_key_only_page_and_health_answer(client, headers):
    bare = TestClient(client.app, headers=headers)
    for path in ("/v1/gallery", "/v1/status", "/metrics", "/openapi.json"):
        answer = bare.get(path)
        assert answer.status_code == 401, path
        assert "access key" in answer.json()["error"]
        assert answer.headers["www-authenticate"] == "Bearer"
    for name in ("key", "access_token", "Authorization"):  # addresses end up in logs and histories
        assert bare.get("/v1/gallery", params={name: KEY}).status_code == 401
    assert bare.post("/v1/search", files={"image": image(0)}).status_code == 401
    assert bare.get("/health").json() == {"status": "ok"}
    assert "<title>aroface</title>" in bare.get("/").text


def test_other_sites_are_refused(client):
    answer = client.post("/v1/search", files={"image": image(0)}, headers={"Origin": "http://elsewhere.example"})
    assert answer.status_code == 403
    own = client.post("/v1/search", files={"image": image(0)}, headers={"Origin": "http://testserver"})
    assert own.status_code == 200


def test_without_a_key_only_names_of_this_machine_are_answered(gallery):
    app = create_app(FaceService(PixelEmbedder(), gallery, ServiceStats()), GuardSettings(None))
    with TestClient(app, base_url="http://localhost:8000") as local:
        assert local.get("/v1/gallery").status_code == 200
        assert local.get("/v1/gallery", headers={"Host": "rebound.example"}).status_code == 403
        assert local.get("/v1/gallery", headers={"Host": "127.0.0.1.rebound.example"}).status_code == 403


def test_loopback_names():
    assert all(map(is_loopback, ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "127.example", "", "::", "example.localhost.org")))  # noqa: S104


def test_the_key_file_is_checked(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines"):
        _access_key(None, needs_one=True, host="0.0.0.0")  # noqa: S104 - refused
    assert _access_key(None, needs_one=False, host="localhost") is None
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="5 characters"):
        _access_key(path, needs_one=False, host="localhost")
    path.write_text(f"{KEY}\n")
    assert _access_key(path, needs_one=True, host="0.0.0.0") == KEY  # noqa: S104 - an address as text
    with pytest.raises(ConfigError, match="cannot be read"):
        _access_key(tmp_path / "missing", needs_one=True, host="localhost")
