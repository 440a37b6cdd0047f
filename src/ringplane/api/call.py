"""A request as the handlers see it: its path, flags and body, checked, and what it is about."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from ringplane.control.export import Export
from ringplane.control.operation_errors import STOPPING, OperationError, Unavailable, WrongValue
from ringplane.control.server import Server
from ringplane.options.durations import MAX_SECONDS, parse_seconds

Result = TypeVar("Result")
Body = TypeVar("Body")

# Of a body; a disk has some 30 short keys.
MAX_BODY = 64 << 10

# What to do about a wrong one.
BODIES = "GET /openapi.json describes the body"

NUMBER = re.compile("[0-9]{1,20}")

PLACE = re.compile(r"^(.*?)(?: - at `\$\.?(.*)`)?$", re.DOTALL)


class TooLarge(OperationError):
    """The body is longer than any that makes sense."""


class Call:
    """One request to this server."""

    def __init__(self, request: Request, server: Server) -> None:
        self._request, self.server = request, server

    @property
    def headers(self) -> Any:
        """By name, in any case."""
        return self._request.headers

    @property
    def description(self) -> bytes:
        """openapi.json."""
        text: bytes = self._request.app.state.description
        return text

    @property
    def name(self) -> str:
        """In the path."""
        name: str = self._request.path_params["name"]
        return name

    @property
    def policy(self) -> str:
        """The name of a policy in the path."""
        name: str = self._request.path_params["policy"]
        return name

    @property
    def export(self) -> Export:
        """The disk that the path names. Raises NoSuchDisk."""
        return self.server.find(self.name)

    def flag(self, name: str) -> bool:
        """A flag in the query. Raises WrongValue."""
        value = self._request.query_params.get(name, "false")
        if value not in ("true", "false"):
            raise WrongValue(f"{value!r} is neither true nor false", name, "true, false")
        return value == "true"

    def seconds(self, name: str, lowest: float) -> float | None:
        """A length of time in the query, or None. Raises WrongValue."""
        text = self._request.query_params.get(name)
        try:
            return None if text is None else parse_seconds(text, lowest)
        except ValueError as error:
            raise WrongValue(str(error), name, f"{lowest:g} to {MAX_SECONDS}") from None

    def number(self, name: str) -> int | None:
        """A whole number in the query, or None. Raises WrongValue."""
        text = self._request.query_params.get(name)
        if text is not None and not NUMBER.fullmatch(text):
            raise WrongValue(f"{text!r} is not a whole number", name, "up to 20 digits")
        return None if text is None else int(text)

    def several(self, name: str) -> list[str]:
        """All values of this name in the query."""
        values: list[str] = self._request.query_params.getlist(name)
        return values

    async def body(self, kind: type[Body], default: Body | None = None) -> Body:
        """The body; `default` if it is empty. Raises WrongValue, TooLarge."""
        data = await self._read()
        if not data and default is not None:
            return default
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError as error:
            found = PLACE.match(str(error))
            what, where = found.groups() if found else (str(error), "")
            raise WrongValue(what, where or "", BODIES) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise WrongValue(f"the body is not JSON: {error}", "", BODIES) from None

    async def _read(self) -> bytes:
        data = bytearray()
        too_large = TooLarge(f"the body has more than {MAX_BODY} bytes", "", BODIES)
        if (length := self.headers.get("content-length", "")).isdigit() and int(length[:20]) > MAX_BODY:
            raise too_large
        try:
            async for part in self._request.stream():
                data += part
                if len(data) > MAX_BODY:
                    raise too_large
        except ClientDisconnect:
            raise WrongValue("the client has gone") from None
        return bytes(data)

    async def operate(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The result of a coroutine on the control thread, which is not cancelled with this request."""
        try:
            called = self.server.threads.call(work)
        except RuntimeError:
            raise Unavailable(*STOPPING) from None
        try:
            return await asyncio.shield(asyncio.wrap_future(called))
        except asyncio.CancelledError:
            if called.cancelled():
                raise Unavailable(*STOPPING) from None
            raise
