"""Requests to the API of a running process."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec

from ringplane.api.schemas import Error
from ringplane.client.api_errors import NoConnection, Refused, not_connected
from ringplane.client.unix_http import PATIENCE, UnixConnection

Body = TypeVar("Body")


class Request:
    """A request that has been sent, on a connection of its own. Its `fileno` is readable when the answer begins."""

    def __init__(self, path: Path, connection: UnixConnection) -> None:
        self._path, self._connection = path, connection

    def fileno(self) -> int:
        """The socket."""
        return self._connection.sock.fileno()

    def set_patience(self, patience: float | None) -> None:
        """How many seconds to wait for the other end, each time; None: without a limit."""
        self._connection.sock.settimeout(patience)

    def response(self) -> http.client.HTTPResponse:
        """What is answered, from its body on. Raises ApiError."""
        with self._ended_early():
            response = self._connection.getresponse()
            if response.status >= 400:
                raise self._error(response.status, response.read())
        return response

    def body(self) -> bytes:
        """The whole answer. Raises ApiError."""
        try:
            response = self.response()
            with self._ended_early():
                return response.read()
        finally:
            self.close()

    def abort(self) -> None:
        """End the answer for a thread that reads it."""
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give up the answer, or what is left of it. May be called again."""
        self._connection.close()

    @contextlib.contextmanager
    def _ended_early(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise NoConnection(f"{self._path}: no answer; does the process hang, or is it stopped?") from None
        except (OSError, http.client.HTTPException):
            raise EndedEarly(
                f"{self._path}: the connection ended without an answer; the process has stopped, or this is the socket "
                "of a disk and not that of --api-socket"
            ) from None

    def _error(self, status: int, data: bytes) -> Exception:
        try:
            problem = msgspec.json.decode(data, type=Error).error
        except msgspec.MsgspecError:
            return NoConnection(f"{self._path}: this is not the API of ringplane, it answers with status {status}")
        return Refused(problem.what, problem.where, problem.right)


class EndedEarly(NoConnection):
    """The connection ended without an answer. Whether the request was carried out is unknown."""


class Client:
    """Asks the API on this socket."""

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.path, self._patience = path, patience

    def send(self, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None) -> Request:
        """Begin a request. Raises NoConnection."""
        connection = UnixConnection(self.path, self._patience)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise not_connected(self.path, error) from None
        # If the other end has closed already, there may be an answer that says why.
        with contextlib.suppress(OSError):
            data = None if body is None else msgspec.json.encode(body)
            connection.request(method, target, data, dict(headers or {}))
        return Request(self.path, connection)

    def ask(self, method: str, target: str, body: object = None) -> bytes:
        """The body of the answer. Raises ApiError."""
        try:
            return self.send(method, target, body).body()
        except EndedEarly:
            # The process was replaced (--upgrade): whoever only reads can ask the next one.
            if method != "GET":
                raise
        return self.send(method, target, body).body()

    def read(self, target: str, kind: type[Body]) -> Body:
        """What GET answers. Raises ApiError."""
        return self.decode(self.ask("GET", target), kind)

    def decode(self, data: bytes, kind: type[Body]) -> Body:
        """An answer as an object. Raises NoConnection."""
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise NoConnection(
                f"{self.path}: the answer is not one of this version's API ({error}); use the ringplane that serves it"
            ) from None


def disk_path(name: str, action: str = "") -> str:
    """The path of a disk, or of what can be done with it."""
    return f"/v1/disks/{quote(name, safe='')}{f'/{action}' if action else ''}"
