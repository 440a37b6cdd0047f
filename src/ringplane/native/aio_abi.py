"""Linux native AIO (io_setup(2), io_submit(2)): the kernel's include/uapi/linux/aio_abi.h, little-endian."""

from __future__ import annotations

import ctypes

import numpy as np

from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import NUMBERS

IOCB = np.dtype(
    [
        ("data", "<i8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("lio_opcode", "<u2"),
        ("reqprio", "<i2"),
        ("fildes", "<u4"),
        ("buf", "<i8"),
        ("nbytes", "<i8"),
        ("offset", "<i8"),
        ("reserved2", "<i8"),
        ("flags", "<u4"),
        ("resfd", "<u4"),
    ]
)
IOCB_SIZE = IOCB.itemsize
IOCB_CMD_PREAD, IOCB_CMD_PWRITE, IOCB_CMD_FDSYNC, IOCB_CMD_PREADV, IOCB_CMD_PWRITEV = 0, 1, 3, 7, 8
IOCB_FLAG_RESFD = 1

IO_EVENT = np.dtype([("data", "<i8"), ("obj", "<i8"), ("res", "<i8"), ("res2", "<i8")])
IO_EVENT_SIZE = IO_EVENT.itemsize

# struct aio_ring of the kernel's fs/aio.c, all fields of 32 bits: offsets, and its size in fields
RING_NR, RING_HEAD, RING_TAIL, RING_MAGIC, RING_INCOMPAT, RING_HEADER_LENGTH = 4, 8, 12, 16, 24, 28
RING_WORDS = 8
AIO_RING_MAGIC = 0xA10A10A1


def io_setup(events: int) -> int:
    """io_setup(2): the address (and handle) of a new AIO context for `events` requests; raises OSError."""
    context = ctypes.c_ulong(0)
    system_call(NUMBERS["io_setup"], events, ctypes.addressof(context))
    return context.value


def io_destroy(context: int) -> None:
    """io_destroy(2): waits for requests in flight; raises OSError."""
    system_call(NUMBERS["io_destroy"], context)
