"""Every answer is one that the OpenAPI description has: its status, content type, headers and body."""

import asyncio
import errno
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import httpx2 as httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from launch.serve.app import create_app
from launch.serve.guard import GuardSettings
from launch.serve.service import FaceService
from launch.serve.stats import ServiceStats
from retrieval.baselines import PixelEmbedder
from retrieval.gallery import Gallery
from tests.helpers.services import HEADERS, KEY, face, image, png

CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
IMAGES = ("image", "first", "second")


class Served:
    """The application of the present test; at first one that can only describe itself."""

    def __init__(self):
        self.app = create_app(SimpleNamespace(stats=ServiceStats(), close=lambda: None), GuardSettings(KEY))

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


SERVED = Served()
described = schemathesis.openapi.from_asgi("/openapi.json", SERVED, headers=HEADERS)


@pytest.fixture
def served(client, monkeypatch):
    monkeypatch.setattr(SERVED, "app", client.app)


def drawn(count):
    """So many requests for each operation and mode, besides those at the bounds of what is described."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@described.parametrize()
@drawn(3)
def test_a_few_drawn_requests_are_answered_as_described(case, served):
    check(case)


@pytest.mark.slow
@described.parametrize()
@drawn(60)
def test_many_drawn_requests_are_answered_as_described(case, served):
    check(case)


def check(case):
    """Send it; where it has images, once more with real ones, since a schema cannot tell which bytes are one."""
    takes_images = bool(case.operation.body)
    excluded = [checks.positive_data_acceptance] if takes_images else []
    case.call_and_validate(headers=HEADERS, excluded_checks=excluded)
    if takes_images and isinstance(case.body, dict):
        case.body = {**case.body, **{name: png(face(1)) for name in IMAGES if name in case.body}}
        case.call_and_validate(headers=HEADERS, checks=[not_a_server_error, *CONFORMANCE])


# --- answers of what stands before the operations ---------------------------------------------------------------------

LIMITS = {"max_body_bytes": 1000, "body_timeout_s": 0.05}
BODY = {"type": "http.request", "body": b"x", "more_body": True}
WHOLE = {"type": "http.request"}


def operations():
    found = [result.ok() for result in described.get_all_operations()]
    assert len(found) == 9
    return found


def asked(app, operation, messages, headers=(), key=KEY):
    """What an operation answers to a request whose body comes in these messages; then nothing comes any more."""
    method, _, path = operation.label.partition(" ")
    sent, coming = [], iter(messages)

    async def receive():
        for message in coming:
            return message
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    fields = [(b"host", b"testserver"), (b"authorization", f"Bearer {key}".encode()), *headers]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": fields, "scheme": "http", "http_version": "1.1", "server": ("testserver", 80), "root_path": ""}
    asyncio.run(app({**scope, "client": ("testclient", 1)}, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    request = httpx.Request(method, f"http://testserver{path}")
    start, end = sent
    response = httpx.Response(start["status"], headers=start["headers"], content=end["body"], request=request)
    response.elapsed = timedelta(0)
    return response


@pytest.mark.parametrize(
    ("status", "messages", "headers", "key"),
    [
        (400, [BODY, {"type": "http.disconnect"}], [], KEY),
        (401, [WHOLE], [], "a wrong one"),
        (403, [], [(b"origin", b"http://elsewhere.example")], KEY),
        (408, [BODY], [], KEY),
        (413, [], [(b"content-length", b"99999")], KEY),
        (413, [{**BODY, "body": bytes(99999)}], [], KEY),
    ],
    ids=["disconnect", "key", "origin", "slow", "length", "body"],
)
def test_what_the_guard_answers_is_described(gallery, status, messages, headers, key):
    app = create_app(FaceService(PixelEmbedder(), gallery, ServiceStats()), GuardSettings(KEY, **LIMITS))
    for operation in operations():
        response = asked(app, operation, messages, headers, key)
        expected = 200 if (operation.path, status) == ("/health", 401) else status
        assert response.status_code == expected, operation.label
        operation.Case().validate_response(response, checks=CONFORMANCE)


def test_more_requests_than_are_taken_are_told_so_and_what_needs_no_face_is_answered(gallery):
    service = FaceService(PixelEmbedder(), gallery, ServiceStats())
    app = create_app(service, GuardSettings(KEY, max_requests=0))
    by_method = {"get": 200, "post": 503, "delete": 422}  # the id is missing
    for operation in operations():
        response = asked(app, operation, [WHOLE])
        assert response.status_code == by_method[operation.method], operation.label
        operation.Case().validate_response(response, checks=CONFORMANCE)


def test_a_request_on_its_way_is_counted_and_one_that_is_refused_is_not(gallery):
    """Two may come; a refused one, or one with nothing to work on, takes nobody's place."""
    search = next(operation for operation in operations() if operation.label == "POST /v1/search")
    service = FaceService(PixelEmbedder(), gallery, ServiceStats())
    app = create_app(service, GuardSettings(KEY, max_requests=2, body_timeout_s=1.0))
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(asked, app, search, [BODY]) for _ in range(2)]
        time.sleep(0.3)
        assert asked(app, search, []).status_code == 503
        assert asked(app, search, [], key="a wrong one").status_code == 401
        assert [one.result().status_code for one in slow] == [408, 408]
    page = SimpleNamespace(label="POST /health")
    app = create_app(service, GuardSettings(KEY, max_requests=0))
    assert asked(app, page, [WHOLE], key="").status_code == 405
    assert asked(app, page, [{**BODY, "body": bytes(20_000)}], key="").status_code == 413


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/secret/path"), "No space left on device"),
        (KeyError("a secret"), "a fault of the service"),
    ],
)
def test_a_fault_is_described_and_tells_no_secret(gallery, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    service = FaceService(PixelEmbedder(), gallery, ServiceStats())
    monkeypatch.setattr(Gallery, "add", fail)
    with TestClient(create_app(service, GuardSettings(KEY)), headers=HEADERS, raise_server_exceptions=False) as client:
        response = client.post("/v1/entries", files={"image": image(9)}, data={"subject_id": "eve"})
        assert response.status_code == 500
        assert message in response.json()["error"]
        assert "secret" not in response.text
        enrol = next(operation for operation in operations() if operation.label == "POST /v1/entries")
        enrol.Case().validate_response(response, checks=CONFORMANCE)
        assert client.post("/v1/search", files={"image": image(1)}).status_code == 200


def test_other_addresses_and_methods_are_answered_in_the_same_form(client):
    missing = client.get("/v1/nothing")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found"})
    wrong = client.put("/v1/entries")
    assert (wrong.status_code, wrong.json()) == (405, {"error": "Method Not Allowed"})
    assert wrong.headers["allow"] == "DELETE, POST"


def test_the_description_names_the_key_and_all_operations(client):
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        *("/health", "/metrics", "/v1/gallery", "/v1/status"),
        *("/v1/search", "/v1/compare", "/v1/entries", "/v1/subjects"),
    }
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path != "/health")
