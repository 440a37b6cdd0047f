"""Signals to a front end's eventfd, pipe or socket that never block, for I/O threads that serve several front ends.

write(2) to a full eventfd blocks unless the file has O_NONBLOCK, which everyone who shares the file can clear at any
time, and eventfds do not support RWF_NOWAIT for writes. When the kernel itself signals an eventfd it never blocks. So
an AIO request is submitted that ends at once, a read of /dev/null, and has the eventfd signalled (io_submit(2),
IOCB_FLAG_RESFD). That takes some 0.7 us more than write(2). Threads of one disk use write(2), and are interrupted when
the control plane needs them (session/vrings.py). A socket (user-mode Linux) is signalled with send(2), a pipe with
vmsplice(2): both have a flag not to block, whatever the file's. The pipe then refers to a number that never changes.
"""

from __future__ import annotations

import os
from errno import EINVAL, ENOTSOCK

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native import aio_abi
from ringplane.native.access import load32, store32, view
from ringplane.native.aio_abi import IOCB, IOCB_CMD_PREAD, IOCB_FLAG_RESFD, RING_HEAD, RING_TAIL
from ringplane.native.syscalls import MSG_DONTWAIT, MSG_NOSIGNAL, SPLICE_F_NONBLOCK, io_submit, send, vmsplice, write
from ringplane.native.uio import IOVEC

# context: AIO's; iocb: address of the one IOCB; list: address of that address; iovec: address of an IOVEC
SIGNALLER = np.dtype([(name, "<i8") for name in ("context", "iocb", "list", "iovec")])


@compiled
def signal(address, fd, one):
    """Write the number 1 (8 bytes at address `one`) to this eventfd, pipe or socket.

    `address` is that of a SIGNALLER. If it is 0, write(2) is used, which may block.
    """
    if address == 0:
        write(fd, one, 8)
        return
    signaller = view(address, SIGNALLER)
    view(signaller.iocb, IOCB).resfd = fd
    result = io_submit(signaller.context, 1, signaller.list)
    # Discard the completion.
    store32(signaller.context + RING_HEAD, load32(signaller.context + RING_TAIL))
    if result == -EINVAL:
        result = send(fd, one, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
    if result == -ENOTSOCK:
        iovec = view(signaller.iovec, IOVEC)
        iovec.base, iovec.len = one, 8
        vmsplice(fd, signaller.iovec, 1, SPLICE_F_NONBLOCK)


class Signaller:
    """Owns a SIGNALLER struct; `address` is its address."""

    def __init__(self) -> None:
        """Raises OSError where AIO is unavailable."""
        self._context = aio_abi.io_setup(1)
        self._null = _open_null()
        self._iocb: npt.NDArray[np.void] = np.zeros(1, IOCB)
        self._iovec: npt.NDArray[np.void] = np.zeros(1, IOVEC)
        self._list = np.array([self._iocb.ctypes.data], np.int64)
        self._record: npt.NDArray[np.void] = np.zeros(1, SIGNALLER)
        self.address = int(self._record.ctypes.data)
        iocb, record = self._iocb[0], self._record[0]
        iocb["lio_opcode"], iocb["fildes"], iocb["flags"] = IOCB_CMD_PREAD, self._null, IOCB_FLAG_RESFD
        record["context"], record["iocb"] = self._context, self._iocb.ctypes.data
        record["list"], record["iovec"] = self._list.ctypes.data, self._iovec.ctypes.data

    def close(self) -> None:
        aio_abi.io_destroy(self._context)
        os.close(self._null)


def _open_null() -> int:
    """/dev/null, or, in a jail without /dev, an empty memfd."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.memfd_create("null", os.MFD_CLOEXEC)
