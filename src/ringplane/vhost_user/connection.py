"""One vhost-user connection without its socket: bytes and fds in, messages out.

A `Connection` checks everything that can be checked without knowing the device: header, sizes, number of fds, order of
replies. Fds handed to it are its own from then on; it passes them on in a `Message` or closes them.

Source: QEMU's docs/interop/vhost-user.rst, sections "Header", "Communication" and "VHOST_USER_PROTOCOL_F_REPLY_ACK".
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

from ringplane.vhost_user.message_rules import BACKEND_RULES, RULES, Rule
from ringplane.vhost_user.messages import (
    HEADER,
    HEADER_SIZE,
    MAX_FDS,
    NEED_REPLY,
    REPLY,
    VERSION,
    VERSION_MASK,
    BackendRequest,
    ProtocolError,
    Request,
    UsageError,
)
from ringplane.vhost_user.payloads import U64, Config, Empty, Opaque, Payload

AnyRequest = Request | BackendRequest

_NO_PAYLOAD = Empty()


class Role(Enum):
    """Which end of the connection we are."""

    FRONT_END = "front end"
    BACK_END = "back end"


class Message:
    """One message received, with the fds that came with it.

    `request` is a `Request` or a `BackendRequest`; it is a plain int only in an `UnknownRequest`. `flags` is the
    header's. The message owns its fds: `take_fds` hands them over, and `close`, or leaving a `with` block, closes those
    that were not taken.
    """

    __slots__ = ("_fds", "flags", "payload", "position", "request")

    def __init__(
        self, request: AnyRequest | int, flags: int, payload: Payload, fds: Iterable[int] = (), position: int = 0
    ) -> None:
        self._fds = list(fds)
        self.request = request
        self.flags = flags
        self.payload = payload
        #: How many messages the connection had received before this one.
        self.position = position

    @property
    def need_reply(self) -> bool:
        """Whether the sender asks for an acknowledgement (which counts only if REPLY_ACK was negotiated)."""
        return bool(self.flags & NEED_REPLY)

    @property
    def name(self) -> str:
        """The request's name in the specification, or its number in words."""
        return _name(self.request)

    @property
    def fds(self) -> tuple[int, ...]:
        """The fds that still belong to this message."""
        return tuple(self._fds)

    def take_fds(self) -> list[int]:
        """Hand the fds over to the caller, who closes them from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close the fds that were not taken. May be called again."""
        _close_all(self.take_fds())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A cancelled task can drop a message that nobody ever saw; its fds must not stay open.
        self.close()

    def __repr__(self) -> str:
        return f"Message({self.name}, flags={self.flags:#x}, {self.payload!r}, fds={self._fds})"


class UnknownRequest(ProtocolError):
    """A request number that the specification does not have.

    Its payload has been read, its fds are closed, and the connection continues. `message` (its payload is an `Opaque`,
    its `request` a plain int) can be given to `Connection.reply` with a `U64` other than 0 if it has `need_reply`.
    """

    def __init__(self, message: Message) -> None:
        super().__init__(f"{message.name} is not in the specification")
        self.message = message


@dataclass(frozen=True, slots=True)
class _Incoming:
    """The message being received, as described by its header."""

    request: AnyRequest | int
    flags: int
    size: int
    payload_type: type[Payload]
    min_fds: int
    max_fds: int


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A request that was sent and whose reply has not come yet."""

    request: AnyRequest
    payload: Payload
    rule: Rule


class Connection:
    """The protocol's state at one end of a channel.

    On the main channel the front end sends requests and the back end replies. With `backend_channel` it is the other
    way round (section "Back-end message types"): the back end sends `BackendRequest`s and the front end replies.

    A reader asks `wanted`, reads at most as many bytes, and gives them to `receive` with the fds that came along. So it
    never reads past a message, and the kernel cannot mix its fds with the next message's.
    """

    def __init__(self, role: Role, *, backend_channel: bool = False) -> None:
        self.role = role
        self._requests: type[AnyRequest] = BackendRequest if backend_channel else Request
        self._asks = (role is Role.FRONT_END) != backend_channel
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._incoming: _Incoming | None = None
        self._awaited: deque[_Awaited] = deque()
        self._received = 0
        self._last_replied = -1
        self._refusal: str | None = None

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most; never 0. Raises ProtocolError if the connection takes no more."""
        self._check_open()
        return self._end_of_part() - len(self._buffer)

    @property
    def awaiting(self) -> int:
        """How many replies are still to come."""
        return len(self._awaited)

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take `data`, at most `wanted` bytes, and the fds that came with it; the message if it is now complete.

        The fds belong to the connection from the call on, whatever the outcome. Raises UnknownRequest, after which it
        continues; any other ProtocolError, after which it rejects everything; UsageError if `data` is too long.
        """
        self._fds.extend(fds)
        try:
            self._take(data)
            return self._advance()
        except UnknownRequest:
            raise
        except ProtocolError as error:
            self._refuse(f"the connection has failed before: {error}")
            raise
        except UsageError:
            self._close_fds()
            raise

    @property
    def unfinished(self) -> tuple[bytes, tuple[int, ...]]:
        """What has been received of the next message: its bytes, and its fds, which stay the connection's."""
        coming = self._incoming
        header = b"" if coming is None else HEADER.pack(coming.request, coming.flags, coming.size)
        return header + self._buffer, tuple(self._fds)

    def receive_again(self, data: bytes, fds: Sequence[int]) -> None:
        """Take what was `unfinished` in another connection; raises the same as `receive`."""
        self.receive(data[:HEADER_SIZE], fds)
        if len(data) > HEADER_SIZE:
            self.receive(data[HEADER_SIZE:])

    def receive_eof(self) -> None:
        """Take note that the peer closed its end. Raises ProtocolError if that was inside a message."""
        self._check_open()
        if not self._buffer and self._incoming is None:
            return
        where = _name(self._incoming.request) if self._incoming else "a header"
        problem = f"the peer closed the connection inside {where}"
        self._refuse(problem)
        raise ProtocolError(problem)

    def close(self) -> None:
        """Close the fds of a half-received message and take no more. May be called again."""
        self._refuse("the connection was closed on this side")

    def send(
        self,
        request: AnyRequest,
        payload: Payload = _NO_PAYLOAD,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> bytes:
        """The bytes of a request, to be sent together with `fds`, which stay the caller's; its reply is now awaited.

        A reply will come if the request's rule has one, or with `need_reply` (only if REPLY_ACK was negotiated).
        Raises UsageError if the request is not ours to send, or payload or number of fds do not match its rule.
        """
        if not self._asks or not isinstance(request, self._requests):
            raise UsageError(f"{_name(request)} is not sent by the {self.role.value} on this channel")
        rule = rule_of(request)
        data = encode_request(request, payload, need_reply=need_reply)
        _check_type(request, payload, (rule.payload,))
        problem = _fd_problem(len(fds), payload.fd_count, rule.min_fds, rule.max_fds)
        if problem:
            raise UsageError(f"{_name(request)}: {problem}")
        if need_reply or rule.reply is not None:
            self._awaited.append(_Awaited(request, payload, rule))
        return data

    def reply(self, message: Message, payload: Payload, fds: Sequence[int] = ()) -> bytes:
        """The bytes of the reply to `message`, to be sent together with `fds`, which stay the caller's.

        Raises UsageError if the message asks for no reply, was replied to, or came before one that was (replies go in
        the order of the requests), or if payload or number of fds do not match its rule.
        """
        rule = rule_of(message.request)
        if self._asks or not (message.need_reply or rule.reply):
            raise UsageError(f"{message.name} asks for no reply from the {self.role.value}")
        if message.position <= self._last_replied:
            raise UsageError(f"{message.name} or a later request was replied to already")
        _check_type(message.request, payload, _reply_types(rule))
        if len(fds) > rule.max_reply_fds:
            raise UsageError(f"{message.name}: {len(fds)} fds with the reply, at most {rule.max_reply_fds} are allowed")
        data = encode_reply(message, payload)
        self._last_replied = message.position
        return data

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise ProtocolError(self._refusal)

    def _refuse(self, why: str) -> None:
        self._refusal = self._refusal or why
        self._buffer.clear()
        self._incoming = None
        self._close_fds()

    def _close_fds(self) -> None:
        fds, self._fds = self._fds, []
        _close_all(fds)

    def _end_of_part(self) -> int:
        return HEADER_SIZE if self._incoming is None else self._incoming.size

    def _take(self, data: bytes) -> None:
        wanted = self.wanted
        if len(data) > wanted:
            raise UsageError(f"{len(data)} bytes were received where at most {wanted} were wanted")
        self._buffer += data

    def _advance(self) -> Message | None:
        self._check_not_too_many_fds()
        if self._incoming is None and len(self._buffer) == HEADER_SIZE:
            self._incoming = self._open_header(*HEADER.unpack(self._buffer))
            self._buffer.clear()
            self._check_not_too_many_fds()
        if self._incoming is None or len(self._buffer) < self._incoming.size:
            return None
        return self._finish(self._incoming)

    def _check_not_too_many_fds(self) -> None:
        # At once, not at the end of the message: a peer must not make us hold fds without limit.
        most = MAX_FDS if self._incoming is None else self._incoming.max_fds
        if len(self._fds) > most:
            where = _name(self._incoming.request) if self._incoming else "a message"
            raise ProtocolError(f"{where}: {_fd_problem(len(self._fds), None, 0, most)}")

    def _open_header(self, number: int, flags: int, size: int) -> _Incoming:
        name = _name(self._known(number))
        if flags & VERSION_MASK != VERSION:
            raise ProtocolError(f"{name}: its version is {flags & VERSION_MASK}, must be {VERSION}")
        incoming = self._open_reply(number, flags, size) if self._asks else self._open_request(number, flags, size)
        with _naming(name):
            incoming.payload_type.check_size(size)
        return incoming

    def _open_request(self, number: int, flags: int, size: int) -> _Incoming:
        request = self._known(number)
        if flags & REPLY:
            raise ProtocolError(f"{_name(request)}: a request has the reply flag")
        rule = rule_of(request)
        return _Incoming(request, flags, size, rule.payload, rule.min_fds, rule.max_fds)

    def _open_reply(self, number: int, flags: int, size: int) -> _Incoming:
        name = _name(self._known(number))
        if not flags & REPLY:
            raise ProtocolError(f"{name}: a reply lacks the reply flag")
        if not self._awaited:
            raise ProtocolError(f"{name}: a reply came although none was awaited")
        awaited = self._awaited[0]
        if number != awaited.request:
            raise ProtocolError(f"a reply to {name} came where one to {_name(awaited.request)} was awaited")
        # Only a rule that allows an empty reply has a second type.
        payload_type, *empty = _reply_types(awaited.rule)
        if empty and size == 0:
            payload_type = Empty
        return _Incoming(awaited.request, flags, size, payload_type, 0, awaited.rule.max_reply_fds)

    def _known(self, number: int) -> AnyRequest | int:
        try:
            return self._requests(number)
        except ValueError:
            return number

    def _finish(self, incoming: _Incoming) -> Message:
        with _naming(_name(incoming.request)):
            payload = incoming.payload_type.decode(bytes(self._buffer))
            if self._asks:
                _check_config_reply(self._awaited.popleft(), payload)
            else:
                problem = _fd_problem(len(self._fds), payload.fd_count, incoming.min_fds, incoming.max_fds)
                if problem:
                    raise ProtocolError(problem)
        message = Message(incoming.request, incoming.flags, payload, self._fds, self._received)
        self._buffer.clear()
        self._incoming = None
        self._fds = []
        self._received += 1
        if not isinstance(message.request, AnyRequest):
            message.close()
            raise UnknownRequest(message)
        return message


# For a request that the specification does not have: see UnknownRequest.
_UNKNOWN_RULE = Rule(Opaque, None, 0, MAX_FDS)


def rule_of(request: AnyRequest | int) -> Rule:
    """The rule for a request of either channel, or a lenient one for a number that is in neither table."""
    if isinstance(request, Request):
        return RULES[request]
    if isinstance(request, BackendRequest):
        return BACKEND_RULES[request]
    return _UNKNOWN_RULE


def encode_request(request: int, payload: Payload = _NO_PAYLOAD, *, need_reply: bool = False) -> bytes:
    """The bytes of a request, with no check of any rule (`Connection.send` checks)."""
    return _encode(request, VERSION | (NEED_REPLY if need_reply else 0), payload)


def encode_reply(message: Message, payload: Payload) -> bytes:
    """The bytes of a reply to `message`, with no check of any rule (`Connection.reply` checks)."""
    return _encode(message.request, VERSION | REPLY, payload)


def _encode(request: int, flags: int, payload: Payload) -> bytes:
    body = payload.encode()
    return HEADER.pack(request, flags, len(body)) + body


def _reply_types(rule: Rule) -> tuple[type[Payload], ...]:
    usual = rule.reply or U64
    return (usual, Empty) if rule.may_reply_empty else (usual,)


def _check_type(request: int, payload: Payload, allowed: tuple[type[Payload], ...]) -> None:
    if not isinstance(payload, allowed):
        names = " or ".join(payload_type.__name__ for payload_type in allowed)
        raise UsageError(f"{_name(request)}: its payload is {type(payload).__name__}, must be {names}")


def _check_config_reply(awaited: _Awaited, payload: Payload) -> None:
    """Section "Front-end message types", GET_CONFIG: as many bytes as were asked for, or none for failure."""
    asked = awaited.payload
    if isinstance(asked, Config) and isinstance(payload, Config) and payload.size not in (0, asked.size):
        raise ProtocolError(f"{asked.size} bytes were asked for, but the reply has {payload.size}")


def _fd_problem(count: int, exact: int | None, least: int, most: int) -> str | None:
    """What is wrong with a number of fds, in words, or None."""
    if exact is not None:
        least = most = exact
    if least <= count <= most:
        return None
    bound = f"must be {most}" if least == most else f"must be from {least} to {most}"
    return f"{count} fds came with it, {bound}"


def _name(request: int) -> str:
    return request.name if isinstance(request, AnyRequest) else f"request number {request}"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the message's name in front of any ProtocolError from the block."""
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(f"{name}: {error}") from error


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        # An error of close(2) (an I/O error of a file, for example) must not keep the others open.
        with suppress(OSError):
            os.close(fd)
