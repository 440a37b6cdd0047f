"""The connection without a socket: split messages, roles, order, and no leaked fds."""

import gc
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.vhost_user.connection import (
    Connection,
    Message,
    Role,
    UnknownRequest,
    encode_reply,
    encode_request,
    rule_of,
)
from ringplane.vhost_user.message_rules import BACKEND_RULES, RULES
from ringplane.vhost_user.messages import BackendRequest, ProtocolError, Request, UsageError
from ringplane.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogRegion,
    MemoryRegion,
    MemoryTable,
    Opaque,
    Payload,
    SingleMemoryRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)

REGION = MemoryRegion(0, 4096, 1 << 40, 0)
SAMPLES: dict[type[Payload], Payload] = {
    Empty: Empty(),
    U64: U64(7),
    VringState: VringState(1, 2),
    VringAddr: VringAddr(1, 0, 16, 32, 48, 0),
    VringFd: VringFd(1),
    MemoryTable: MemoryTable((REGION, REGION)),
    SingleMemoryRegion: SingleMemoryRegion(REGION),
    LogRegion: LogRegion(4096, 0),
    Iotlb: Iotlb(0, 4096, 0, 3, 2),
    Config: Config(0, 8, 0, bytes(8)),
    VringArea: VringArea(0, 4096, 0),
    Inflight: Inflight(4096, 0, 1, 128),
    DeviceState: DeviceState(0, 0),
    Opaque: Opaque(b"0123456789abcdef"),
}


def front_end() -> Connection:
    return Connection(Role.FRONT_END)


def back_end() -> Connection:
    return Connection(Role.BACK_END)


def header(number: int, flags: int, size: int) -> bytes:
    return struct.pack("=III", number, flags, size)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


def eventfds(count: int) -> list[int]:
    return [os.eventfd(0) for _ in range(count)]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def feed(connection: Connection, data: bytes, fds: list[int] | None = None, step: int = 1 << 20) -> list[Message]:
    """Feed `data` in pieces of at most `step` bytes, the fds with the first one."""
    received = []
    while data:
        size = min(step, connection.wanted)
        message = connection.receive(data[:size], fds or [])
        data, fds = data[size:], None
        if message:
            received.append(message)
    return received


def one(connection: Connection, data: bytes, fds: list[int] | None = None) -> Message:
    (message,) = feed(connection, data, fds)
    return message


def fd_count_for(request: Request | BackendRequest, payload: Payload) -> int:
    return rule_of(request).min_fds if payload.fd_count is None else payload.fd_count


@pytest.mark.parametrize("request_", [*RULES, *BACKEND_RULES], ids=lambda r: f"{type(r).__name__}.{r.name}")
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_every_request_and_its_reply(request_: Request | BackendRequest, step: int) -> None:
    rule = rule_of(request_)
    on_backend_channel = isinstance(request_, BackendRequest)
    ends = [Connection(role, backend_channel=on_backend_channel) for role in Role]
    asker, replier = reversed(ends) if on_backend_channel else ends
    payload = SAMPLES[rule.payload]
    fds = eventfds(fd_count_for(request_, payload))

    data = asker.send(request_, payload, fds, need_reply=True)
    assert asker.awaiting == 1
    (message,) = feed(replier, data, fds, step)
    assert message.request is request_
    assert message.payload == payload
    assert message.need_reply
    assert message.fds == tuple(fds)

    answer = SAMPLES[rule.reply or U64]
    reply_fds = eventfds(rule.max_reply_fds)
    (reply,) = feed(asker, replier.reply(message, answer, reply_fds), reply_fds, step)
    assert reply.request is request_
    assert reply.payload == answer
    assert reply.fds == tuple(reply_fds)
    assert asker.awaiting == 0
    message.close()
    reply.close()
    assert not any(map(is_open, fds + reply_fds))


def requests() -> st.SearchStrategy[tuple[Request, Payload, bool]]:
    return st.tuples(st.sampled_from(list(RULES)), st.booleans()).map(
        lambda drawn: (drawn[0], SAMPLES[RULES[drawn[0]].payload], drawn[1])
    )


@given(st.lists(requests(), max_size=8), st.integers(0, 1 << 32))
def test_any_split_gives_the_same_messages(sent: list[tuple[Request, Payload, bool]], seed: int) -> None:
    # Not drawn one by one, because a draw may end the example and leak fds.
    choose = random.Random(seed).randint
    asker, replier = front_end(), back_end()
    for request, payload, need_reply in sent:
        fds = eventfds(fd_count_for(request, payload))
        rest = asker.send(request, payload, fds, need_reply=need_reply)
        message = None
        waiting_fds = list(fds)
        while rest:
            size = choose(1, replier.wanted)
            # Any piece of a message may carry fds.
            now = waiting_fds if len(rest) <= size else waiting_fds[: choose(0, len(waiting_fds))]
            waiting_fds = waiting_fds[len(now) :]
            assert message is None
            message = replier.receive(rest[:size], now)
            rest = rest[size:]
        assert message is not None
        assert (message.request, message.payload, message.need_reply) == (request, payload, need_reply)
        assert message.take_fds() == fds
        assert message.fds == ()
        for fd in fds:
            os.close(fd)


PIECES = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.builds(
        lambda number, flags, body, lie: header(number, flags, len(body) + lie) + body,
        st.integers(0, 50),
        st.sampled_from([1, 5, 9, 13, 0, 2]),
        st.binary(max_size=64),
        st.sampled_from([0, 0, 0, 1, 1 << 31]),
    ),
)


@settings(max_examples=300)
@given(
    st.sampled_from([(role, channel) for role in Role for channel in (False, True)]),
    st.lists(st.tuples(PIECES, st.integers(0, 10)), max_size=10),
    st.integers(0, 2),
    st.booleans(),
)
def test_random_bytes_give_messages_or_protocol_errors_and_leak_nothing(
    kind: tuple[Role, bool], pieces: list[tuple[bytes, int]], asked: int, eof: bool
) -> None:
    before = open_fds()
    connection = Connection(kind[0], backend_channel=kind[1])
    if kind == (Role.FRONT_END, False):
        for _ in range(asked):
            connection.send(Request.GET_INFLIGHT_FD, SAMPLES[Inflight])
    for data, fd_count in pieces:
        fds = eventfds(fd_count)
        while data:
            try:
                size = min(connection.wanted, len(data))
            except ProtocolError:
                size = len(data)
            try:
                message = connection.receive(data[:size], fds)
            except ProtocolError:
                message = None
            data, fds = data[size:], []
            if message:
                message.close()
    try:
        if eof:
            connection.receive_eof()
    except ProtocolError:
        pass
    connection.close()
    assert open_fds() == before


def refused(make: Callable[[], Connection], data: bytes, fd_count: int, words: str) -> None:
    """Check that `data` is rejected with this text, its fds are closed, and the connection accepts no more data."""
    connection = make()
    fds = eventfds(fd_count)
    with pytest.raises(ProtocolError, match=words) as caught:
        feed(connection, data, fds)
    assert not isinstance(caught.value, UnknownRequest)
    assert not any(map(is_open, fds))
    with pytest.raises(ProtocolError, match="has failed before"):
        _ = connection.wanted
    more = eventfds(1)
    with pytest.raises(ProtocolError, match="has failed before"):
        connection.receive(b"", more)
    assert not is_open(more[0])


KICK = Request.SET_VRING_KICK


@pytest.mark.parametrize(
    ("data", "fd_count", "words"),
    [
        (header(1, 0, 0), 0, "GET_FEATURES: its version is 0, must be 1"),
        (header(1, 3, 0), 0, "its version is 3"),
        (header(1, 5, 0), 0, "GET_FEATURES: a request has the reply flag"),
        (header(2, 1, 7), 0, "SET_FEATURES: its payload's size is 7 bytes, must be 8"),
        (header(2, 1, 0xFFFFFFFF), 0, "SET_FEATURES: its payload's size is 4294967295 bytes"),
        (header(5, 1, 8 + 9 * 32), 8, "SET_MEM_TABLE: its payload's size is 296 bytes"),
        (header(5, 1, 40) + struct.pack("=II", 1, 0) + bytes(32), 0, "SET_MEM_TABLE: 0 fds came with it, must be 1"),
        (header(5, 1, 40) + struct.pack("=II", 1, 0) + bytes(32), 2, "SET_MEM_TABLE: 2 fds came with it, must be 1"),
        (header(5, 1, 40) + bytes(40), 1, "SET_MEM_TABLE: 1 fds came with it, must be 0"),
        (header(5, 1, 8) + struct.pack("=II", 1, 0), 1, "SET_MEM_TABLE: it says 1 regions, but carries 0"),
        (encode_request(Request.SET_OWNER), 1, "SET_OWNER: 1 fds came with it, must be 0"),
        (encode_request(Request.SET_LOG_FD), 0, "SET_LOG_FD: 0 fds came with it, must be 1"),
        (encode_request(Request.REM_MEM_REG, SingleMemoryRegion(REGION)), 2, "2 fds came with it, must be from 0 to 1"),
        (encode_request(KICK, VringFd(0)), 0, "SET_VRING_KICK: 0 fds came with it, must be 1"),
        (encode_request(KICK, VringFd(0, no_fd=True)), 1, "SET_VRING_KICK: 1 fds came with it, must be 0"),
        (encode_request(KICK, VringFd(0)), 2, "SET_VRING_KICK: 2 fds came with it"),
        (b"\1", 9, "a message: 9 fds came with it, must be from 0 to 8"),
        (header(99, 1, 4097), 0, "request number 99: its payload's size is 4097 bytes"),
        (header(0, 5, 0), 0, "request number 0: a request has the reply flag"),
    ],
)
def test_a_back_end_refuses(data: bytes, fd_count: int, words: str) -> None:
    refused(back_end, data, fd_count, words)


def asking(request: Request, payload: Payload | None = None) -> Callable[[], Connection]:
    def make() -> Connection:
        connection = front_end()
        connection.send(request, payload or SAMPLES[RULES[request].payload])
        return connection

    return make


@pytest.mark.parametrize(
    ("make", "data", "fd_count", "words"),
    [
        (front_end, header(1, 5, 8), 0, "GET_FEATURES: a reply came although none was awaited"),
        (asking(Request.GET_FEATURES), header(1, 1, 8), 0, "GET_FEATURES: a reply lacks the reply flag"),
        (
            asking(Request.GET_FEATURES),
            header(15, 5, 8),
            0,
            "reply to GET_PROTOCOL_FEATURES came where one to GET_FEAT",
        ),
        (asking(Request.GET_FEATURES), header(99, 5, 8), 0, "reply to request number 99 came"),
        (asking(Request.GET_FEATURES), header(1, 5, 0), 0, "GET_FEATURES: its payload's size is 0 bytes, must be 8"),
        (asking(Request.GET_FEATURES), header(1, 5, 8) + bytes(8), 1, "GET_FEATURES: 1 fds came with it, must be 0"),
        (
            asking(Request.GET_CONFIG, Config.asking_for(0, 60)),
            header(24, 5, 12 + 8) + struct.pack("=III", 0, 8, 0) + bytes(8),
            0,
            "GET_CONFIG: 60 bytes were asked for, but the reply has 8",
        ),
    ],
)
def test_a_front_end_refuses(make: Callable[[], Connection], data: bytes, fd_count: int, words: str) -> None:
    refused(make, data, fd_count, words)


def test_fds_of_one_message_are_refused_before_its_payload_comes() -> None:
    connection = back_end()
    fds = eventfds(1)
    with pytest.raises(ProtocolError, match="SET_FEATURES: 1 fds came with it, must be 0"):
        connection.receive(header(2, 1, 8), fds)
    assert not is_open(fds[0])


def test_fds_that_come_one_by_one_are_counted() -> None:
    connection = back_end()
    connection.receive(header(12, 1, 8), eventfds(1))
    with pytest.raises(ProtocolError, match="SET_VRING_KICK: 2 fds came with it"):
        connection.receive(b"\0", eventfds(1))


def test_an_unknown_request_is_consumed_and_may_be_answered() -> None:
    connection = back_end()
    fds = eventfds(3)
    with pytest.raises(UnknownRequest, match="request number 99 is not in the specification") as caught:
        feed(connection, encode_request(99, Opaque(b"abc"), need_reply=True), fds)
    message = caught.value.message
    assert (message.request, message.payload, message.need_reply) == (99, Opaque(b"abc"), True)
    assert not any(map(is_open, fds))
    assert connection.reply(message, U64(1)) == header(99, 5, 8) + struct.pack("=Q", 1)
    assert one(connection, encode_request(Request.SET_OWNER)).request is Request.SET_OWNER


def test_an_unknown_request_without_need_reply_gets_no_reply() -> None:
    connection = back_end()
    with pytest.raises(UnknownRequest) as caught:
        feed(connection, encode_request(99))
    with pytest.raises(UsageError, match="request number 99 asks for no reply"):
        connection.reply(caught.value.message, U64(1))


def test_more_bytes_than_wanted_are_a_usage_error() -> None:
    connection = back_end()
    fds = eventfds(1)
    with pytest.raises(UsageError, match="13 bytes were received where at most 12 were wanted"):
        connection.receive(bytes(13), fds)
    assert not is_open(fds[0])


def test_wanted_never_exceeds_a_message() -> None:
    connection = back_end()
    data = encode_request(Request.SET_FEATURES, U64(1))
    assert connection.wanted == 12
    assert connection.receive(data[:5]) is None
    assert connection.wanted == 7
    assert connection.receive(data[5:12]) is None
    assert connection.wanted == 8
    assert connection.receive(data[12:15]) is None
    assert connection.wanted == 5
    assert connection.receive(data[15:]) is not None
    assert connection.wanted == 12


@pytest.mark.parametrize("received", [1, 12, 15])
def test_the_end_inside_a_message(received: int) -> None:
    connection = back_end()
    data = encode_request(KICK, VringFd(0))[:received]
    fds = eventfds(1)
    feed(connection, data, fds)
    with pytest.raises(ProtocolError, match=r"closed the connection inside (a header|SET_VRING_KICK)"):
        connection.receive_eof()
    assert not is_open(fds[0])


def test_the_end_between_messages() -> None:
    connection = back_end()
    connection.receive_eof()
    feed(connection, encode_request(Request.SET_OWNER))
    connection.receive_eof()


def test_close_closes_the_fds_of_half_a_message() -> None:
    connection = back_end()
    fds = eventfds(1)
    feed(connection, encode_request(KICK, VringFd(0))[:15], fds)
    connection.close()
    connection.close()
    assert not is_open(fds[0])
    with pytest.raises(ProtocolError, match="closed on this side"):
        connection.receive(b"x")
    with pytest.raises(ProtocolError, match="closed on this side"):
        connection.receive_eof()


def test_fds_belong_only_to_their_own_message() -> None:
    connection = back_end()
    fds = eventfds(1)
    first = one(connection, encode_request(KICK, VringFd(0)), fds)
    second = one(connection, encode_request(KICK, VringFd(1, no_fd=True)))
    assert first.fds == tuple(fds)
    assert second.fds == ()
    first.close()


def test_a_message_closes_fds_that_were_not_taken() -> None:
    kept, closed, dropped = eventfds(3)
    with one(back_end(), encode_request(KICK, VringFd(0)), [kept]) as message:
        assert message.take_fds() == [kept]
    with one(back_end(), encode_request(KICK, VringFd(0)), [closed]):
        pass
    one(back_end(), encode_request(KICK, VringFd(0)), [dropped])
    gc.collect()
    assert [is_open(fd) for fd in (kept, closed, dropped)] == [True, False, False]
    os.close(kept)


def test_a_message_whose_fd_cannot_be_closed_closes_the_others() -> None:
    gone, other = eventfds(2)
    message = one(back_end(), encode_request(Request.SET_MEM_TABLE, SAMPLES[MemoryTable]), [gone, other])
    os.close(gone)
    message.close()
    assert not is_open(other)


def test_a_message_names_its_request() -> None:
    message = one(back_end(), encode_request(Request.SET_FEATURES, U64(1), need_reply=True))
    assert repr(message) == "Message(SET_FEATURES, flags=0x9, U64(value=1), fds=[])"


def test_replies_are_matched_in_order() -> None:
    connection = front_end()
    connection.send(Request.GET_FEATURES)
    connection.send(Request.SET_OWNER)
    connection.send(Request.GET_QUEUE_NUM)
    connection.send(Request.SET_FEATURES, U64(0), need_reply=True)
    assert connection.awaiting == 3
    replies = [(Request.GET_FEATURES, 5), (Request.GET_QUEUE_NUM, 6), (Request.SET_FEATURES, 0)]
    for request, value in replies:
        reply = one(connection, encode_reply(Message(request, 1, Empty()), U64(value)))
        assert (reply.request, reply.payload) == (request, U64(value))
    assert connection.awaiting == 0


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "answer"),
    [
        (Request.GET_CONFIG, Config.asking_for(0, 60), [], Empty()),
        (Request.GET_CONFIG, Config.asking_for(0, 60), [], Config(0, 0, 0, b"")),
        (Request.SET_LOG_BASE, LogRegion(4096, 0), [0], Empty()),
        (Request.SET_LOG_BASE, LogRegion(4096, 0), [0], U64(0)),
    ],
)
def test_replies_that_may_be_empty(request_: Request, payload: Payload, fds: list[int], answer: Payload) -> None:
    asker, replier = front_end(), back_end()
    own = [os.dup(fd) for fd in fds]
    with one(replier, asker.send(request_, payload, fds), own) as message:
        assert one(asker, replier.reply(message, answer)).payload == answer


def test_a_reply_is_sent_once_and_in_order() -> None:
    connection = back_end()
    first = one(connection, encode_request(Request.GET_FEATURES))
    second = one(connection, encode_request(Request.GET_FEATURES))
    third = one(connection, encode_request(Request.SET_OWNER, need_reply=True))
    connection.reply(second, U64(0))
    for message in (first, second):
        with pytest.raises(UsageError, match="replied to already"):
            connection.reply(message, U64(0))
    connection.reply(third, U64(0))


def test_a_refused_reply_may_be_tried_again() -> None:
    connection = back_end()
    message = one(connection, encode_request(Request.GET_FEATURES))
    with pytest.raises(UsageError):
        connection.reply(message, U64(-1))
    connection.reply(message, U64(1))


@pytest.mark.parametrize(
    ("data", "payload", "fds", "words"),
    [
        (encode_request(Request.SET_OWNER), U64(0), [], "SET_OWNER asks for no reply from the back end"),
        (encode_request(Request.GET_FEATURES), VringState(0, 0), [], "payload is VringState, must be U64"),
        (encode_request(Request.GET_CONFIG, SAMPLES[Config]), U64(0), [], "is U64, must be Config or Empty"),
        (encode_request(Request.GET_FEATURES), U64(0), [0], "1 fds with the reply, at most 0"),
    ],
)
def test_a_back_end_may_not_reply(data: bytes, payload: Payload, fds: list[int], words: str) -> None:
    connection = back_end()
    message = one(connection, data)
    with pytest.raises(UsageError, match=words):
        connection.reply(message, payload, fds)


@pytest.mark.parametrize(
    ("connection", "request_", "payload", "fds", "words"),
    [
        (front_end(), Request.SET_FEATURES, Empty(), [], "SET_FEATURES: its payload is Empty, must be U64"),
        (front_end(), Request.SET_OWNER, Empty(), [0], "SET_OWNER: 1 fds came with it, must be 0"),
        (front_end(), KICK, VringFd(0), [], "SET_VRING_KICK: 0 fds came with it, must be 1"),
        (front_end(), Request.SET_FEATURES, U64(-1), [], "does not fit its field"),
        (front_end(), BackendRequest.VRING_CALL, VringState(0, 0), [], "not sent by the front end on this channel"),
        (back_end(), Request.SET_OWNER, Empty(), [], "SET_OWNER is not sent by the back end on this channel"),
    ],
)
def test_send_refuses(connection: Connection, request_: Any, payload: Payload, fds: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        connection.send(request_, payload, fds)
    assert connection.awaiting == 0


def test_a_front_end_does_not_reply_on_the_main_channel() -> None:
    with pytest.raises(UsageError, match="asks for no reply from the front end"):
        front_end().reply(Message(Request.GET_FEATURES, 1, Empty()), U64(0))
