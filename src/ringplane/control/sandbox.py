"""The privileges that a process gives up before it serves the first front end, so that an attacker gains little.

Everything has been opened and loaded by then, and the I/O threads have not been started: Landlock and capabilities
belong to a thread, and new threads inherit them. docs/security.md says what is guaranteed.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import resource
import termios
from collections.abc import Collection
from pathlib import Path

from ringplane.compiler.cache import remove_temporary_cache
from ringplane.engines.uring import REGISTRATIONS
from ringplane.native.fs import (
    BLKDISCARD,
    BLKGETSIZE64,
    BLKIOMIN,
    BLKIOOPT,
    BLKPBSZGET,
    BLKROGET,
    BLKSECDISCARD,
    BLKSSZGET,
)
from ringplane.native.io_uring import IORING_REGISTER_ENABLE_RINGS
from ringplane.options.users import User
from ringplane.system import code_pages, landlock, libc, procfs, seccomp
from ringplane.system.confinement import kept, kept_ports, set_confined
from ringplane.system.seccomp import DEADLY, Only

log = logging.getLogger(__name__)

# System calls that are allowed with any arguments. Those of each request come first, because kernels before 5.11 run
# the filter for each call.
ALLOWED = (
    # The I/O threads: engines, kicks and notifications, copies into holes.
    *("io_uring_enter", "io_submit", "epoll_pwait", "epoll_pwait2", "read", "write", "preadv", "pwritev", "vmsplice"),
    "timerfd_settime",
    # All threads: locks and memory (see also `limited`).
    *("futex", "madvise", "munmap", "mremap", "brk"),
    # The helper threads, flushes and resizes.
    *("fdatasync", "fallocate", "lseek", "ftruncate", "fsync", "pread64", "pwrite64", "fstatfs"),
    # The control thread and its front ends.
    *(
        "epoll_wait",
        "epoll_ctl",
        "epoll_create1",
        "poll",
        "ppoll",
        "accept4",
        "getsockname",
        "getpeername",
        "getsockopt",
    ),
    *("recvmsg", "sendmsg", "recvfrom", "sendto", "shutdown", "eventfd2", "memfd_create", "dup", "close", "preadv2"),
    # Images of disks that are added: looked at, and the end of the process that opened them (opener/).
    *("fadvise64", "wait4"),
    # The handover to the next process.
    *("geteuid", "getcwd"),
    # The status of files, and removing the socket's file.
    *("fstat", "stat", "lstat", "newfstatat", "statx", "readlink", "readlinkat", "unlink", "unlinkat"),
    # Threads, signals, time, random numbers.
    *("set_robust_list", "rseq", "exit", "exit_group", "io_destroy", "getpid", "gettid", "sched_yield"),
    *("rt_sigreturn", "rt_sigaction", "rt_sigprocmask", "sigaltstack", "restart_syscall", "sched_getaffinity"),
    *("clock_gettime", "gettimeofday", "clock_nanosleep", "getrandom", "readv", "writev"),
)

# include/uapi/linux/sched.h; only threads of this process may be created, which share its memory and handlers.
CLONE_VM, CLONE_SIGHAND, CLONE_THREAD = 0x100, 0x800, 0x1_0000
CLONE_THREADS = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD

# ioctl_tty(2), which isatty(3) of glibc 2.42 uses; Python's termios lacks it.
TCGETS2 = 0x802C542A

# Sizes, properties and ranges of block devices; non-blocking sockets and eventfds; isatty(3).
IOCTLS = (
    *(BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT, BLKROGET, BLKDISCARD, BLKSECDISCARD),
    *(termios.FIONBIO, termios.TCGETS, TCGETS2),
)
FCNTLS = (
    *(fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_ADD_SEALS),
    # The locks of an image.
    *(fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK),
)

# For the state, if it is stored.
EXCHANGE = {"renameat2": Only(4, (libc.RENAME_EXCHANGE,))}


class SandboxError(RuntimeError):
    """The requested privileges cannot be given up; the message is one line for the user."""


def missing() -> list[str]:
    """The parts that this kernel, or an outer sandbox, does not let us use."""
    parts = {"Landlock": landlock.version() > 0, "seccomp filters": seccomp.available()}
    return [name for name, there in parts.items() if not there]


def change_user(user: User) -> None:
    """Become this user in all threads, without any other group. Raises SandboxError."""
    try:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise SandboxError(f"cannot become user {user.name}: {error.strerror}; only root can change the user") from None


def confine(removing_in: Collection[Path], exchanging_in: Path | None = None, otherwise: int = seccomp.REFUSE) -> None:
    """Give up all these privileges permanently; raises OSError.

    Files can still be removed in the folders `removing_in`, where the sockets are, and two files can exchange their
    names in the folder `exchanging_in`, where the state is (state_file.py). `otherwise` is the result of a system call
    that is neither allowed nor deadly. Parts that are `missing` are left out.
    """
    absent = missing()
    set_confined()
    remove_temporary_cache()
    # The number that glibc would use.
    libc.limit_arenas(8 * (os.cpu_count() or 1))
    libc.forbid_core_dumps()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code_pages.forbid_writable_code()
    libc.forbid_new_rights()
    _warn_of_other_threads()
    if "Landlock" not in absent:
        landlock.give_up_files(removing_in, () if exchanging_in is None else (exchanging_in,), kept_ports())
    libc.drop_capabilities()
    if "seccomp filters" not in absent:
        only = limited() if exchanging_in is None else limited() | EXCHANGE
        allowed = [name for name, how in kept().items() if how is None]
        only |= {name: how for name, how in kept().items() if how is not None}
        seccomp.install(seccomp.program([*ALLOWED, *allowed], only, DEADLY, otherwise))


def _warn_of_other_threads() -> None:
    """Numerical libraries may start threads when they are loaded; those of disks are known (`kept`)."""
    if others := procfs.other_threads():
        level = logging.INFO if kept() else logging.WARNING
        log.log(level, "threads started earlier (%d) keep their capabilities and access to files", others)


def limited() -> dict[str, Only]:
    """System calls that are allowed only with certain arguments."""
    no_code = Only(2, (0,), mask=mmap.PROT_EXEC)
    return {
        "mmap": no_code,
        "mprotect": no_code,
        "clone": Only(0, (CLONE_THREADS,), mask=CLONE_THREADS),
        # raise(3) of a signal for a previous handler (native/sigbus.py), and native/interrupt.py.
        "tgkill": Only(0, (os.getpid(),)),
        "sched_setaffinity": Only(0, (0,)),
        # Python names its threads since 3.14.
        "prctl": Only(0, (libc.PR_SET_TIMERSLACK, libc.PR_SET_NAME)),
        "ioctl": Only(1, IOCTLS),
        "fcntl": Only(1, FCNTLS),
        "io_uring_register": Only(1, (IORING_REGISTER_ENABLE_RINGS, *REGISTRATIONS)),
    }
