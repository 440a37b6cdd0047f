"""What the process that compiles policies gives up before its first request; docs/security.md has the guarantees."""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Iterable

from ringplane.opener.allowed_folders import Folder
from ringplane.system import landlock, libc, seccomp
from ringplane.system.landlock import LANDLOCK_ACCESS_FS_READ_DIR, LANDLOCK_ACCESS_FS_READ_FILE
from ringplane.system.seccomp import DEADLY, Only

# What a child imports the compiler with.
ALLOWED = (
    # Requests, answers, and children.
    *("poll", "ppoll", "recvfrom", "sendto", "pipe2", "wait4", "setitimer", "prlimit64"),
    *("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
    # Files.
    *("openat2", "openat", "open", "close", "read", "pread64", "write", "lseek", "getdents64", "dup", "dup3"),
    *("fstat", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "readlink", "readlinkat", "getcwd"),
    *("fcntl", "ioctl"),
    # Memory and libraries.
    *("mmap", "mprotect", "munmap", "mremap", "madvise", "brk"),
    # The process.
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group"),
    *("futex", "set_robust_list", "set_tid_address", "rseq", "sched_yield", "sched_getaffinity", "prctl"),
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "uname", "sysinfo", "getrandom"),
    *("clock_gettime", "clock_getres", "gettimeofday", "clock_nanosleep", "getrusage"),
)
# include/uapi/linux/sched.h: no namespaces.
CLONE_NEW = 0x7E02_0000
LIMITED = {"clone": Only(0, (0,), mask=CLONE_NEW)}

# Where libraries are, and what they read, beside Python's own folders.
SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/ld.so.preload"),
    *("/sys/devices/system/cpu", "/proc/cpuinfo", "/proc/meminfo", "/dev/null", "/dev/urandom"),
)

# Fds beside those that are open already.
FDS = 256


def confine(folders: Iterable[Folder], places: Iterable[str]) -> list[int]:
    """Give up everything but reading files below these folders and in these places, and forking.

    Returns the fds of the places, and of what libraries need. Raises OSError.
    """
    python = list(_opened([*places, *SYSTEM]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = max(python, default=0) + FDS
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    libc.forbid_core_dumps()
    libc.forbid_new_rights()
    _keep_reading(python, [folder.fd for folder in folders])
    libc.drop_capabilities()
    if seccomp.available():
        seccomp.install(seccomp.program(ALLOWED, LIMITED, DEADLY))
    return python


def give_up_folders(python: Collection[int]) -> None:
    """Keep only reading what these fds are: in a child. Raises OSError."""
    _keep_reading(python)


def _keep_reading(python: Collection[int], folders: Collection[int] = ()) -> None:
    if landlock.version() > 0:
        listed = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR
        rights = {fd: listed if os.path.isdir(fd) else LANDLOCK_ACCESS_FS_READ_FILE for fd in python}
        landlock.keep_only(rights | dict.fromkeys(folders, LANDLOCK_ACCESS_FS_READ_FILE))


def _opened(places: Iterable[str]) -> Iterable[int]:
    for place in dict.fromkeys(places):
        try:
            yield os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # There is nothing to import.
            continue
