"""Linux system calls from compiled code, by number; each returns what the kernel returns: a result or -errno."""

from __future__ import annotations

from typing import Any

from ringplane.compiler.intrinsics import intrinsic
from ringplane.compiler.jit import compiled
from ringplane.system.syscall_numbers import NUMBERS

SYS_READ = NUMBERS["read"]
SYS_WRITE = NUMBERS["write"]
SYS_MMAP = NUMBERS["mmap"]
SYS_IOCTL = NUMBERS["ioctl"]
SYS_FDATASYNC = NUMBERS["fdatasync"]
SYS_FALLOCATE = NUMBERS["fallocate"]
SYS_PREADV = NUMBERS["preadv"]
SYS_PWRITEV = NUMBERS["pwritev"]
SYS_SENDTO = NUMBERS["sendto"]
SYS_SENDMSG = NUMBERS["sendmsg"]
SYS_RECVMSG = NUMBERS["recvmsg"]
SYS_EPOLL_CTL = NUMBERS["epoll_ctl"]
SYS_VMSPLICE = NUMBERS["vmsplice"]
SYS_EPOLL_PWAIT = NUMBERS["epoll_pwait"]
SYS_EPOLL_PWAIT2 = NUMBERS["epoll_pwait2"]
SYS_TIMERFD_SETTIME = NUMBERS["timerfd_settime"]
SYS_IO_SUBMIT = NUMBERS["io_submit"]
SYS_IO_URING_ENTER = NUMBERS["io_uring_enter"]

PROT_READ, PROT_WRITE = 1, 2
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x02, 0x10, 0x20
SPLICE_F_NONBLOCK = 2
MSG_DONTWAIT, MSG_NOSIGNAL = 0x40, 0x4000


@intrinsic
def _syscall(llvm: Any, number: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """syscall(2), with its -1 and errno turned back into the kernel's -errno."""
    result = llvm.call("syscall", [number, a, b, c, d, e, f], variadic=True)
    failed = llvm.builder.icmp_signed("==", result, llvm.number(-1))

    def error() -> Any:
        return llvm.builder.neg(llvm.load(llvm.call("__errno_location", []), bits=32))

    return llvm.unless_rare(failed, result, error)


@intrinsic
def monotonic_ns(llvm: Any) -> Any:
    """clock_gettime(2) of CLOCK_MONOTONIC in nanoseconds, through the vDSO: no system call."""
    timespec = llvm.local(2)
    llvm.call("clock_gettime", [llvm.number(1, bits=32), timespec], bits=32)
    seconds = llvm.load(timespec)
    nanoseconds = llvm.load(llvm.builder.add(timespec, llvm.number(8)))
    return llvm.builder.add(llvm.builder.mul(seconds, llvm.number(1_000_000_000)), nanoseconds)


@compiled
def read(fd, buffer, size):
    """read(2)"""
    return _syscall(SYS_READ, fd, buffer, size, 0, 0, 0)


@compiled
def ioctl(fd, request, argument):
    """ioctl(2) whose argument is an address"""
    return _syscall(SYS_IOCTL, fd, request, argument, 0, 0, 0)


@compiled
def fdatasync(fd):
    """fdatasync(2)"""
    return _syscall(SYS_FDATASYNC, fd, 0, 0, 0, 0, 0)


@compiled
def fallocate(fd, mode, offset, length):
    """fallocate(2)"""
    return _syscall(SYS_FALLOCATE, fd, mode, offset, length, 0, 0)


@compiled
def write(fd, buffer, size):
    """write(2)"""
    return _syscall(SYS_WRITE, fd, buffer, size, 0, 0, 0)


@compiled
def preadv(fd, iov, iov_count, offset):
    """preadv(2): bytes read into `iov_count` IOVEC structs."""
    return _syscall(SYS_PREADV, fd, iov, iov_count, offset, 0, 0)


@compiled
def pwritev(fd, iov, iov_count, offset):
    """pwritev(2): bytes written from `iov_count` IOVEC structs."""
    return _syscall(SYS_PWRITEV, fd, iov, iov_count, offset, 0, 0)


@compiled
def send(fd, buffer, size, flags):
    """send(2)"""
    return _syscall(SYS_SENDTO, fd, buffer, size, flags, 0, 0)


@compiled
def sendmsg(fd, message, flags):
    """sendmsg(2): `message` is the address of a MESSAGE."""
    return _syscall(SYS_SENDMSG, fd, message, flags, 0, 0, 0)


@compiled
def recvmsg(fd, message, flags):
    """recvmsg(2): `message` is the address of a MESSAGE."""
    return _syscall(SYS_RECVMSG, fd, message, flags, 0, 0, 0)


@compiled
def epoll_ctl(epoll_fd, operation, fd, event):
    """epoll_ctl(2): `event` is the address of an EPOLL_EVENT."""
    return _syscall(SYS_EPOLL_CTL, epoll_fd, operation, fd, event, 0, 0)


@compiled
def vmsplice(fd, iov, iov_count, flags):
    """vmsplice(2): `iov_count` IOVEC structs into a pipe, which refers to their bytes from then on."""
    return _syscall(SYS_VMSPLICE, fd, iov, iov_count, flags, 0, 0)


@compiled
def mmap_anonymous_page(address, size):
    """mmap(2): a private page of zeros at exactly this address, replacing what is mapped there."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    return _syscall(SYS_MMAP, address, size, PROT_READ | PROT_WRITE, flags, -1, 0)


@compiled
def epoll_wait(epoll_fd, events, max_events, timeout_ms):
    """epoll_wait(2): `events` is the address of EPOLL_EVENT structs."""
    return _syscall(SYS_EPOLL_PWAIT, epoll_fd, events, max_events, timeout_ms, 0, 0)


@compiled
def epoll_pwait2(epoll_fd, events, max_events, timeout):
    """epoll_pwait2(2): like `epoll_wait`, with the address of a TIMESPEC."""
    return _syscall(SYS_EPOLL_PWAIT2, epoll_fd, events, max_events, timeout, 0, 0)


@compiled
def timerfd_settime(fd, flags, new, old):
    """timerfd_settime(2): `new` and `old` are addresses of ITIMERSPEC structs; `old` may be 0."""
    return _syscall(SYS_TIMERFD_SETTIME, fd, flags, new, old, 0, 0)


@compiled
def io_submit(context, count, iocb_pointers):
    """io_submit(2): how many of `count` control blocks the kernel accepted, or -errno of the first."""
    return _syscall(SYS_IO_SUBMIT, context, count, iocb_pointers, 0, 0, 0)


@compiled
def io_uring_enter(ring_fd, to_submit, min_complete, flags, argument, size):
    """io_uring_enter(2): how many submissions the kernel accepted, or -errno."""
    return _syscall(SYS_IO_URING_ENTER, ring_fd, to_submit, min_complete, flags, argument, size)
