"""The transports with real sockets: fds, short sends, slow readers, cancellation, end of the connection."""

import array
import asyncio
import gc
import os
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from ringplane.system.aside import aside
from ringplane.vhost_user.connection import Connection, Role, UnknownRequest, encode_request
from ringplane.vhost_user.messages import BackendRequest, ProtocolError, Request, UsageError
from ringplane.vhost_user.payloads import U64, Config, Empty, Inflight, MemoryRegion, MemoryTable, Opaque, VringFd
from ringplane.vhost_user.transport import AsyncTransport, BlockingTransport, receive_part

KICK = encode_request(Request.SET_VRING_KICK, VringFd(0))
FEATURES = encode_request(Request.SET_FEATURES, U64(1))
LARGE = encode_request(99, Opaque(bytes(4096)))


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


Pair = tuple[socket.socket, socket.socket]


def send_raw(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await main()

    asyncio.run(limited())


def test_both_roles_talk_and_pass_fds(pair: Pair, fd: int) -> None:
    """A blocking front end in a thread with an asyncio back end."""
    ours, theirs = pair
    table = MemoryTable(tuple(MemoryRegion(i << 20, 1 << 20, i << 30, 0) for i in range(8)))
    seen = []

    def drive() -> None:
        driver = BlockingTransport(theirs, 10)
        features = driver.call(Request.GET_FEATURES)
        assert features is not None
        seen.append(features.payload)
        assert driver.call(Request.SET_OWNER) is None
        ack = driver.call(Request.SET_MEM_TABLE, table, [fd] * 8, need_reply=True)
        assert ack is not None
        seen.append(ack.payload)
        inflight = driver.call(Request.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128))
        assert inflight is not None
        seen.append(inflight.payload)
        (area,) = inflight.take_fds()
        os.eventfd_write(area, 3)
        os.close(area)
        driver.close()

    async def serve() -> None:
        transport = AsyncTransport(ours)
        connection = transport.connection
        while message := await transport.receive():
            with message:
                if message.request is Request.GET_FEATURES:
                    await transport.send(connection.reply(message, U64(5)))
                elif message.request is Request.SET_MEM_TABLE:
                    assert message.payload == table
                    assert len(message.fds) == 8
                    assert not any(map(os.get_inheritable, message.fds))
                    await transport.send(connection.reply(message, U64(0)))
                elif message.request is Request.GET_INFLIGHT_FD:
                    await transport.send(connection.reply(message, Inflight(4096, 0, 1, 128), [fd]), [fd])
        transport.close()

    thread = threading.Thread(target=drive)
    thread.start()
    run(serve)
    thread.join()
    assert seen == [U64(5), U64(0), Inflight(4096, 0, 1, 128)]
    assert os.eventfd_read(fd) == 3


def test_the_back_end_channel(pair: Pair) -> None:
    back = BlockingTransport(pair[0], 10, Connection(Role.BACK_END, backend_channel=True))
    front = BlockingTransport(pair[1], 10, Connection(Role.FRONT_END, backend_channel=True))
    back.send(back.connection.send(BackendRequest.CONFIG_CHANGE_MSG, need_reply=True))
    message = front.receive()
    assert message is not None
    assert message.request is BackendRequest.CONFIG_CHANGE_MSG
    front.send(front.connection.reply(message, U64(0)))
    reply = back.receive()
    assert reply is not None
    assert reply.payload == U64(0)


def test_consecutive_messages_keep_their_fds(pair: Pair, fd: int) -> None:
    ours, theirs = pair
    # A message without fds, then one with fds: the kernel would join them for a reader that requests more bytes.
    theirs.sendall(FEATURES)
    send_raw(theirs, KICK, [fd])
    theirs.sendall(FEATURES)
    back = BlockingTransport(ours, 10, Connection(Role.BACK_END))
    counts = []
    for _ in range(3):
        message = back.receive()
        assert message is not None
        counts.append(len(message.fds))
        message.close()
    assert counts == [0, 1, 0]


@pytest.mark.parametrize("split", [1, 11, 12, 13, 19])
def test_a_message_in_two_halves(pair: Pair, fd: int, split: int) -> None:
    ours, theirs = pair

    async def main() -> None:
        transport = AsyncTransport(ours)
        send_raw(theirs, KICK[:split], [fd])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await transport.receive()
        theirs.sendall(KICK[split:])
        message = await transport.receive()
        assert message is not None
        assert len(message.fds) == 1
        message.close()
        transport.close()

    run(main)


def test_the_end_between_messages(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(FEATURES)
    theirs.close()

    async def main() -> None:
        transport = AsyncTransport(ours)
        assert await transport.receive() is not None
        assert await transport.receive() is None
        assert await transport.receive() is None
        with pytest.raises(BrokenPipeError):
            await transport.send(FEATURES)
        transport.close()

    run(main)


@pytest.mark.parametrize("length", [3, 12, 15])
def test_the_end_inside_a_message(pair: Pair, fd: int, length: int) -> None:
    ours, theirs = pair
    send_raw(theirs, KICK[:length], [fd])
    theirs.close()
    back = BlockingTransport(ours, 10, Connection(Role.BACK_END))
    with pytest.raises(ProtocolError, match="closed the connection inside"):
        back.receive()
    with pytest.raises(ProtocolError):
        back.receive()


def test_a_reset_is_an_end(pair: Pair) -> None:
    ours, theirs = pair
    ours.sendall(b"unread")
    theirs.close()
    assert BlockingTransport(ours, 10).receive() is None


@pytest.mark.parametrize("count", [9, 10, 11, 60])
def test_too_many_fds(pair: Pair, fd: int, count: int) -> None:
    ours, theirs = pair
    send_raw(theirs, encode_request(Request.SET_MEM_TABLE, MemoryTable()), [fd] * count)
    back = BlockingTransport(ours, 10, Connection(Role.BACK_END))
    before = open_fds()
    with pytest.raises(ProtocolError, match=r"fds (came|were lost)"):
        back.receive()
    assert open_fds() == before
    with pytest.raises(ProtocolError):
        back.receive()


def test_fds_lost_because_too_many_are_open(pair: Pair, fd: int) -> None:
    ours, theirs = pair
    send_raw(theirs, KICK, [fd] * 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    lowest_free = os.dup(fd)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
    try:
        with pytest.raises(ProtocolError, match="fds were lost"):
            receive_part(ours, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_other_ancillary_data_is_ignored(pair: Pair) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    theirs.sendall(FEATURES)
    assert receive_part(ours, 20) == (FEATURES, [])


def test_an_unknown_request_does_not_end_the_transport(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(LARGE + FEATURES)
    back = BlockingTransport(ours, 10, Connection(Role.BACK_END))
    with pytest.raises(UnknownRequest):
        back.receive()
    assert back.receive() is not None


def test_a_slow_reader_gets_every_message_whole(pair: Pair, fd: int) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    count, received = 40, []

    def read_slowly() -> None:
        reader = BlockingTransport(theirs, 10, Connection(Role.BACK_END))
        for _ in range(count):
            try:
                message = reader.receive()
            except UnknownRequest as error:
                received.append((error.message.payload, 0))
            else:
                assert message is not None
                received.append((message.payload, len(message.fds)))
                message.close()

    async def main() -> None:
        transport = AsyncTransport(ours)
        thread = threading.Thread(target=read_slowly)
        sends = [transport.send(LARGE) if i % 2 else transport.send(KICK, [fd]) for i in range(count)]
        tasks = [asyncio.create_task(send) for send in sends]
        await asyncio.sleep(0.02)
        assert not all(task.done() for task in tasks)
        thread.start()
        await asyncio.gather(*tasks)
        await aside(thread.join)
        transport.close()

    run(main)
    assert received == [(VringFd(0), 1), (Opaque(bytes(4096)), 0)] * (count // 2)


class ShortSends(socket.socket):
    """A socket that accepts 5 bytes at a time."""

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        (data,) = buffers
        return super().sendmsg([data[:5]], *rest)


@pytest.mark.parametrize("blocking", [True, False])
def test_short_sends_attach_the_fds_once(pair: Pair, fd: int, blocking: bool) -> None:
    ours, theirs = pair
    sock = ShortSends(fileno=ours.detach())
    if blocking:
        BlockingTransport(sock, 10).send(KICK, [fd])
        BlockingTransport(sock, 10).send(b"")
    else:

        async def main() -> None:
            await AsyncTransport(sock).send(KICK, [fd])

        run(main)
    sock.close()
    reader = BlockingTransport(theirs, 10, Connection(Role.BACK_END))
    message = reader.receive()
    assert message is not None
    assert len(message.fds) == 1
    message.close()
    assert reader.receive() is None


def fill(sock: socket.socket) -> None:
    """Fill the socket's buffers, so that not a single byte fits."""
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1024))


def test_a_send_cancelled_before_its_first_byte_leaves_the_transport_usable(pair: Pair, fd: int) -> None:
    ours, theirs = pair
    fill(ours)

    async def main() -> None:
        transport = AsyncTransport(ours)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await transport.send(KICK, [fd])
        assert not transport.closed
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            while theirs.recv(65536):
                pass
        await transport.send(FEATURES)
        assert theirs.recv(65536) == FEATURES
        transport.close()

    run(main)


class StuckAfterPart(socket.socket):
    """A socket that accepts 5 bytes and then nothing more."""

    taken = False

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        if self.taken:
            raise self.stuck
        self.taken = True
        (data,) = buffers
        return super().sendmsg([data[:5]], *rest)

    stuck: Exception = BlockingIOError()


def test_a_send_cancelled_after_a_part_closes_the_transport(pair: Pair) -> None:
    sock = StuckAfterPart(fileno=pair[0].detach())

    async def main() -> None:
        transport = AsyncTransport(sock)
        waiting = asyncio.create_task(transport.receive())
        sending = asyncio.create_task(transport.send(FEATURES))
        queued = asyncio.create_task(transport.send(FEATURES))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert transport.closed
        assert await waiting is None
        with pytest.raises(ConnectionAbortedError):
            await queued

    run(main)
    assert pair[1].recv(100) == FEATURES[:5]


def test_a_blocking_send_that_fails_after_a_part_closes_the_transport(pair: Pair) -> None:
    sock = StuckAfterPart(fileno=pair[0].detach())
    sock.stuck = TimeoutError()
    with pytest.raises(TimeoutError):
        BlockingTransport(sock, 1).send(FEATURES)
    assert sock.fileno() == -1


def test_close_wakes_a_waiting_send(pair: Pair) -> None:
    ours, _ = pair
    fill(ours)

    async def main() -> None:
        transport = AsyncTransport(ours)
        sending = asyncio.create_task(transport.send(FEATURES))
        await asyncio.sleep(0.01)
        transport.close()
        transport.close()
        with pytest.raises(ConnectionAbortedError):
            await sending
        assert await transport.receive() is None

    run(main)


def test_close_after_the_waiting_task_was_cancelled(pair: Pair) -> None:
    async def main() -> None:
        transport = AsyncTransport(pair[0])
        task = asyncio.create_task(transport.receive())
        await asyncio.sleep(0.01)
        task.cancel()
        transport.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


def test_cancelled_receives_leave_nothing_behind(pair: Pair) -> None:
    ours, theirs = pair

    async def main() -> None:
        transport = AsyncTransport(ours)
        loop = asyncio.get_running_loop()
        fd = ours.fileno()
        for _ in range(3):
            task = asyncio.create_task(transport.receive())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not loop.remove_reader(fd)
        theirs.sendall(FEATURES)
        assert await transport.receive() is not None
        transport.close()

    run(main)


def test_a_task_cancelled_when_its_message_is_there_leaks_no_fd(pair: Pair, fd: int) -> None:
    ours, theirs = pair

    async def main() -> None:
        transport = AsyncTransport(ours)
        send_raw(theirs, KICK, [fd])
        task = asyncio.create_task(transport.receive())
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        del task
        transport.close()

    run(main)


def test_two_tasks_may_not_receive(pair: Pair) -> None:
    async def main() -> None:
        transport = AsyncTransport(pair[0])
        task = asyncio.create_task(transport.receive())
        await asyncio.sleep(0.01)
        with pytest.raises(UsageError, match="another task"):
            await transport.receive()
        transport.close()
        assert await task is None

    run(main)


def test_a_closed_transports_number_may_be_used_again(pair: Pair) -> None:
    """The loop must not keep watching an fd number that now belongs to another socket."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport = AsyncTransport(pair[0])
        number = pair[0].fileno()
        task = asyncio.create_task(transport.receive())
        await asyncio.sleep(0.01)
        transport.close()
        other = os.dup2(pair[1].fileno(), number)
        called: list[bool] = []
        loop.add_reader(other, called.append, True)
        assert await task is None
        assert loop.remove_reader(other)
        os.close(other)

    run(main)


def test_a_flood_of_messages_leaves_the_loop_to_others(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(FEATURES * 50)

    async def main() -> None:
        transport = AsyncTransport(ours)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        for _ in range(50):
            await transport.receive()
        counter.cancel()
        assert turns >= 50
        transport.close()

    run(main)


def test_a_call_without_an_answer(pair: Pair) -> None:
    ours, theirs = pair
    driver = BlockingTransport(ours, 0.02)
    with pytest.raises(TimeoutError):
        driver.call(Request.GET_FEATURES)
    with pytest.raises(UsageError, match="still awaited"):
        driver.call(Request.GET_CONFIG, Config.asking_for(0, 60))
    driver.close()
    other, peer = socket.socketpair()
    driver = BlockingTransport(other, 10)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="instead of replying to GET_FEATURES"):
        driver.call(Request.GET_FEATURES)
    driver.close()
    peer.close()
    assert theirs.recv(100) == encode_request(Request.GET_FEATURES, Empty())
