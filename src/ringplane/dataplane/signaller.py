"""Signals to a front end's eventfd, pipe or socket that cannot wait, for I/O threads that serve other front ends too.

write(2) to a full eventfd waits unless the file has O_NONBLOCK, which whoever else has the file can take away at any
time, and eventfds know no RWF_NOWAIT for writes. When the kernel itself signals one it never waits. So an AIO request
is made that ends at once, a read of /dev/null, and that has the eventfd signalled (io_submit(2), IOCB_FLAG_RESFD). It
takes some 0.7 us more than write(2), which threads of one disk are spared: they are interrupted when they are wanted
(vhost_user/session.py). To a socket (user-mode Linux) it is sent by send(2), and to a pipe by vmsplice(2): both can be
told not to wait, whatever the file says. What the pipe holds then is a reference to a number that never changes.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from ringplane.engines.aio import IOCB, IOCB_CMD_PREAD, IOCB_FLAG_RESFD, RING_HEAD, RING_TAIL
from ringplane.native import libc
from ringplane.native.access import load32, store32, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import (
    EINVAL,
    ENOTSOCK,
    IOVEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SPLICE_F_NONBLOCK,
    io_submit,
    send,
    vmsplice,
    write,
)

# context: AIO's; iocb: address of the one IOCB; list: address of that address; iovec: address of an IOVEC
SIGNALLER = np.dtype([(name, "<i8") for name in ("context", "iocb", "list", "iovec")])


@compiled
def signal(address, fd, one):
    """Write the 8 bytes of 1, at address `one`, to this eventfd, pipe or socket, with the SIGNALLER at `address`.

    Where that is 0, by write(2), which may wait.
    """
    if address == 0:
        write(fd, one, 8)
        return
    signaller = view(address, SIGNALLER)
    view(signaller.iocb, IOCB).resfd = fd
    result = io_submit(signaller.context, 1, signaller.list)
    # Of the completion nobody wants to know.
    store32(signaller.context + RING_HEAD, load32(signaller.context + RING_TAIL))
    if result == -EINVAL:
        result = send(fd, one, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
    if result == -ENOTSOCK:
        iovec = view(signaller.iovec, IOVEC)
        iovec.base, iovec.len = one, 8
        vmsplice(fd, signaller.iovec, 1, SPLICE_F_NONBLOCK)


class Signaller:
    """Owns a SIGNALLER; `address` is the struct's."""

    def __init__(self) -> None:
        """Raises OSError where there is no AIO to be had."""
        self._context = libc.io_setup(1)
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
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
        libc.io_destroy(self._context)
        os.close(self._null)
