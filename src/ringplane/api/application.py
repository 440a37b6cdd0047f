"""The application: routes to handlers, and every error in one shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from ringplane import __version__
from ringplane.api.call import Call, TooLarge
from ringplane.api.openapi import describe
from ringplane.api.routes import OPENAPI, Route
from ringplane.api.schemas import Error, Problem
from ringplane.control.operation_errors import (
    NoSuchDisk,
    NoSuchPolicy,
    OperationError,
    Unavailable,
    WrongState,
    WrongValue,
)
from ringplane.control.server import Server

log = logging.getLogger(__name__)

STATUSES: dict[type[OperationError], int] = {
    WrongValue: 400,
    NoSuchDisk: 404,
    NoSuchPolicy: 404,
    WrongState: 409,
    TooLarge: 413,
    Unavailable: 503,
}


def make_application(server: Server, routes: Iterable[Route]) -> Starlette:
    """These operations on this server."""
    routes = list(routes)
    paths: dict[str, dict[str, Route]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = route
    application = Starlette(
        routes=[StarletteRoute(path, _by_method(methods, server), methods=ALL) for path, methods in paths.items()],
        exception_handlers={HTTPException: _not_found(paths)},
    )
    application.router.redirect_slashes = False
    application.state.description = describe(routes, __version__)
    return application


# All that HTTP has: a method that a path does not have gets our own answer.
ALL = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def _by_method(routes: dict[str, Route], server: Server) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint of Starlette for all operations of one path."""

    async def endpoint(request: Request) -> Response:
        route = routes.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            right = f"possible are {', '.join(routes)}"
            response = error_response(405, f"{request.method} is not possible here", request.url.path, right)
            response.headers["allow"] = ", ".join(routes)
            return response
        return await _answer(route, Call(request, server))

    return endpoint


async def _answer(route: Route, call: Call) -> Response:
    try:
        answer = await route.handler(call)
    except OperationError as error:
        return error_response(STATUSES[type(error)], error.what, error.where, error.right)
    except Exception:
        log.exception("%s %s: internal error; please report it", route.method, route.path)
        return error_response(500, "internal error", "", "please report it; the log has the details")
    if answer is None:
        return Response(status_code=route.status)
    if isinstance(answer, Response):
        return answer
    return Response(msgspec.json.encode(answer), route.status, media_type="application/json")


def error_response(status: int, what: str, where: str = "", right: str = "") -> Response:
    """An error in the shape of all of them."""
    body = msgspec.json.encode(Error(Problem(what, where, right)))
    return Response(body, status, media_type="application/json")


def _not_found(paths: Collection[str]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """The answer of an application that has these paths to others."""
    right = f"GET {OPENAPI.path} lists all paths" if OPENAPI.path in paths else f"possible are {', '.join(paths)}"

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(404, "there is nothing at this path", request.url.path, right)

    return answer
