"""Engine `aio`: Linux native AIO (io_submit(2)), completions read from the ring that the kernel shares with us.

Facts that this file depends on:
- An `aio_context_t` is the address of a `struct aio_ring` in our own memory. Reading completions there and advancing
  its head saves io_getevents(2); the kernel reads the head from the ring when it counts free entries.
- io_submit(2) stops at the first control block that it refuses: it returns how many it accepted, or, if that was the
  first, -errno. EAGAIN means no room now; any other error concerns that control block.
- On a file system without O_DIRECT, and on tmpfs, the I/O happens inside io_submit(2): it has ended when it returns.
- IOCB_CMD_FDSYNC exists since Linux 4.18, and requires all unused fields to be zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
from collections.abc import Collection
from errno import EAGAIN, EINTR, EINVAL

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import addresses, unit
from ringplane.engines.common import (
    COMPLETION,
    ENGINE_FIELDS,
    MAX_TOKENS,
    READ,
    WRITE,
    EngineUnavailable,
    complete,
)
from ringplane.guest_memory.regions import Mapping
from ringplane.native import aio_abi, epoll
from ringplane.native.access import address_of, load32, load32_acquire, load64, store32_release, store64, view
from ringplane.native.aio_abi import (
    AIO_RING_MAGIC,
    IO_EVENT,
    IO_EVENT_SIZE,
    IOCB,
    IOCB_CMD_FDSYNC,
    IOCB_CMD_PREAD,
    IOCB_CMD_PREADV,
    IOCB_CMD_PWRITE,
    IOCB_CMD_PWRITEV,
    IOCB_FLAG_RESFD,
    IOCB_SIZE,
    RING_HEAD,
    RING_HEADER_LENGTH,
    RING_INCOMPAT,
    RING_MAGIC,
    RING_NR,
    RING_TAIL,
    RING_WORDS,
)
from ringplane.native.epoll import EPOLL_EVENT, EPOLL_EVENT_SIZE
from ringplane.native.fs import RWF_DSYNC
from ringplane.native.syscalls import epoll_pwait2, epoll_wait, io_submit
from ringplane.native.time_types import TIMESPEC
from ringplane.native.uio import IOV_MAX, IOVEC

AIO_ENGINE = np.dtype(
    [
        *ENGINE_FIELDS,
        ("context", "<i8"),
        ("event_fd", "<i8"),
        ("iocbs", "<i8"),
        ("batch", "<i8"),  # addresses of the prepared control blocks
        ("epoll_fd", "<i8"),
        ("events", "<i8"),  # EPOLL_EVENT structs
        ("limit", "<i8"),  # a TIMESPEC, 0 if the kernel lacks epoll_pwait2(2)
    ]
)

# The token of the eventfd that completions signal: it wakes the worker, and is not reported.
TOKEN_COMPLETIONS = 0


@unit
def wait(address, timeout_ns, wanted):
    """Sleep in epoll_wait(2) until something happens or the time is over (-1: without limit).

    Returns how many tokens it put at `engine.tokens`.
    Fds are watched edge-triggered, so they need not be read: each write to an eventfd is a new edge, whether it was
    read before or not. An eventfd that is never read overflows after 2^64 writes.
    """
    engine = view(address, AIO_ENGINE)
    if timeout_ns > 0 and engine.limit:
        limit = view(engine.limit, TIMESPEC)
        limit.tv_sec, limit.tv_nsec = timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000
        count = epoll_pwait2(engine.epoll_fd, engine.events, MAX_TOKENS, engine.limit)
    else:
        # Rounded down: -1 stays -1.
        count = epoll_wait(engine.epoll_fd, engine.events, MAX_TOKENS, timeout_ns // 1_000_000)
    tokens = 0
    for index in range(count):
        token = view(engine.events + index * EPOLL_EVENT_SIZE, EPOLL_EVENT).data
        if token != TOKEN_COMPLETIONS:
            store64(engine.tokens + 8 * tokens, token)
            tokens += 1
    return tokens


@compiled
def _prepare(engine, slot, opcode, fd, buffer, size, offset, flags):
    iocb = view(engine.iocbs + slot * IOCB_SIZE, IOCB)
    iocb.data = slot
    iocb.rw_flags = flags
    iocb.lio_opcode = opcode
    iocb.fildes = fd
    iocb.buf = buffer
    iocb.nbytes = size
    iocb.offset = offset
    iocb.flags = IOCB_FLAG_RESFD
    iocb.resfd = engine.event_fd
    store64(engine.batch + 8 * engine.prepared, engine.iocbs + slot * IOCB_SIZE)
    engine.prepared += 1


@unit
def prepare_io(address, slot, operation, fd, iov, iov_count, offset, dsync):
    """Queue a read or write of `iov_count` IOVEC structs at address `iov`; `dsync`: the write ends when stable."""
    if not READ <= operation <= WRITE:
        complete(address, slot, -EINVAL)
        return 0
    engine = view(address, AIO_ENGINE)
    flags = RWF_DSYNC if dsync else 0
    if iov_count == 1:
        single = view(iov, IOVEC)
        opcode = IOCB_CMD_PREAD if operation == READ else IOCB_CMD_PWRITE
        _prepare(engine, slot, opcode, fd, single.base, single.len, offset, flags)
    else:
        opcode = IOCB_CMD_PREADV if operation == READ else IOCB_CMD_PWRITEV
        _prepare(engine, slot, opcode, fd, iov, min(iov_count, IOV_MAX), offset, flags)
    return 0


@unit
def prepare_flush(address, slot, fd):
    """Queue an fdatasync(2), which the kernel runs on a kernel thread."""
    _prepare(view(address, AIO_ENGINE), slot, IOCB_CMD_FDSYNC, fd, 0, 0, 0, 0)
    return 0


@unit
def submit(address):
    """Submit the queued operations. Those that the kernel does not accept now stay queued, in order."""
    engine = view(address, AIO_ENGINE)
    done = 0
    engine.stuck = 0
    while done < engine.prepared:
        taken = io_submit(engine.context, engine.prepared - done, engine.batch + 8 * done)
        if taken > 0:
            done += taken
        elif taken == -EINTR:
            continue
        elif taken == -EAGAIN or taken == 0:
            engine.stuck = 1
            break
        else:
            # The error concerns the first control block: it ends here, the others continue.
            iocb = view(load64(engine.batch + 8 * done), IOCB)
            complete(address_of(engine), iocb.data, taken)
            done += 1
    engine.prepared -= done
    for index in range(engine.prepared if done > 0 else 0):
        store64(engine.batch + 8 * index, load64(engine.batch + 8 * (done + index)))
    return 0


@unit
def has_events(address):
    """Whether `collect` would find something; the watched fds can only be checked with a system call."""
    ring = view(address, AIO_ENGINE).context
    return load32(ring + RING_HEAD) != load32_acquire(ring + RING_TAIL)


@unit
def collect(address):
    """Collect completions into `engine.completions`."""
    engine = view(address, AIO_ENGINE)
    ring = engine.context
    size = load32(ring + RING_NR)
    events = ring + load32(ring + RING_HEADER_LENGTH)
    head = load32(ring + RING_HEAD)
    # Acquire: events are read after the tail. Pairs with the write barrier in the kernel's aio_complete().
    tail = load32_acquire(ring + RING_TAIL)
    while head != tail:
        event = view(events + head * IO_EVENT_SIZE, IO_EVENT)
        complete(address_of(engine), event.data, event.res)
        head += 1
        if head == size:
            head = 0
    # Release: the events have been read before the kernel may overwrite them.
    store32_release(ring + RING_HEAD, head)
    return 0


class Aio:
    """Owns an AIO context, its eventfd and an epoll instance; `address` is the address of the AIO_ENGINE struct."""

    name = "aio"
    units = (prepare_io, prepare_flush, submit, wait, has_events, collect)
    # Why this engine cannot do I/O; empty: it can.
    without_io = ""

    def __init__(self, capacity: int) -> None:
        """Raises EngineUnavailable if the kernel forbids AIO, or has no room for `capacity` requests."""
        self._context = self._make_context(capacity)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._iocbs = np.zeros(capacity, IOCB)
        self._batch = np.zeros(capacity, np.int64)
        self._completions = np.zeros(capacity, COMPLETION)
        self._tokens = np.zeros(MAX_TOKENS, np.int64)
        self._events = np.zeros(MAX_TOKENS, EPOLL_EVENT)
        self._limit = np.zeros(1, TIMESPEC)
        self.fine_timeouts = epoll.has_pwait2()
        self._engine: npt.NDArray[np.void] = np.zeros(1, AIO_ENGINE)
        self.address = int(self._engine.ctypes.data)
        for name, value in {
            **addresses(self.units),
            "capacity": capacity,
            "merges": 1,
            "completions": self._completions.ctypes.data,
            "tokens": self._tokens.ctypes.data,
            "context": self._context,
            "event_fd": self.event_fd,
            "iocbs": self._iocbs.ctypes.data,
            "batch": self._batch.ctypes.data,
            "epoll_fd": self._epoll.fileno(),
            "events": self._events.ctypes.data,
            "limit": self._limit.ctypes.data if self.fine_timeouts else 0,
        }.items():
            self._engine[name] = value
        self.watch(self.event_fd, TOKEN_COMPLETIONS)

    def _make_context(self, capacity: int) -> int:
        return _io_setup(capacity)

    def _destroy_context(self) -> None:
        """Waits for requests in flight."""
        aio_abi.io_destroy(self._context)

    def attach_thread(self) -> None:
        """Called by the thread that will use the engine; AIO does not depend on it."""

    def add_file(self, fd: int) -> int:
        """The `file` argument of `prepare_io` and `prepare_flush` for this open file: the fd itself."""
        return fd

    def remove_file(self, handle: int) -> None:
        """Nothing refers to the file any more; AIO kept no reference to it."""

    def pin(self, mappings: Collection[Mapping]) -> None:
        """Linux AIO has no registered memory; raises OSError."""
        raise OSError(errno.EOPNOTSUPP, "Linux AIO does not support it; use --engine io_uring")

    def watch(self, fd: int, token: int) -> None:
        """Report `token` (not 0) when `fd` becomes readable; raises OSError if it cannot be polled."""
        epoll.add_edge_triggered(self._epoll.fileno(), fd, token)

    def unwatch(self, fd: int) -> None:
        """Stop watching; a second call does nothing."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Destroy the context (waits for requests in flight) and close the fds; a second call does nothing."""
        if self._context:
            self._destroy_context()
            os.close(self.event_fd)
            self._epoll.close()
            self._context = 0


class Epoll(Aio):
    """The epoll part of `Aio` without AIO: a worker can sleep, which is enough for disks with images in memory."""

    name = "epoll"

    def __init__(self, capacity: int, without_io: str) -> None:
        """`without_io`: why nothing better is available."""
        self.without_io = without_io
        super().__init__(capacity)

    def _make_context(self, capacity: int) -> int:
        """An AIO ring in which nothing ever completes."""
        self._ring = np.zeros(RING_WORDS, np.uint32)
        return int(self._ring.ctypes.data)

    def _destroy_context(self) -> None:
        pass


REMEDIES = {
    errno.EPERM: "it is forbidden; allow it in the seccomp profile of the container or service",
    errno.ENOSYS: "the kernel is built without it, or a seccomp profile hides it",
    errno.EAGAIN: "the kernel has no room for {} more AIO requests; raise sysctl fs.aio-max-nr",
    errno.ENOMEM: "there is too little memory; raise the memory limit of the control group",
}


def _io_setup(capacity: int) -> int:
    try:
        context = aio_abi.io_setup(capacity)
    except OSError as error:
        remedies = {code: remedy.format(capacity) for code, remedy in REMEDIES.items()}
        raise EngineUnavailable("Linux AIO", "io_setup(2)", error, remedies) from None
    header = (ctypes.c_uint32 * RING_WORDS).from_address(context)
    if header[RING_MAGIC // 4] != AIO_RING_MAGIC or header[RING_INCOMPAT // 4] != 0:
        aio_abi.io_destroy(context)
        unknown = OSError(errno.ENOSYS, "")
        raise EngineUnavailable("Linux AIO", "io_setup(2)", unknown, {errno.ENOSYS: "its ring has an unknown layout"})
    return context
