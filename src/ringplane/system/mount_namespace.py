"""Mount namespaces: what is mounted in one is seen by its processes only, and disappears with the last of them."""

from __future__ import annotations

import ctypes
import os
import select
from pathlib import Path

# <sched.h>, <sys/mount.h>
CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18

# Of the calling thread.
NAMESPACE, MOUNTS = "/proc/thread-self/ns/mnt", "/proc/thread-self/mountinfo"

_libc = ctypes.CDLL(None, use_errno=True)


def enter_mount_namespace() -> None:
    """Leave the mount namespace of the parent process, as any user. Call it before threads start. Raises OSError.

    Without the right to do that the process gets a user namespace too, in which it keeps its user and group.
    """
    try:
        _enter()
    except OSError as error:
        why = "mount namespaces are not allowed here; run it as root with CAP_SYS_ADMIN, or allow user namespaces"
        raise OSError(error.errno, f"{why} ({error.strerror})") from None


def _enter() -> None:
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(CLONE_NEWNS)
    except PermissionError:
        _unshare(CLONE_NEWNS | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _make_private()


class CopiedMounts:
    """A mount namespace for the calling thread, and the processes that it starts: a copy of that of its process.

    The process has entered one of its own; other threads stay there. This thread calls the methods. They raise OSError.
    """

    def __init__(self) -> None:
        self._process = os.open(NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        self._root, self._folder = (os.open(path, os.O_PATH | os.O_CLOEXEC) for path in ("/", "."))
        self._copy()

    def _copy(self) -> None:
        _unshare(CLONE_NEWNS)
        self._mounts = os.open(MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
        # proc(5): it is signaled when something is mounted or unmounted.
        self._changed = select.poll()
        self._changed.register(self._mounts, select.POLLPRI)

    def renew(self) -> None:
        """Replace the copy if somebody has mounted or unmounted something in it; no process uses it any more.

        When this returns, what was mounted has disappeared.
        """
        if self._changed.poll(0):
            os.close(self._mounts)
            _check(_libc.setns(self._process, CLONE_NEWNS), "setns(2)")
            # It went to the root of the namespace.
            os.fchdir(self._root)
            os.chroot(".")
            os.fchdir(self._folder)
            self._copy()


def is_mounted_below(folder: Path) -> bool:
    """Whether something is mounted there, or deeper, for the calling thread. The path has no symbolic links."""
    with open(MOUNTS, "rb") as mounts:
        places = (Path(os.fsdecode(_unescaped(line.split()[4]))) for line in mounts)
        return any(place.is_relative_to(folder) for place in places)


def _unescaped(path: bytes) -> bytes:
    """Spaces, and what else would be confusing, are octal numbers."""
    first, *others = path.split(b"\\")
    return first + b"".join(bytes([int(other[:3], 8)]) + other[3:] for other in others)


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare(2)")


def _make_private() -> None:
    """What is mounted from now on does not appear elsewhere."""
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "mount(2)")


def _check(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
