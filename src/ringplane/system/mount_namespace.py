"""A mount namespace of this process: what it mounts is seen by its children only, and disappears with them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# <sched.h>, <sys/mount.h>
CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def enter_mount_namespace() -> None:
    """Leave the mount namespace of the parent process, as any user. Call it before threads start. Raises OSError.

    Without the right to do that the process gets a user namespace too, in which it keeps its user and group.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(CLONE_NEWNS)
    except PermissionError:
        _unshare(CLONE_NEWNS | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _make_private()


def copy_mount_namespace() -> None:
    """In a child of a process that has entered one: what it mounts is not seen by its parent. Raises OSError."""
    _unshare(CLONE_NEWNS)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise _error("unshare(2)")


def _make_private() -> None:
    """What is mounted from now on does not appear elsewhere."""
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) != 0:
        raise _error("mount(2)")


def _error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
