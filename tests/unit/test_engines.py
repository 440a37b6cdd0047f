"""The choice of a worker's engine, and watching fds with both engines."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.block.io import BLOCK_IO
from ringplane.block.mapped_image import MappedImage, read_or_write
from ringplane.block.ranges import RANGE, Backing, apply
from ringplane.engines import uring
from ringplane.engines.aio import Aio
from ringplane.engines.choose_engine import WORKER_ENGINES, make_engine
from ringplane.engines.common import MAX_TOKENS, READ, WRITE, EngineUnavailable
from ringplane.engines.dispatch import has_events, prepare_io, reap, submit, wait
from ringplane.engines.uring import Uring
from ringplane.native import aio_abi, epoll, io_uring
from ringplane.native.structs import new
from ringplane.native.uio import IOVEC
from ringplane.options.engine_names import AUTO
from ringplane.system import libc

from .on_structs import on_structs
from .rig import need_engine

TOKEN = 77


@pytest.fixture(params=sorted(WORKER_ENGINES))
def engine(request: pytest.FixtureRequest) -> Iterator[Aio | Uring]:
    engine = make_engine(need_engine(request.param), 8)
    engine.attach_thread()
    yield engine
    engine.close()


def tokens(engine: Aio | Uring, timeout_ms: int = 0) -> list[int]:
    count = on_structs(wait)(engine._engine[0], timeout_ms * 1_000_000, 1)
    return [int(token) for token in engine._tokens[:count]]


def test_each_write_to_a_watched_eventfd_is_reported_without_reading_it(engine: Aio | Uring) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    engine.watch(fd, TOKEN)
    assert tokens(engine) == []
    for _ in range(3):
        os.eventfd_write(fd, 1)
        assert tokens(engine, 1000) == [TOKEN]
        assert tokens(engine) == []
    assert os.eventfd_read(fd) == 3
    os.close(fd)


def test_a_stale_taskrun_flag_is_ignored() -> None:
    """IORING_SQ_TASKRUN without any work: a worker that reacted to it would never sleep again."""
    engine = make_engine(need_engine("io_uring"), 8)
    assert isinstance(engine, Uring)
    engine.attach_thread()
    record = engine._engine[0]
    tokens(engine)
    flags = ctypes.c_uint32.from_address(int(record["sq_flags"]))
    flags.value |= io_uring.IORING_SQ_TASKRUN
    assert on_structs(has_events)(record)
    assert tokens(engine) == []
    assert not on_structs(has_events)(record)
    # A real event after that is not lost, and the flag reports later ones again.
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    engine.watch(fd, TOKEN)
    tokens(engine)
    os.eventfd_write(fd, 1)
    assert tokens(engine, 1000) == [TOKEN]
    os.eventfd_write(fd, 1)
    assert on_structs(has_events)(record)
    assert tokens(engine) == [TOKEN]
    engine.close()
    os.close(fd)


@pytest.mark.parametrize("has_epoll_pwait2", [True, False])
def test_aio_sleeps_for_the_given_time_or_not_at_all(monkeypatch: pytest.MonkeyPatch, has_epoll_pwait2: bool) -> None:
    """Without epoll_pwait2(2) there are only milliseconds."""
    if not has_epoll_pwait2:
        monkeypatch.setattr(epoll, "has_pwait2", lambda: False)
    engine = Aio(8)
    assert engine.fine_timeouts == has_epoll_pwait2
    begin = time.monotonic_ns()
    assert on_structs(wait)(engine._engine[0], 50_000, 1) == 0
    slept = time.monotonic_ns() - begin
    assert on_structs(wait)(engine._engine[0], 2_000_000, 1) == 0
    assert time.monotonic_ns() - begin - slept >= 2_000_000
    assert slept >= (50_000 if has_epoll_pwait2 else 0)
    engine.close()


def test_writes_before_watching_are_reported(engine: Aio | Uring) -> None:
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    engine.watch(fd, TOKEN)
    assert tokens(engine, 1000) == [TOKEN]
    os.close(fd)


def test_unwatched_fds_are_not_reported(engine: Aio | Uring) -> None:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for number, fd in enumerate(fds):
        engine.watch(fd, TOKEN + number)
    tokens(engine)
    engine.unwatch(fds[0])
    engine.unwatch(fds[0])
    tokens(engine)
    for fd in fds:
        os.eventfd_write(fd, 1)
    assert tokens(engine, 1000) == [TOKEN + 1]
    for fd in fds:
        os.close(fd)


def test_more_watches_begin_at_once_than_the_kernel_has_entries_for() -> None:
    """All rings of many disks are started in the same turn of their I/O thread, for example after an upgrade."""
    engine = make_engine(need_engine("io_uring"), 8)
    assert isinstance(engine, Uring)
    engine.attach_thread()
    number = 3 * int(engine._engine["sq_mask"][0])
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    for token in range(number):
        engine.watch(fds[0], token)
    seen: list[int] = []
    while len(seen) < number:
        seen += tokens(engine, 1000)
    assert sorted(seen) == list(range(number))
    engine.unwatch(fds[0])
    os.eventfd_write(fds[0], 1)
    engine.watch(fds[1], TOKEN)
    while not (found := tokens(engine, 1000)):
        pass
    assert found == [TOKEN]
    assert not np.any(engine._watches["fd"] == fds[0])
    engine.close()
    for fd in fds:
        os.close(fd)


def test_there_is_no_room_if_the_kernel_accepts_too_few_entries() -> None:
    """What it does when it is short of memory; here there is nothing to accept."""
    engine = make_engine(need_engine("io_uring"), 8)
    assert isinstance(engine, Uring)
    engine.attach_thread()
    record = engine._engine[0]
    fullest = int(record["sq_mask"]) - 8 - MAX_TOKENS
    for prepared in (fullest + 2, fullest + 1):
        record["prepared"] = prepared
        assert uring.start_watch(engine.address, 0) == -errno.EAGAIN
        assert (int(record["prepared"]), int(record["next_sqe"])) == (prepared, 0)
    record["prepared"] = fullest
    assert uring.start_watch(engine.address, 0) == 0
    assert (int(record["prepared"]), int(record["next_sqe"])) == (fullest + 1, 1)
    engine.close()


def test_watching_and_unwatching_repeatedly(engine: Aio | Uring) -> None:
    """More often than there is room for watches and submissions."""
    for number in range(uring.MAX_WATCHES + 10 if isinstance(engine, Uring) else 10):
        fd = os.eventfd(1, os.EFD_NONBLOCK)
        engine.watch(fd, TOKEN + number)
        assert TOKEN + number in tokens(engine, 1000)
        engine.unwatch(fd)
        tokens(engine)
        os.close(fd)


def test_fds_that_cannot_be_polled_are_rejected(engine: Aio | Uring) -> None:
    with open(__file__) as file, pytest.raises(PermissionError):
        engine.watch(file.fileno(), TOKEN)


def test_a_hung_up_socket_is_reported_and_does_not_spin(engine: Aio | Uring) -> None:
    ours, theirs = socket.socketpair()
    engine.watch(ours.fileno(), TOKEN)
    tokens(engine)
    theirs.close()
    assert tokens(engine, 1000) == [TOKEN]
    assert tokens(engine) == []
    ours.close()


def test_aio_is_used_and_logged_if_io_uring_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbid(entries: int, params: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(io_uring, "setup", forbid)
    with caplog.at_level(logging.INFO, "ringplane"):
        engine = make_engine(AUTO, 8)
    assert isinstance(engine, Aio)
    assert "using Linux AIO: io_uring is unavailable (io_uring_setup(2): Operation not permitted): " in caplog.text
    engine.close()
    with pytest.raises(EngineUnavailable, match=r"^io_uring is unavailable .*kernel\.io_uring_disabled"):
        make_engine("io_uring", 8)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EPERM, "it is forbidden; allow it"),
        (errno.ENOSYS, "a seccomp profile hides it"),
        (errno.EAGAIN, "no room for 8 more AIO requests; raise sysctl fs.aio-max-nr"),
        (errno.EIO, "(io_setup(2): Input/output error)"),
    ],
)
def test_an_engine_that_is_unavailable_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def forbid(events: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(aio_abi, "io_setup", forbid)
    with pytest.raises(EngineUnavailable) as caught:
        make_engine("aio", 8)
    text = str(caught.value)
    assert text.startswith(f"Linux AIO is unavailable (io_setup(2): {os.strerror(code)})")
    assert words in text
    assert caught.value.errno == code


@pytest.mark.parametrize(("module", "failing"), [(io_uring, "register"), (libc, "mmap_shared")])
def test_an_io_uring_that_cannot_be_set_up_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, failing: str
) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    need_engine("io_uring")
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(module, failing, refuse)
    with pytest.raises(EngineUnavailable, match=r"it needs Linux 6\.1"):
        make_engine("io_uring", 8)
    assert set(os.listdir("/proc/self/fd")) == before


def test_io_uring_is_the_first_choice() -> None:
    need_engine("io_uring")
    engine = make_engine(AUTO, 8)
    assert isinstance(engine, Uring)
    engine.close()
    engine.close()


# No operation that an engine does not know is done as a write, or as another one.

UNKNOWN = (-1, 2, 3, 99, 1 << 40)
CONTENT = bytes(range(256)) * 2


@pytest.fixture
def image() -> Iterator[int]:
    fd = os.memfd_create("image")
    os.write(fd, CONTENT)
    yield fd
    assert os.pread(fd, 1024, 0) == CONTENT
    os.close(fd)


def iovec(buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    return np.array([(buffer.ctypes.data, buffer.size)], IOVEC)


@pytest.mark.parametrize("operation", UNKNOWN)
@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_rejects_an_unknown_operation(engine: Aio | Uring, image: int, operation: int, count: int) -> None:
    record, buffer = engine._engine[0], np.ones(512, np.uint8)
    vector = iovec(buffer).repeat(count)
    file = engine.add_file(image)
    on_structs(prepare_io)(record, 5, operation, file, int(vector.ctypes.data), count, 0, 0)
    on_structs(submit)(record)
    on_structs(wait)(record, 0, 1)
    assert on_structs(reap)(record) == 1
    assert tuple(engine._completions[0]) == (5, -errno.EINVAL)
    assert buffer.all()


@pytest.mark.parametrize("operation", UNKNOWN)
def test_a_mapped_image_rejects_an_unknown_operation(image: int, operation: int) -> None:
    mapped, buffer = MappedImage(image, 512, read_only=False), np.ones(512, np.uint8)
    vector = iovec(buffer)
    result = on_structs(read_or_write)(mapped._record[0], operation, int(vector.ctypes.data), 1, 0, 512)
    assert result == -errno.EINVAL
    assert buffer.all()
    mapped.close()


@pytest.mark.parametrize("operation", [-1, READ, WRITE, 6, 99])
def test_a_helper_rejects_an_unknown_operation_on_ranges(image: int, operation: int) -> None:
    backing, io, piece = Backing(image), new(BLOCK_IO), np.array([(0, 512, 0)], RANGE)
    io["operation"], io["ranges"], io["range_count"] = operation, piece.ctypes.data, 1
    assert apply(backing.address, int(io.ctypes.data)) == -errno.EINVAL
