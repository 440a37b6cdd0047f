"""The C library calls that the control plane needs and Python's standard library lacks, through ctypes."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

from ringplane.system.syscall_numbers import NUMBERS

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_NORESERVE = 0x01, 0x4000
# include/uapi/linux/fs.h
RENAME_EXCHANGE = 2
MADV_DONTNEED, MADV_DONTDUMP = 4, 16
MAP_FAILED = ctypes.c_void_p(-1).value
# <elf.h>: the address of 16 bytes that the kernel has put on the stack of the first thread.
AT_RANDOM = 25
# <malloc.h>
M_ARENA_MAX = -8

# struct sigaction of glibc: handler, 128 bytes of signal mask, flags, restorer
SIGACTION = struct.Struct("q128xi4xq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
_libc.getauxval.restype = ctypes.c_ulong
_libc.getauxval.argtypes = [ctypes.c_ulong]
_libc.pthread_mutex_lock.argtypes = _libc.pthread_mutex_unlock.argtypes = [ctypes.c_void_p]


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def system_call(number: int, *arguments: int | bytes) -> int:
    """syscall(2): returns the result; raises OSError. For bytes the address is passed."""
    words = (each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments)
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise _error()
    return result


def lock_mutex(address: int) -> None:
    """pthread_mutex_lock(3), for a mutex that compiled code locks as well (native/mutex.py)."""
    _libc.pthread_mutex_lock(address)


def unlock_mutex(address: int) -> None:
    """pthread_mutex_unlock(3)."""
    _libc.pthread_mutex_unlock(address)


def mmap_shared(fd: int, size: int, offset: int, *, writable: bool = True, reserve: bool = False) -> int:
    """mmap(2): the address of `size` bytes of `fd` from `offset`, shared; raises OSError.

    `reserve` reserves huge pages for all of it. Core dumps do not contain it: it is a guest's memory or disk.
    """
    protection = PROT_READ | PROT_WRITE if writable else PROT_READ
    address = _libc.mmap(None, size, protection, MAP_SHARED | (0 if reserve else MAP_NORESERVE), fd, offset)
    if address == MAP_FAILED or address is None:
        raise _error()
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTDUMP)
    return int(address)


def mmap_code(fd: int, size: int) -> int:
    """mmap(2): the address of `size` bytes of `fd`, shared, for reading and executing; raises OSError."""
    address = _libc.mmap(None, size, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_NORESERVE, fd, 0)
    if address == MAP_FAILED or address is None:
        raise _error()
    return int(address)


def stack_address() -> int:
    """An address in the stack of the first thread (getauxval(3))."""
    return int(_libc.getauxval(AT_RANDOM))


def sigaction(number: int, handler: int, flags: int = 0, previous: int = 0) -> None:
    """sigaction(2): set the handler at this address, with no signals masked; raises OSError.

    The previous action is stored at address `previous`, a SIGACTION.
    """
    if _libc.sigaction(number, SIGACTION.pack(handler, flags, 0), ctypes.c_void_p(previous)) != 0:
        raise _error()


def inotify_init() -> int:
    """inotify_init1(2): a new fd; raises OSError."""
    fd = int(_libc.inotify_init1(os.O_CLOEXEC))
    if fd < 0:
        raise _error()
    return fd


def inotify_add_watch(fd: int, path: bytes, mask: int) -> None:
    """inotify_add_watch(2); raises OSError."""
    if _libc.inotify_add_watch(fd, path, ctypes.c_uint32(mask)) < 0:
        raise _error()


def munmap(address: int, size: int) -> None:
    """munmap(2); raises OSError."""
    if _libc.munmap(address, size) != 0:
        raise _error()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        raise _error()


def release_pages(address: int, size: int) -> None:
    """madvise(2), MADV_DONTNEED: the content of these pages is dropped; that of a file is loaded again when used."""
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTNEED)


def mprotect(address: int, size: int, protection: int) -> None:
    """mprotect(2); raises OSError."""
    if _libc.mprotect(ctypes.c_void_p(address), size, protection) != 0:
        raise _error()


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS = 1, 4, 15, 29, 38


def set_timer_slack(nanoseconds: int) -> None:
    """prctl(2), PR_SET_TIMERSLACK: how late the kernel may wake up the calling thread; the default is 50 us."""
    _libc.prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds), 0, 0, 0)


def name_thread(name: str) -> None:
    """prctl(2), PR_SET_NAME: the name of the calling thread in ps(1) and /proc, of at most 15 bytes."""
    _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def limit_arenas(count: int) -> None:
    """Limit the number of heaps of malloc(3) (mallopt(3)).

    By default glibc makes one per thread, and opens files to count the CPUs when it makes the ninth.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, count)


def trim_heap() -> None:
    """malloc_trim(3): return free memory to the kernel, of which glibc keeps up to 64 MB at the end of its heap."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def end_with_parent() -> None:
    """prctl(2), PR_SET_PDEATHSIG: this process is killed when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def forbid_core_dumps() -> None:
    """prctl(2), PR_SET_DUMPABLE: no core dumps, and no debugger of the same user."""
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def forbid_new_rights() -> None:
    """prctl(2), PR_SET_NO_NEW_PRIVS: the calling thread gains no privileges from programs that it executes."""
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


# capset(2): struct __user_cap_header_struct, and the version whose three sets are twice 32 bits each
CAPABILITY_HEADER, CAPABILITY_VERSION_3 = struct.Struct("=Ii"), 0x20080522
CAPABILITY_SETS_SIZE = 6 * 4


def drop_capabilities() -> None:
    """capset(2): drop all capabilities of the calling thread; raises OSError."""
    header = CAPABILITY_HEADER.pack(CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(CAPABILITY_SETS_SIZE)
    system_call(NUMBERS["capget"], header, ctypes.addressof(sets))
    # A thread without capabilities may be forbidden to call capset(2): systemd counts it as a privileged call.
    if any(sets.raw):
        system_call(NUMBERS["capset"], header, bytes(CAPABILITY_SETS_SIZE))


TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC = 0x01021994, 0x858458F6, 0x958458F6
STATFS_SIZE = 256


def file_system_type(fd: int) -> int:
    """fstatfs(2): the magic number of the file system that an open file is on; raises OSError."""
    statfs = ctypes.create_string_buffer(STATFS_SIZE)
    if _libc.fstatfs(fd, statfs) != 0:
        raise _error()
    return int(struct.unpack_from("q", statfs)[0])


AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
# struct statx: 256 bytes, its mask at 0, stx_dio_mem_align and stx_dio_offset_align at 0x98
STATX_SIZE, STATX_MASK_OFFSET, STATX_DIO_OFFSET = 256, 0, 0x98


def direct_io_alignment(fd: int) -> tuple[int, int] | None:
    """The alignment of (memory addresses, offsets and lengths) for O_DIRECT on `fd`, in bytes; None if unknown."""
    statx = ctypes.create_string_buffer(STATX_SIZE)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, statx) != 0:
        return None
    (mask,) = struct.unpack_from("I", statx, STATX_MASK_OFFSET)
    memory, block = struct.unpack_from("II", statx, STATX_DIO_OFFSET)
    return (memory, block) if mask & STATX_DIOALIGN and memory and block else None
