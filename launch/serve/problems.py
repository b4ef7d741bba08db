"""Answers other than success: how each is described, and which error gives it."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from aroface.errors import ArofaceError, ConfigError
from launch.serve.batching import QueueFullError
from launch.serve.schema import Problem
from launch.serve.service import ConflictError, NotEnrolledError
from launch.serve.uploads import UnsupportedImageError

__all__ = ["ANYWHERE", "ON_DELETION", "ON_FACES", "WITHOUT_KEY", "Responses", "add_handlers"]

Responses = dict[int | str, dict[str, Any]]

logger = logging.getLogger(__name__)

_MEANINGS = {
    400: "the request is not well formed",
    401: "no access key, or a wrong one",
    403: "sent by a page of another site",
    404: "not enrolled",
    408: "the request came too slowly",
    409: "the gallery, as it is, cannot take it",
    413: "too large",
    415: "neither JPEG nor PNG",
    422: "a field or an image that cannot be used",
    500: "a fault of the service, such as a full disk; its log tells more",
    503: "too many requests are waiting",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    503: {
        "Retry-After": {
            "description": "seconds after which to ask again",
            "required": True,
            "schema": {"type": "integer", "minimum": 1},
        }
    },
}


def _described(*statuses: int) -> Responses:
    return {
        status: {"model": Problem, "description": _MEANINGS[status]}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


#: What the guard or the server may answer to any request, and a fault of the service.
WITHOUT_KEY = _described(400, 403, 408, 413, 500, 503)
ANYWHERE = _described(400, 401, 403, 408, 413, 500, 503)
ON_FACES = _described(400, 401, 403, 408, 409, 413, 415, 422, 500, 503)
ON_DELETION = _described(400, 401, 403, 404, 408, 409, 413, 422, 500, 503)

_STATUSES: dict[type[Exception], int] = {
    QueueFullError: 503,
    NotEnrolledError: 404,
    ConflictError: 409,
    UnsupportedImageError: 415,
    ConfigError: 500,  # a search that finds no room on the GPUs any more
    ArofaceError: 422,
}


def add_handlers(app: FastAPI) -> None:
    """Turn errors into answers of the form `Problem`."""
    for kind, status in _STATUSES.items():
        app.add_exception_handler(kind, _answer(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(OSError, _failed_disk)
    app.add_exception_handler(Exception, _fault)


def _answer(status: int) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse({"error": str(error)}, status, headers)

    return handler


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
    problems = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
    return JSONResponse({"error": "; ".join(problems)}, 422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    headers = dict(error.headers or {})
    if error.status_code == 405:  # of itself the framework names the methods of one route at this address
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers)


async def _failed_disk(request: Request, error: Exception) -> JSONResponse:
    """The words of the system, such as "No space left on device"; paths are for the log."""
    assert isinstance(error, OSError)  # noqa: S101 - registered for it alone
    logger.error("%s failed.", request.method, exc_info=error)
    return JSONResponse({"error": f"The service could not read or write its files: {error.strerror}."}, 500)


async def _fault(request: Request, error: Exception) -> JSONResponse:
    """Whatever it is, the server logs it, and the caller is not told."""
    return JSONResponse({"error": "This is a fault of the service; its log tells more."}, 500)
