"""What the process that opens files gives up before its first request. docs/security.md says what is guaranteed."""

from __future__ import annotations

import mmap
import os
import resource
import socket
from collections.abc import Sequence

from ringplane.opener.allowed_folders import Folder, has_openat2
from ringplane.opener.server_places import Place
from ringplane.system import landlock, libc, seccomp
from ringplane.system.landlock import (
    LANDLOCK_ACCESS_FS_IOCTL_DEV,
    LANDLOCK_ACCESS_FS_MAKE_REG,
    LANDLOCK_ACCESS_FS_MAKE_SOCK,
    LANDLOCK_ACCESS_FS_READ_FILE,
    LANDLOCK_ACCESS_FS_REMOVE_FILE,
    LANDLOCK_ACCESS_FS_TRUNCATE,
    LANDLOCK_ACCESS_FS_WRITE_FILE,
)
from ringplane.system.seccomp import DEADLY, Only

ALLOWED = (
    # Requests and answers.
    *("poll", "ppoll", "recvfrom", "sendmsg", "close"),
    # Images.
    *("openat2", "fstat", "newfstatat", "ftruncate"),
    # Sockets.
    *("fchdir", "umask", "bind", "listen", "fchownat"),
    # Both.
    "unlinkat",
    # Memory, signals and the end.
    *("brk", "munmap", "mremap", "madvise", "futex", "rt_sigreturn", "restart_syscall", "exit_group"),
)
# To connect to servers.
CONNECTING = ("connect",)
LIMITED = {
    "mmap": Only(2, (0,), mask=mmap.PROT_EXEC),
    "mprotect": Only(2, (0,), mask=mmap.PROT_EXEC),
}

# Rights below the folders. Those to truncate a file, and to ask a device for its size, stay with an open file, also
# when another process uses it: landlock(7).
RIGHTS = (
    LANDLOCK_ACCESS_FS_READ_FILE
    | LANDLOCK_ACCESS_FS_WRITE_FILE
    | LANDLOCK_ACCESS_FS_TRUNCATE
    | LANDLOCK_ACCESS_FS_MAKE_REG
    | LANDLOCK_ACCESS_FS_MAKE_SOCK
    | LANDLOCK_ACCESS_FS_REMOVE_FILE
)

# Fds beside those of the folders.
FDS = 32


def change_user(uid: int, gid: int) -> None:
    """Become this user, without any other group. Raises OSError."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def confine(folders: Sequence[Folder], places: Sequence[Place] = ()) -> None:
    """Give up everything but opening below these folders and connecting to these places, as far as the kernel can.

    Raises OSError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = max(folder.fd for folder in folders) + 1 + FDS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    libc.forbid_core_dumps()
    libc.forbid_new_rights()
    if landlock.version() > 0:
        ports = {port for _, address in places if isinstance(address, tuple) and isinstance(port := address[1], int)}
        landlock.keep_only({folder.fd: _rights(folder) for folder in folders}, ports)
    libc.drop_capabilities()
    if seccomp.available():
        opening = () if has_openat2(folders[0]) else ("openat",)
        sockets = {"socket": Only(0, {socket.AF_UNIX, *(family for family, _ in places)})}
        connecting = CONNECTING if places else ()
        seccomp.install(seccomp.program((*ALLOWED, *opening, *connecting), LIMITED | sockets, DEADLY))


def _rights(folder: Folder) -> int:
    return RIGHTS | (LANDLOCK_ACCESS_FS_IOCTL_DEV if folder.devices else 0)
