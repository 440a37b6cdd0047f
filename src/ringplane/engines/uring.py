"""Engine `io_uring`: one system call submits, completes and waits, and kicks arrive through the same ring.

Facts that this file depends on:
- With SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1) completions are posted only inside io_uring_enter(2) with GETEVENTS,
  on the thread that enabled the ring: the kernel does not interrupt that thread, and no other thread may submit. With
  TASKRUN_FLAG a flag in shared memory says that there is work for that call, so a loop that does not sleep can check
  without a system call. The kernel sets the flag shortly after it has queued the work. If the work is done by then, the
  flag stays set without work until there is new work (seen with Linux 6.18; a loop that trusts the flag spins forever).
- A registered file saves taking and dropping a reference for each I/O. The ring keeps such a file open.
- A registered buffer saves looking up and pinning the pages of a request, and keeps them pinned: they are allocated and
  stay so, even if the guest frees them, and count as locked memory (RLIMIT_MEMLOCK). A buffer has at most 1 GiB.
- A multishot poll posts a completion for each wake-up of the fd, edge-triggered: an eventfd need not be read. If a
  completion lacks IORING_CQE_F_MORE (after an overflow of the completion queue, for example), the poll has ended and is
  queued again.
- Without SQPOLL the kernel reads submissions only inside io_uring_enter(2), so the only barrier that the submission
  queue needs is a release store of its tail.
- Submissions are consumed in order, and all of them: an invalid one gets a completion with its error.
- A seccomp filter does not see the operations of a ring. So the ring itself is restricted, before it is enabled, to the
  operations that this file uses (Linux 5.10): opening a file or a socket through it fails with EACCES.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import time
from collections.abc import Collection
from errno import EAGAIN, EINVAL
from select import POLLIN

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import Unit, addresses, unit
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
from ringplane.native import io_uring
from ringplane.native.access import address_of, load32, load32_acquire, store32_release, store64, view
from ringplane.native.fs import RWF_DSYNC
from ringplane.native.io_uring import (
    CQE,
    CQE_SIZE,
    FILES_UPDATE,
    FILES_UPDATE_FD,
    GETEVENTS_ARG,
    GETEVENTS_ARG_SIZE,
    IORING_CQE_F_MORE,
    IORING_ENTER_EXT_ARG,
    IORING_ENTER_GETEVENTS,
    IORING_FEAT_EXT_ARG,
    IORING_FEAT_NODROP,
    IORING_FEAT_SINGLE_MMAP,
    IORING_FSYNC_DATASYNC,
    IORING_OFF_SQ_RING,
    IORING_OFF_SQES,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_FSYNC,
    IORING_OP_POLL_ADD,
    IORING_OP_READ,
    IORING_OP_READ_FIXED,
    IORING_OP_READV,
    IORING_OP_WRITE,
    IORING_OP_WRITE_FIXED,
    IORING_OP_WRITEV,
    IORING_POLL_ADD_MULTI,
    IORING_REGISTER_BUFFERS2,
    IORING_REGISTER_BUFFERS_UPDATE,
    IORING_REGISTER_ENABLE_RINGS,
    IORING_REGISTER_FILES,
    IORING_REGISTER_FILES_UPDATE,
    IORING_REGISTER_IOWQ_MAX_WORKERS,
    IORING_REGISTER_RESTRICTIONS,
    IORING_RESTRICTION_REGISTER_OP,
    IORING_RESTRICTION_SQE_FLAGS_ALLOWED,
    IORING_RESTRICTION_SQE_OP,
    IORING_RSRC_REGISTER_SPARSE,
    IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_R_DISABLED,
    IORING_SETUP_SINGLE_ISSUER,
    IORING_SETUP_SUBMIT_ALL,
    IORING_SETUP_TASKRUN_FLAG,
    IORING_SQ_CQ_OVERFLOW,
    IORING_SQ_TASKRUN,
    IOSQE_FIXED_FILE,
    PARAMS,
    PARAMS_SIZE,
    RESTRICTION,
    RSRC_REGISTER,
    RSRC_UPDATE,
    RSRC_UPDATE_SIZE,
    SQE,
    SQE_SIZE,
)
from ringplane.native.syscalls import io_uring_enter
from ringplane.native.uio import IOV_MAX, IOVEC, IOVEC_SIZE
from ringplane.system import libc

# What an enabled ring may do and register; IOSQE_FIXED_FILE is the only permitted flag.
OPERATIONS = (
    *(IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED),
    *(IORING_OP_FSYNC, IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL),
)
REGISTRATIONS = (
    *(IORING_REGISTER_FILES, IORING_REGISTER_FILES_UPDATE, IORING_REGISTER_BUFFERS2, IORING_REGISTER_BUFFERS_UPDATE),
    IORING_REGISTER_IOWQ_MAX_WORKERS,
)

# The kernel transfers less than 2^31 bytes at a time, and `len` has 32 bits.
MAX_LENGTH = 0x7FFF_F000
MAX_WATCHES = 4096
# Seconds for the kernel to accept operations when it is short of memory.
PATIENCE = 10.0
MAX_FILES = 1024
MAX_BUFFERS, MAX_BUFFER_SIZE = 4096, 1 << 30

# A file handle is an fd, or with this bit an index in the table of registered files.
FIXED_FILE = IOSQE_FIXED_FILE << 32

# user_data is a slot number, or WATCH_BIT with the number of a watch, or IGNORED_BIT: the completion is ignored.
WATCH_BIT, IGNORED_BIT = 1 << 40, 1 << 41
NUMBER_MASK = (1 << 32) - 1

# fd: -1 if not in use; token: reported when the fd becomes readable
WATCH = np.dtype([("fd", "<i8"), ("token", "<i8")])
WATCH_SIZE = WATCH.itemsize

URING_ENGINE = np.dtype(
    [
        *ENGINE_FIELDS,
        ("ring_fd", "<i8"),
        ("sqes", "<i8"),
        ("sq_tail", "<i8"),  # address of the tail that the kernel reads
        ("sq_flags", "<i8"),  # address of the flags that the kernel sets
        ("stale", "<i8"),  # IORING_SQ_TASKRUN if it is set without work, else 0
        ("sq_mask", "<i8"),
        ("next_sqe", "<i8"),  # free running; the next value of the tail
        ("cqes", "<i8"),
        ("cq_head", "<i8"),  # addresses
        ("cq_tail", "<i8"),
        ("cq_mask", "<i8"),
        ("watches", "<i8"),  # WATCH structs
        ("argument", "<i8"),  # GETEVENTS_ARG, for a wait with a limit
        ("buffers", "<i8"),  # the registered buffers: IOVEC structs, of length 0 where there is none
        ("buffer_count", "<i8"),  # IOVEC structs from this one on are not in use
        ("last_buffer", "<i8"),  # where the last address was found
    ]
)


@compiled
def _next_sqe(engine):
    """The next submission entry, cleared. There always is one: see `make_room`."""
    sqe = view(engine.sqes + (engine.next_sqe & engine.sq_mask) * SQE_SIZE, SQE)
    engine.next_sqe = (engine.next_sqe + 1) & NUMBER_MASK
    engine.prepared += 1
    sqe.ioprio = 0
    sqe.off = 0
    sqe.op_flags = 0
    sqe.buf_index = 0
    sqe.personality = 0
    sqe.file_index = 0
    sqe.addr3 = 0
    return sqe


@compiled
def _find_buffer(engine, base, length):
    """The number of the registered buffer that contains these bytes, -1 if there is none."""
    for attempt in range(engine.buffer_count + 1 if engine.buffer_count else 0):
        number = attempt - 1 if attempt else engine.last_buffer
        buffer = view(engine.buffers + number * IOVEC_SIZE, IOVEC)
        if buffer.base <= base and base - buffer.base <= buffer.len - length:
            engine.last_buffer = number
            return number
    return -1


@unit
def prepare_io(address, slot, operation, file, iov, iov_count, offset, dsync):
    """Queue a read or write of `iov_count` IOVEC structs at address `iov`; `dsync`: the write ends when stable."""
    if not READ <= operation <= WRITE:
        complete(address, slot, -EINVAL)
        return 0
    engine = view(address, URING_ENGINE)
    sqe = _next_sqe(engine)
    sqe.flags = file >> 32
    sqe.fd = file & NUMBER_MASK
    sqe.off = offset
    sqe.user_data = slot
    sqe.op_flags = RWF_DSYNC if dsync else 0
    if iov_count == 1:
        single = view(iov, IOVEC)
        sqe.addr = single.base
        sqe.len = min(single.len, MAX_LENGTH)
        buffer = _find_buffer(engine, single.base, single.len)
        if buffer < 0:
            sqe.opcode = IORING_OP_READ if operation == READ else IORING_OP_WRITE
        else:
            sqe.opcode = IORING_OP_READ_FIXED if operation == READ else IORING_OP_WRITE_FIXED
            sqe.buf_index = buffer
    else:
        sqe.opcode = IORING_OP_READV if operation == READ else IORING_OP_WRITEV
        sqe.addr = iov
        sqe.len = min(iov_count, IOV_MAX)
    return 0


@unit
def prepare_flush(address, slot, file):
    """Queue an fdatasync(2), which the kernel runs on a kernel thread."""
    engine = view(address, URING_ENGINE)
    sqe = _next_sqe(engine)
    sqe.opcode = IORING_OP_FSYNC
    sqe.flags = file >> 32
    sqe.fd = file & NUMBER_MASK
    sqe.addr = 0
    sqe.len = 0
    sqe.op_flags = IORING_FSYNC_DATASYNC
    sqe.user_data = slot
    return 0


@compiled
def prepare_watch(engine, number):
    """Queue a multishot poll of the fd of watch `number`, which continues until it is removed."""
    sqe = _next_sqe(engine)
    sqe.opcode = IORING_OP_POLL_ADD
    sqe.flags = 0
    sqe.fd = view(engine.watches + number * WATCH_SIZE, WATCH).fd
    sqe.addr = 0
    sqe.len = IORING_POLL_ADD_MULTI
    sqe.op_flags = POLLIN
    sqe.user_data = WATCH_BIT | number


@compiled
def _has_room(engine):
    """Whether an entry is free beside those for all slots and for the polls that `wait` repeats."""
    return engine.prepared + engine.capacity + MAX_TOKENS <= engine.sq_mask


@compiled
def make_room(engine):
    """Submit what is prepared if there is no room for another entry.

    Returns 0 if there is room now, or -errno; -EAGAIN if the kernel has accepted too few entries, for lack of memory.
    """
    if _has_room(engine):
        return 0
    store32_release(engine.sq_tail, engine.next_sqe)
    taken = io_uring_enter(engine.ring_fd, engine.prepared, 0, 0, 0, 0)
    if taken < 0:
        return taken
    engine.prepared -= taken
    return 0 if _has_room(engine) else -EAGAIN


@unit
def start_watch(address, number):
    """See `prepare_watch`; returns the result of `make_room`."""
    engine = view(address, URING_ENGINE)
    result = make_room(engine)
    if result == 0:
        prepare_watch(engine, number)
    return result


@unit
def stop_watch(address, number):
    """Queue the cancellation of a poll (POLL_REMOVE would fail if the fd becomes readable at the same moment).

    Returns the result of `make_room`.
    """
    engine = view(address, URING_ENGINE)
    result = make_room(engine)
    if result < 0:
        return result
    sqe = _next_sqe(engine)
    sqe.opcode = IORING_OP_ASYNC_CANCEL
    sqe.flags = 0
    sqe.fd = -1
    sqe.addr = WATCH_BIT | number
    sqe.len = 0
    sqe.user_data = IGNORED_BIT
    return 0


@unit
def wait(address, timeout_ns, wanted):
    """Submit what is prepared, and sleep until `wanted` events or until the time is over (-1: without limit).

    Returns how many tokens it put at `tokens`.
    """
    engine = view(address, URING_ENGINE)
    store32_release(engine.sq_tail, engine.next_sqe)
    flags, argument, size = IORING_ENTER_GETEVENTS, 0, 0
    if timeout_ns > 0:
        limit = view(engine.argument, GETEVENTS_ARG)
        limit.tv_nsec = timeout_ns
        flags, argument, size = flags | IORING_ENTER_EXT_ARG, engine.argument, GETEVENTS_ARG_SIZE
    taken = io_uring_enter(engine.ring_fd, engine.prepared, 0 if timeout_ns == 0 else wanted, flags, argument, size)
    # An error concerns the submission or wait as a whole (EAGAIN: no memory, EBUSY: completions must be reaped first,
    # EINTR, ETIME): what was not accepted stays queued, and the next turn retries.
    if taken > 0:
        engine.prepared -= taken
    engine.stuck = 1 if engine.prepared > 0 else 0
    tokens = _collect(engine)
    nothing = tokens == 0 and engine.completed == 0
    engine.stale = IORING_SQ_TASKRUN if nothing and load32(engine.sq_flags) & IORING_SQ_TASKRUN else 0
    return tokens


@compiled
def _collect(engine):
    """Sort the completion queue into completions and tokens, as far as there is room."""
    head = load32(engine.cq_head)
    # Acquire: entries are read after the tail. Pairs with the kernel's release store of it.
    tail = load32_acquire(engine.cq_tail)
    tokens = 0
    while head != tail and engine.completed < engine.capacity and tokens < MAX_TOKENS:
        cqe = view(engine.cqes + (head & engine.cq_mask) * CQE_SIZE, CQE)
        number = cqe.user_data & NUMBER_MASK
        if cqe.user_data & WATCH_BIT:
            watch = view(engine.watches + number * WATCH_SIZE, WATCH)
            if watch.fd >= 0:
                store64(engine.tokens + 8 * tokens, watch.token)
                tokens += 1
                if cqe.res >= 0 and not cqe.flags & IORING_CQE_F_MORE:
                    prepare_watch(engine, number)
        elif not cqe.user_data & IGNORED_BIT:
            complete(address_of(engine), number, cqe.res)
        head = (head + 1) & NUMBER_MASK
    # Release: the entries have been read before the kernel may overwrite them.
    store32_release(engine.cq_head, head)
    return tokens


@unit
def has_events(address):
    """Whether `wait` would find something without sleeping; work while the flag is stale is not detected."""
    engine = view(address, URING_ENGINE)
    flags = load32(engine.sq_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW) & ~engine.stale
    return flags != 0 or load32(engine.cq_head) != load32_acquire(engine.cq_tail)


def _check_features(features: int) -> None:
    """Raises OSError if the kernel is too old."""
    needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG
    if features & needed != needed:
        raise OSError(errno.EINVAL, "too old")


REMEDIES = {
    errno.EPERM: (
        "it is forbidden; allow it by sysctl kernel.io_uring_disabled=0 "
        "and in the seccomp profile of the container or service"
    ),
    errno.EACCES: "it is forbidden; allow it in the policy of SELinux or AppArmor",
    errno.ENOSYS: "the kernel is built without it, or a seccomp profile hides it",
    errno.EINVAL: "it needs Linux 6.1",
    errno.ENOMEM: "there is too little memory; raise the limit of locked memory (ulimit -l) or of the control group",
}


class Uring:
    """Owns an io_uring; `address` is the address of the URING_ENGINE struct."""

    name = "io_uring"
    units = (prepare_io, prepare_flush, wait, has_events, start_watch, stop_watch)
    fine_timeouts = True
    without_io = ""

    def __init__(self, capacity: int) -> None:
        """Raises EngineUnavailable if the kernel is older than 6.1 or io_uring is forbidden."""
        params = (ctypes.c_uint32 * (PARAMS_SIZE // 4))()
        entries = 1 << (2 * capacity + 64 - 1).bit_length()
        flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG
        params[2] = flags | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_R_DISABLED
        try:
            self._fd = io_uring.setup(entries, ctypes.addressof(params))
        except OSError as error:
            raise EngineUnavailable("io_uring", "io_uring_setup(2)", error, REMEDIES) from None
        fields = PARAMS.unpack_from(params)
        try:
            os.set_inheritable(self._fd, False)
            _check_features(fields[5])
            self._restrict()
            self._map(fields)
        except OSError as error:
            os.close(self._fd)
            raise EngineUnavailable("io_uring", "io_uring_register(2) or mmap(2)", error, REMEDIES) from None
        self._make_state(capacity, fields)
        # Load it now: when `unwatch` is first called, the process may be confined and unable to load code.
        stop_watch.address()

    def _restrict(self) -> None:
        rules = [(IORING_RESTRICTION_SQE_OP, operation) for operation in OPERATIONS]
        rules += [(IORING_RESTRICTION_REGISTER_OP, registration) for registration in REGISTRATIONS]
        rules.append((IORING_RESTRICTION_SQE_FLAGS_ALLOWED, IOSQE_FIXED_FILE))
        table = ctypes.create_string_buffer(b"".join(RESTRICTION.pack(*rule) for rule in rules))
        io_uring.register(self._fd, IORING_REGISTER_RESTRICTIONS, ctypes.addressof(table), len(rules))

    def _map(self, fields: tuple[int, ...]) -> None:
        sq_entries, cq_entries = fields[0], fields[1]
        sq_array, cqes = fields[10 + 6], fields[20 + 5]
        self._ring_size = max(sq_array + 4 * sq_entries, cqes + CQE_SIZE * cq_entries)
        self._sqes_size = SQE_SIZE * sq_entries
        self._ring = libc.mmap_shared(self._fd, self._ring_size, IORING_OFF_SQ_RING)
        self._sqes = libc.mmap_shared(self._fd, self._sqes_size, IORING_OFF_SQES)
        # Entry i of the submission queue is always submission entry i.
        array = (ctypes.c_uint32 * sq_entries).from_address(self._ring + sq_array)
        array[:] = list(range(sq_entries))

    def _make_state(self, capacity: int, fields: tuple[int, ...]) -> None:
        ring, sq, cq = self._ring, fields[10:20], fields[20:30]
        self._completions = np.zeros(capacity, COMPLETION)
        self._tokens = np.zeros(MAX_TOKENS, np.int64)
        self._watches = np.zeros(MAX_WATCHES, WATCH)
        self._watches["fd"] = -1
        self._files = np.full(min(MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), -1, np.int32)
        self._buffers: npt.NDArray[np.void] = np.zeros(0, IOVEC)
        self._pinned: dict[Mapping, list[int]] = {}
        self._argument = np.zeros(1, GETEVENTS_ARG)
        self._argument["ts"] = self._argument.ctypes.data + GETEVENTS_ARG_SIZE
        self._engine: npt.NDArray[np.void] = np.zeros(1, URING_ENGINE)
        self.address = int(self._engine.ctypes.data)
        for name, value in {
            **addresses(self.units[:4]),
            "capacity": capacity,
            "merges": 1,
            "completions": self._completions.ctypes.data,
            "tokens": self._tokens.ctypes.data,
            "ring_fd": self._fd,
            "sqes": self._sqes,
            "sq_tail": ring + sq[1],
            "sq_flags": ring + sq[4],
            "sq_mask": fields[0] - 1,
            "cqes": ring + cq[5],
            "cq_head": ring + cq[0],
            "cq_tail": ring + cq[1],
            "cq_mask": fields[1] - 1,
            "watches": self._watches.ctypes.data,
            "argument": self._argument.ctypes.data,
        }.items():
            self._engine[name] = value

    def attach_thread(self) -> None:
        """Make the calling thread the only one that may submit from now on."""
        io_uring.register(self._fd, IORING_REGISTER_ENABLE_RINGS)
        io_uring.register(self._fd, IORING_REGISTER_FILES, int(self._files.ctypes.data), len(self._files))
        # The limit of kernel threads for operations that block (a flush, the page cache). By default it is four per
        # CPU, which a hanging disk would take from all others. 0 leaves the limit of unbounded workers (sockets) as it
        # is.
        workers = np.array([self._engine["capacity"][0], 0], np.uint32)
        io_uring.register(self._fd, IORING_REGISTER_IOWQ_MAX_WORKERS, int(workers.ctypes.data), 2)

    def add_file(self, fd: int) -> int:
        """The `file` argument of `prepare_io` and `prepare_flush`: a registered file, or the fd if no entry is free."""
        free = np.flatnonzero(self._files < 0)
        if not free.size:
            return fd
        self._set_file(int(free[0]), fd)
        return FIXED_FILE | int(free[0])

    def remove_file(self, handle: int) -> None:
        """Release a file that `add_file` returned; nothing may be in flight on it."""
        if handle & FIXED_FILE:
            self._set_file(handle & NUMBER_MASK, -1)

    def _set_file(self, number: int, fd: int) -> None:
        update = np.zeros(1, FILES_UPDATE)
        update["offset"], update["fd"], update["fds"] = number, fd, update.ctypes.data + FILES_UPDATE_FD
        io_uring.register(self._fd, IORING_REGISTER_FILES_UPDATE, int(update.ctypes.data), 1)
        self._files[number] = fd

    def pin(self, mappings: Collection[Mapping]) -> None:
        """Register the memory of these mappings and of no others, so that the kernel need not pin it for each I/O.

        A registered mapping is kept, so that its address is not reused for other memory. Raises OSError if the kernel
        refuses; what was registered until then stays registered.
        """
        if not self._buffers.size:
            self._make_buffer_table()
        for gone in [mapping for mapping in self._pinned if mapping not in mappings]:
            for number in self._pinned[gone]:
                self._set_buffer(number, 0, 0)
            del self._pinned[gone]
        for new in [mapping for mapping in mappings if mapping not in self._pinned]:
            self._pinned[new] = []
            for start in range(0, new.size, MAX_BUFFER_SIZE):
                self._pinned[new].append(self._free_buffer())
                size = min(MAX_BUFFER_SIZE, new.size - start)
                self._set_buffer(self._pinned[new][-1], new.address + start, size)
        in_use = np.flatnonzero(self._buffers["len"])
        self._engine["last_buffer"] = 0
        self._engine["buffer_count"] = in_use[-1] + 1 if in_use.size else 0
        # Vectored I/O cannot use registered buffers, and these save more than merging does.
        self._engine["merges"] = not in_use.size

    def _make_buffer_table(self) -> None:
        table = np.zeros(1, RSRC_REGISTER)
        table["nr"], table["flags"] = MAX_BUFFERS, IORING_RSRC_REGISTER_SPARSE
        io_uring.register(self._fd, IORING_REGISTER_BUFFERS2, int(table.ctypes.data), table.itemsize)
        self._buffers = np.zeros(MAX_BUFFERS, IOVEC)
        self._engine["buffers"] = self._buffers.ctypes.data

    def _free_buffer(self) -> int:
        free = np.flatnonzero(self._buffers["len"] == 0)
        if not free.size:
            raise OSError(errno.ENOSPC, f"an I/O thread can pin at most {MAX_BUFFERS} pieces of 1 GiB")
        return int(free[0])

    def _set_buffer(self, number: int, address: int, size: int) -> None:
        update = np.zeros(1, RSRC_UPDATE)
        update["offset"], update["nr"], update["data"] = number, 1, update.ctypes.data + RSRC_UPDATE_SIZE
        update["base"], update["len"] = address, size
        # `prepare_io` must not find the buffer before it is registered, or while it is being replaced.
        self._buffers[number] = (0, 0)
        io_uring.register(self._fd, IORING_REGISTER_BUFFERS_UPDATE, int(update.ctypes.data), RSRC_UPDATE_SIZE)
        self._buffers[number] = (address, size)

    def watch(self, fd: int, token: int) -> None:
        """Report `token` when `fd` becomes readable; raises OSError if it cannot be polled."""
        with select.epoll() as probe:
            # The poll below would fail later, without an error being reported.
            probe.register(fd, select.EPOLLIN)
        free = np.flatnonzero(self._watches["fd"] < 0)
        if not free.size:
            raise OSError(errno.ENOSPC, f"an I/O thread can watch at most {MAX_WATCHES} queues")
        number = int(free[0])
        self._watches[number] = (fd, token)
        try:
            self._queue(start_watch, number)
        except OSError:
            self._watches["fd"][number] = -1
            raise

    def unwatch(self, fd: int) -> None:
        """Stop watching; a second call does nothing. Raises OSError if the kernel is short of memory for too long."""
        for number in np.flatnonzero(self._watches["fd"] == fd):
            self._queue(stop_watch, int(number))
            self._watches["fd"][number] = -1

    def _queue(self, operation: Unit, number: int) -> None:
        """Queue the operation on this watch; the kernel may have to make room first."""
        end = time.monotonic() + PATIENCE
        while (result := operation(self.address, number)) < 0:
            if time.monotonic() > end:
                raise OSError(-result, f"io_uring accepts no operations: {os.strerror(-result)}")
            time.sleep(0.001)

    def close(self) -> None:
        """Close the ring, which cancels its polls; a second call does nothing."""
        if self._fd >= 0:
            libc.munmap(self._ring, self._ring_size)
            libc.munmap(self._sqes, self._sqes_size)
            os.close(self._fd)
            self._fd = -1
