"""io_uring_setup(2), io_uring_enter(2), io_uring_register(2): the kernel's include/uapi/linux/io_uring.h."""

from __future__ import annotations

import struct

import numpy as np

from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import NUMBERS

SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "<u2"),
        ("fd", "<i4"),
        ("off", "<i8"),
        ("addr", "<i8"),
        ("len", "<u4"),
        ("op_flags", "<u4"),
        ("user_data", "<i8"),
        ("buf_index", "<u2"),
        ("personality", "<u2"),
        ("file_index", "<u4"),
        ("addr3", "<i8"),
        ("pad", "<i8"),
    ]
)
SQE_SIZE = SQE.itemsize
CQE = np.dtype([("user_data", "<i8"), ("res", "<i4"), ("flags", "<u4")])
CQE_SIZE = CQE.itemsize

IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC = 1, 2, 3
IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED = 4, 5
IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL, IORING_OP_READ, IORING_OP_WRITE = 6, 14, 22, 23
IOSQE_FIXED_FILE = 1
IORING_FSYNC_DATASYNC = 1
IORING_POLL_ADD_MULTI = 1
IORING_CQE_F_MORE = 2
IORING_ENTER_GETEVENTS, IORING_ENTER_EXT_ARG = 1, 8
IORING_SETUP_R_DISABLED = 1 << 6
IORING_SETUP_SUBMIT_ALL, IORING_SETUP_TASKRUN_FLAG = 1 << 7, 1 << 9
IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN = 1 << 12, 1 << 13
IORING_SQ_CQ_OVERFLOW, IORING_SQ_TASKRUN = 2, 4
IORING_FEAT_SINGLE_MMAP, IORING_FEAT_NODROP, IORING_FEAT_EXT_ARG = 1 << 0, 1 << 1, 1 << 8
IORING_REGISTER_FILES, IORING_REGISTER_FILES_UPDATE = 2, 6
IORING_REGISTER_RESTRICTIONS, IORING_REGISTER_ENABLE_RINGS = 11, 12
IORING_RESTRICTION_REGISTER_OP, IORING_RESTRICTION_SQE_OP, IORING_RESTRICTION_SQE_FLAGS_ALLOWED = 0, 1, 2
IORING_REGISTER_BUFFERS2, IORING_REGISTER_BUFFERS_UPDATE, IORING_REGISTER_IOWQ_MAX_WORKERS = 15, 16, 19
IORING_RSRC_REGISTER_SPARSE = 1
IORING_OFF_SQ_RING, IORING_OFF_SQES = 0, 0x1000_0000

# struct io_uring_restriction; the second field is an operation of either kind, or flags
RESTRICTION = struct.Struct("=HBx12x")

# struct io_uring_params: ten fields, struct io_sqring_offsets, struct io_cqring_offsets
PARAMS_SIZE = 120
PARAMS = struct.Struct("=10I 10I 10I")

# struct io_uring_files_update, and the one fd that it points at
FILES_UPDATE = np.dtype([("offset", "<u4"), ("resv", "<u4"), ("fds", "<i8"), ("fd", "<i4"), ("pad", "<i4")])
FILES_UPDATE_FD = 16

# struct io_uring_rsrc_register; struct io_uring_rsrc_update2 and the one struct iovec that it points at
RSRC_REGISTER = np.dtype([("nr", "<u4"), ("flags", "<u4"), ("resv2", "<i8"), ("data", "<i8"), ("tags", "<i8")])
RSRC_UPDATE_SIZE = 32
RSRC_UPDATE = np.dtype(
    [
        ("offset", "<u4"),
        ("resv", "<u4"),
        ("data", "<i8"),
        ("tags", "<i8"),
        ("nr", "<u4"),
        ("resv2", "<u4"),
        ("base", "<i8"),
        ("len", "<i8"),
    ]
)

# struct io_uring_getevents_arg and the struct __kernel_timespec that it points at
GETEVENTS_ARG = np.dtype(
    [("sigmask", "<i8"), ("sigmask_sz", "<u4"), ("pad", "<u4"), ("ts", "<i8"), ("tv_sec", "<i8"), ("tv_nsec", "<i8")]
)
GETEVENTS_ARG_SIZE = 24


def setup(entries: int, params: int) -> int:
    """io_uring_setup(2): the fd of a new ring; `params` is the address of a struct io_uring_params. Raises OSError."""
    return system_call(NUMBERS["io_uring_setup"], entries, params)


def register(ring_fd: int, opcode: int, argument: int = 0, count: int = 0) -> None:
    """io_uring_register(2); raises OSError."""
    system_call(NUMBERS["io_uring_register"], ring_fd, opcode, argument, count)
