"""The HTTP interface: enrol, search, compare, delete, the page, health and metrics."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import Depends, FastAPI, File, Form, Query, Response, UploadFile
from fastapi.security import HTTPBearer
from numpy.typing import NDArray
from pydantic import AfterValidator, WithJsonSchema

from aroface import __version__
from launch.serve.guard import Guard, GuardSettings
from launch.serve.problems import ANYWHERE, ON_DELETION, ON_FACES, WITHOUT_KEY, add_handlers
from launch.serve.schema import (
    Comparison,
    EnrolledEntry,
    GalleryState,
    Health,
    Match,
    Matches,
    Removed,
    Status,
    Threshold,
)
from launch.serve.service import FaceService, Found
from launch.serve.uploads import parse_landmarks

__all__ = ["create_app"]

_LONGEST_ID = 200
_MORE_THREADS = 16  # for what is no face: the state, deletions, the page
_PAGE_FILES = {f"/{name}": name for name in ("page.css", "page.js", "icon.svg")} | {"/": "index.html"}
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def _as_id(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("an id is printable text that is not empty")
    if len(text) > _LONGEST_ID:
        raise ValueError(f"an id has {_LONGEST_ID} characters at the most, this one {len(text)}")
    return text


_VISIBLE = r"[\p{L}\p{M}\p{N}\p{P}\p{S}]"
#: What `_as_id` takes.
_ID_SCHEMA = {
    "type": "string",
    "minLength": 1,
    "maxLength": _LONGEST_ID,
    "pattern": f"^ *{_VISIBLE}({_VISIBLE}| )*$",
}
_Id = Annotated[str, AfterValidator(_as_id), WithJsonSchema(_ID_SCHEMA)]
_IdField = Annotated[_Id, Form()]
_IdQuery = Annotated[_Id, Query()]
_Image = Annotated[UploadFile, File(description="JPEG or PNG: an aligned square crop, or a photograph with landmarks")]
_Landmarks = Annotated[
    str | None, Form(description="JSON [[x, y], ...] of left eye, right eye, nose, mouth corners, in pixels")
]


def create_app(service: FaceService, settings: GuardSettings) -> FastAPI:
    """The application of one service; the server closes the service when it stops.

    Args:
        service: model and gallery.
        settings: key and limits.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threads = settings.max_requests + _MORE_THREADS  # a request that waits for its answer holds one
        anyio.to_thread.current_default_thread_limiter().total_tokens = threads
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(
        title="aroface",
        version=__version__,
        description="Face identification. Scores are cosines; what a score means is calibrated on the gallery.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # an answer that the description does not know
    )
    app.add_middleware(Guard, settings=settings, stats=service.stats)
    add_handlers(app)
    _add_pages(app)
    _add_state(app, service)
    _add_faces(app, service)
    return app


def _add_pages(app: FastAPI) -> None:
    folder = files("launch.serve") / "page"

    def serve(name: str) -> Callable[[], Response]:
        content = (folder / name).read_bytes()
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return lambda: Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    for path, name in _PAGE_FILES.items():
        app.add_api_route(path, serve(name), include_in_schema=False)


def _add_state(app: FastAPI, service: FaceService) -> None:
    key = [Depends(HTTPBearer(auto_error=False))]  # for the description; Guard checks it

    @app.get("/health", responses=WITHOUT_KEY)
    async def health() -> Health:
        """Whether the service is up; needs no key."""
        return Health(status="ok")

    @app.get("/metrics", dependencies=key, response_class=Response, responses={**ANYWHERE, 200: {"content": _TEXT}})
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        text = service.stats.exposition(depths=service.depths(), entries=len(service.gallery))
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/gallery", dependencies=key, responses=ANYWHERE)
    def gallery() -> GalleryState:
        """What is searched, and with what."""
        info = service.gallery.info
        return GalleryState(
            name=_as_unicode(info.name),
            entries=info.count,
            subjects=info.num_subjects,
            dimension=info.dimension,
            index=info.index,
            model=service.embedder.model_id,
            image_size=service.embedder.contract.image_size,
            thresholds=[
                Threshold(fpir=p.fpir, score=p.threshold, level=p.level, doubts=p.doubts(info.count))
                for p in info.calibration
            ],
            detects_faces=service.detector is not None,
        )

    @app.get("/v1/status", dependencies=key, responses=ANYWHERE)
    async def status() -> Status:
        """Load and speed."""
        speed = service.stats.speed()
        return Status(
            waiting=service.depths(),
            requests_per_s=speed.requests_per_s,
            median_ms=speed.median_ms,
            p99_ms=speed.p99_ms,
        )


_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def _add_faces(app: FastAPI, service: FaceService) -> None:
    key = [Depends(HTTPBearer(auto_error=False))]

    def read(upload: UploadFile, landmarks: str | None) -> "NDArray[Any]":
        return service.crop(upload.file.read(), parse_landmarks(landmarks))

    @app.post("/v1/search", dependencies=key, responses=ON_FACES)
    def search(
        image: _Image,
        landmarks: _Landmarks = None,
        top: Annotated[int, Form(ge=1, le=100, description="length of the list")] = 5,
        level: Annotated[Literal["entry", "subject", "pooled"], Form(description="what a candidate is")] = "subject",
    ) -> Matches:
        """The most similar faces of the gallery, best first."""
        found = service.search(read(image, landmarks), top=top, level=level)
        is_calibrated = bool(service.gallery.calibration_at(level))
        meanings = [_meaning(one, level, len(service.gallery), is_calibrated=is_calibrated) for one in found]
        matches = [_match(one, meaning) for one, meaning in zip(found, meanings, strict=True)]
        return Matches(matches=matches, is_calibrated=is_calibrated)

    @app.post("/v1/compare", dependencies=key, responses=ON_FACES)
    def compare(
        first: _Image, second: _Image, first_landmarks: _Landmarks = None, second_landmarks: _Landmarks = None
    ) -> Comparison:
        """How similar two faces are."""
        return Comparison(score=service.compare(read(first, first_landmarks), read(second, second_landmarks)))

    @app.post("/v1/entries", status_code=201, dependencies=key, responses=ON_FACES)
    def enrol(
        image: _Image,
        subject_id: _IdField,
        entry_id: Annotated[_Id | None, Form(description="default: a new one")] = None,
        landmarks: _Landmarks = None,
    ) -> EnrolledEntry:
        """Enrol one face; it is on disk when the answer comes."""
        entry = service.enrol(read(image, landmarks), subject_id, entry_id)
        return EnrolledEntry(entry_id=entry.entry_id, subject_id=entry.subject_id, norm=entry.norm)

    @app.delete("/v1/entries", dependencies=key, responses=ON_DELETION)
    def remove_entry(entry_id: _IdQuery) -> Removed:
        """Delete one entry."""
        return Removed(entries=service.remove(entry_id=entry_id))

    @app.delete("/v1/subjects", dependencies=key, responses=ON_DELETION)
    def remove_subject(subject_id: _IdQuery) -> Removed:
        """Delete all entries of a subject."""
        return Removed(entries=service.remove(subject_id=subject_id))


def _meaning(found: Found, level: str, entries: int, *, is_calibrated: bool) -> str:
    if not is_calibrated:
        return f"the gallery is not calibrated at level {level}: a score means nothing by itself"
    if found.point is None:
        return "below every calibrated threshold: take it as no match"
    doubts = "; ".join(found.point.doubts(entries))
    meaning = f"a match at the threshold where {100 * found.point.fpir:g} % of strangers raise a false alarm"
    return f"{meaning} (uncertain: {doubts})" if doubts else meaning


def _as_unicode(name: str) -> str:
    """A name as JSON can carry it; of a file whose name is no Unicode, such bytes are spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _match(found: Found, meaning: str) -> Match:
    return Match(
        rank=found.candidate.rank,
        subject_id=_as_unicode(found.candidate.subject_id),
        entry_id=_as_unicode(found.candidate.entry_id),
        score=found.candidate.score,
        fpir=None if found.point is None else found.point.fpir,
        meaning=meaning,
    )
