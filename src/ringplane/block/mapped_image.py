"""An image in memory (tmpfs, hugetlbfs) that is mapped, and copies between it and buffers.

Facts that this file depends on:
- A copy into or out of a hole of a tmpfs file through a mapping allocates memory; if none is left, it raises SIGBUS.
  pwrite(2) returns ENOSPC instead, and pread(2) leaves holes alone. So a page map says which pages have memory, and
  only those are copied; everything else is done with system calls, which never block here.
- An access to a page that was removed (the image was truncated) raises SIGBUS too. native/sigbus.py puts another page
  there and sets `lost`. From then on the mapping is not used: the copy is repeated as a system call, and all later I/O
  is system calls.
- hugetlbfs does not support write(2), but a mapping reserves the pages that it may need.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from errno import EINVAL

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.engines.common import READ, WRITE
from ringplane.native import sigbus
from ringplane.native.access import address_of, copy, load8, load64, prefetch, store8, view
from ringplane.native.syscalls import preadv, pwritev
from ringplane.native.uio import IOV_MAX, IOVEC, IOVEC_SIZE
from ringplane.system import huge_pages, libc

PAGE_BITS = 12
PAGE = 1 << PAGE_BITS

# fd; base: where the image is mapped; present: the page map, one byte per page, not 0 if the page has memory; lost: a
# page was removed, set by the SIGBUS handler on any thread; reported: Python was called for that; holes: pages may be
# without memory (not with huge pages, where enough are reserved for all).
MAPPED_IMAGE = np.dtype([(name, "<i8") for name in ("fd", "base", "present", "lost", "reported", "holes")])
LOST: int = MAPPED_IMAGE.fields["lost"][1]  # type: ignore[index]


@compiled
def prefetch_pages(image, offset):
    """Prefetch for a transfer at `offset`: its walk through the page tables takes half the time of the copy."""
    prefetch(image.base + offset)


@compiled
def read_or_write(image, operation, iov, iov_count, offset, size):
    """Read or write the `size` bytes of `iov_count` IOVEC structs; returns the number of bytes done or -errno."""
    if not READ <= operation <= WRITE:
        return -EINVAL
    if load64(address_of(image) + LOST) == 0 and is_present(image, offset, size):
        copy_all(operation, iov, iov_count, image.base + offset)
        # A fault of this copy, or of another thread's copy in the same page, was recorded before the copy ended.
        if load64(address_of(image) + LOST) == 0:
            return size
    if operation == READ:
        return preadv(image.fd, iov, min(iov_count, IOV_MAX), offset)
    written = pwritev(image.fd, iov, min(iov_count, IOV_MAX), offset)
    if written > 0:
        mark_present(image, offset, written)
    return written


@compiled
def is_present(image, offset, size):
    """Whether all pages of these bytes have memory."""
    for page in range(offset >> PAGE_BITS, (offset + size + PAGE - 1) >> PAGE_BITS):
        if load8(image.present + page) == 0:
            return False
    return True


@compiled
def mark_present(image, offset, size):
    """pwrite(2) has allocated each page that it wrote to."""
    for page in range(offset >> PAGE_BITS, (offset + size + PAGE - 1) >> PAGE_BITS):
        store8(image.present + page, 1)


@compiled
def mark_absent(image, offset, size):
    """The pages that lie wholly in this range have been freed; pages that lie partly in it keep their memory."""
    if image.holes:
        for page in range((offset + PAGE - 1) >> PAGE_BITS, (offset + size) >> PAGE_BITS):
            store8(image.present + page, 0)


@compiled
def copy_all(operation, iov, iov_count, place):
    """Copy between the buffers and the image, which is at address `place`."""
    for index in range(iov_count):
        iovec = view(iov + index * IOVEC_SIZE, IOVEC)
        if operation == READ:
            copy(iovec.base, place, iovec.len)
        else:
            copy(place, iovec.base, iovec.len)
        place += iovec.len


class MappedImage:
    """Owns the mapping of an image; `address` is the address of the MAPPED_IMAGE struct."""

    def __init__(self, fd: int, size: int, *, read_only: bool) -> None:
        """Map `size` bytes of `fd`; raises OSError if there are not enough huge pages."""
        self._fd, self._read_only = fd, read_only
        self._unmaps: list[weakref.finalize[[int, int, int], MappedImage]] = []
        self._present: list[npt.NDArray[np.uint8]] = []
        self._mapped = 0
        self._loss_taken = False
        self._record: npt.NDArray[np.void] = np.zeros(1, MAPPED_IMAGE)
        self.address = int(self._record.ctypes.data)
        self._record["fd"] = fd
        self.map(size)

    def resize(self, size: int) -> None:
        """The image has `size` bytes now. Raises OSError if they cannot be mapped.

        A mapping is kept until `close`, because copies may be using it. An access beyond the end of an image that was
        shortened raises SIGBUS, which is caught.
        """
        if size > self._mapped:
            self.map(size)
        elif self._record["holes"]:
            present = pages_with_memory(self._fd, size)
            self._present[-1][: len(present)] = present

    def map(self, size: int) -> None:
        """Map `size` bytes from now on; raises OSError."""
        page = os.fstat(self._fd).st_blksize
        huge = has_huge_pages(self._fd)
        length = max(page, -(-size // page) * page if huge else size)
        present = np.ones(-(-size // PAGE), np.uint8) if huge else pages_with_memory(self._fd, size)
        base = libc.mmap_shared(self._fd, length, 0, writable=not self._read_only, reserve=huge)
        try:
            guard = sigbus.guard(base, length, page if huge else mmap.PAGESIZE, self.address + LOST)
        except BaseException:
            libc.munmap(base, length)
            raise
        self._present.append(present)
        # Not at the interpreter's exit, where a worker's thread may still be running.
        self._unmaps.append(weakref.finalize(self, _unmap, guard, base, length))
        self._unmaps[-1].atexit = False
        # A copy may use one of the two with the old value of the other, for offsets within the smaller size.
        self._record["present"], self._record["holes"] = present.ctypes.data, not huge
        self._record["base"] = base
        self._mapped = size

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        for unmap in self._unmaps:
            unmap()

    def take_loss(self) -> bool:
        """Whether a page was removed since this was last asked."""
        taken = self.lost and not self._loss_taken
        self._loss_taken = self.lost
        return taken

    @property
    def lost(self) -> bool:
        """Whether a page of the image was removed, so that the mapping is not used any more."""
        return bool(self._record["lost"][0])


def _unmap(guard: int, base: int, length: int) -> None:
    sigbus.release(guard)
    libc.munmap(base, length)


def pages_with_memory(fd: int, size: int) -> npt.NDArray[np.uint8]:
    """One byte per page of a file, 1 if the page is not in a hole (lseek(2), SEEK_DATA)."""
    try:
        present = np.zeros(-(-size // PAGE), np.uint8)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:
            # ENXIO: a hole up to the end. Any other error: pages that are not marked are accessed with system calls.
            break
        present[start // PAGE : -(-end // PAGE)] = 1
    return present


def has_huge_pages(fd: int) -> bool:
    """Whether a file is on hugetlbfs. Raises OSError."""
    return libc.file_system_type(fd) == libc.HUGETLBFS_MAGIC


def has_room(fd: int, size: int) -> bool:
    """Whether there are enough huge pages for a file on hugetlbfs to have so many bytes; nothing is reserved."""
    status = os.fstat(fd)
    page = status.st_blksize
    most = huge_pages.most(page)
    return most is None or -(-size // page) - status.st_blocks * 512 // page <= most


def is_memory(fd: int) -> bool:
    """Whether an image is a file on a file system in memory, so that this engine can serve it."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        # fstatfs(2) of a block device describes the file system of its node in /dev, often a tmpfs, not its data.
        return False
    try:
        return libc.file_system_type(fd) in (libc.TMPFS_MAGIC, libc.RAMFS_MAGIC, libc.HUGETLBFS_MAGIC)
    except OSError:
        return False
