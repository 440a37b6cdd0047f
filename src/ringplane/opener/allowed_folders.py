"""What the process that opens files does: below the folders that were named at the start, and nowhere else.

A folder is the one that had this path at the start, wherever it is moved later. A path below it leads down name by
name, through no symbolic link of any kind (openat2(2), or name by name), whatever others change at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator

from ringplane.opener.open_requests import CREATE, DIRECT, LISTEN, OPEN, READ_ONLY, UNLINK, UNSET, Request, is_below_dev
from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import NUMBERS

# openat2(2): struct open_how: flags, mode, resolve; and how a path is resolved.
OPEN_HOW = struct.Struct("=QQQ")
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08
STRICTLY = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS

# Non-blocking, so that nothing is waited for; files and block devices ignore the flag.
OPENED = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

# Sockets that this process can remove again: more than a process can serve. And images, with their zone files: only
# those of a disk that cannot be added after all are removed.
MOST_SOCKETS, MOST_IMAGES = 4096, 2

# The longest name in unix(7)'s sun_path in bytes, without the zero at its end.
LONGEST_NAME = 107


class Folder:
    """An allowed folder. `devices`: block devices in it may be opened too."""

    __slots__ = ("devices", "fd")

    def __init__(self, fd: int, devices: bool) -> None:
        self.fd, self.devices = fd, devices


def open_folder(path: str) -> Folder:
    """The folder that has this path now. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return Folder(fd, is_below_dev(path))


def has_openat2(folder: Folder) -> bool:
    """Whether this kernel, or a jail around us, has openat2(2).

    Linux before 5.6 does not; nor do services with RestrictSUIDSGID=, which systemd's DynamicUser= implies.
    """
    try:
        os.close(_open_strictly(folder.fd, b".", os.O_PATH | os.O_CLOEXEC, 0))
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def _open_beneath(folder: int, path: bytes, flags: int, mode: int = 0) -> int:
    try:
        return _open_strictly(folder, path, flags, mode)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return _descend(folder, path, flags, mode)


def _open_strictly(folder: int, path: bytes, flags: int, mode: int) -> int:
    how = OPEN_HOW.pack(flags, mode, STRICTLY)
    return system_call(NUMBERS["openat2"], folder, path, how, OPEN_HOW.size)


def _descend(folder: int, path: bytes, flags: int, mode: int) -> int:
    """The same without openat2(2): each name of the path is opened by itself, and none leads up or along a link."""
    *above, last = path.split(b"/")
    with contextlib.ExitStack() as passed:
        for name in above:
            folder = _open_name(folder, name, os.O_PATH | os.O_CLOEXEC, 0)
            passed.callback(os.close, folder)
        return _open_name(folder, last, flags, mode)


def _open_name(folder: int, name: bytes, flags: int, mode: int) -> int:
    # With O_PATH a link itself is opened. It is not a folder either, and the errors are to be those of openat2(2).
    fd = os.open(name, flags & ~os.O_DIRECTORY | os.O_NOFOLLOW, mode, dir_fd=folder)
    kind = os.fstat(fd).st_mode
    if stat.S_ISLNK(kind) or (flags & os.O_DIRECTORY and not stat.S_ISDIR(kind)):
        os.close(fd)
        code = errno.ELOOP if stat.S_ISLNK(kind) else errno.ENOTDIR
        raise OSError(code, os.strerror(code))
    return fd


class AllowedFolders:
    """Does what requests ask for; each raises OSError."""

    def __init__(self, folders: list[Folder]) -> None:
        self._folders = folders
        # What this process has made and may remove: the last images, and sockets, by folder and path.
        self._images: dict[tuple[int, bytes], tuple[int, int]] = {}
        self._sockets: dict[tuple[int, bytes], tuple[int, int]] = {}

    def do(self, request: Request) -> int | None:
        """Returns the fd that the request is for, which the caller closes."""
        if request.kind == OPEN:
            return self._open(request)
        if request.kind == LISTEN:
            return self._listen(request)
        if request.kind == CREATE:
            self._create(request)
        elif request.kind == UNLINK:
            self._unlink(request)
        return None

    def _open(self, request: Request) -> int:
        folder = self._folders[request.folder]
        flags = OPENED | (os.O_RDONLY if request.how & READ_ONLY else os.O_RDWR)
        flags |= os.O_DIRECT if request.how & DIRECT else 0
        # Opening has an effect on some devices, so it is looked at before.
        looked_at = _open_beneath(folder.fd, request.path, os.O_PATH | os.O_CLOEXEC)
        try:
            status = os.fstat(looked_at)
            _refuse_unless_image(status, folder)
            # `looked_at` stays open, so that no other file can get its inode.
            fd = _open_beneath(folder.fd, request.path, flags)
        finally:
            os.close(looked_at)
        if _identity(os.fstat(fd)) != _identity(status):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _create(self, request: Request) -> None:
        folder = self._folders[request.folder]
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = _open_beneath(folder.fd, request.path, flags, 0o600)
        self._forget(request)
        self._images[request.folder, request.path] = _identity(os.fstat(fd))
        if len(self._images) > MOST_IMAGES:
            del self._images[next(iter(self._images))]
        try:
            os.ftruncate(fd, request.size)
        except OSError:
            self._take_back(request)
            raise
        finally:
            os.close(fd)

    def _listen(self, request: Request) -> int:
        if len(self._sockets) >= MOST_SOCKETS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with self._parent(request) as (parent, name):
            if len(name) > LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            # bind(2) has no parameter for a folder. This is a process with one thread.
            os.fchdir(parent)
            sock = _bound(name, request.mode)
            self._forget(request)
            try:
                self._sockets[request.folder, request.path] = _identity(_status(name, parent))
                if request.group != UNSET:
                    os.chown(name, -1, request.group, dir_fd=parent, follow_symlinks=False)
                sock.listen()
            except OSError:
                sock.close()
                self._take_back(request)
                raise
        return sock.detach()

    def _take_back(self, request: Request) -> None:
        """After a failure, which is what is reported."""
        with contextlib.suppress(OSError):
            self._unlink(request)

    def _unlink(self, request: Request) -> None:
        """Remove what this process has made, if it is still there."""
        made = self._forget(request)
        if made is None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with self._parent(request) as (parent, name):
            if _identity(_status(name, parent)) != made:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            os.unlink(name, dir_fd=parent)

    def _forget(self, request: Request) -> tuple[int, int] | None:
        """What this process has made at this path; it does not remove it any more."""
        key = request.folder, request.path
        socket_made, image_made = self._sockets.pop(key, None), self._images.pop(key, None)
        return socket_made or image_made

    @contextlib.contextmanager
    def _parent(self, request: Request) -> Iterator[tuple[int, bytes]]:
        """The folder that a path's last name is in, as an fd; and this name."""
        above, _, name = request.path.rpartition(b"/")
        fd = _open_beneath(self._folders[request.folder].fd, above or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd, name
        finally:
            os.close(fd)


def _refuse_unless_image(status: os.stat_result, folder: Folder) -> None:
    if stat.S_ISBLK(status.st_mode) and not folder.devices:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))


def _bound(name: bytes, mode: int) -> socket.socket:
    """A socket that is bound to a name in the current folder, which has this mode from its first moment on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode) if mode != UNSET else None
    try:
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    finally:
        if before is not None:
            os.umask(before)
    return sock


def _status(name: bytes, parent: int) -> os.stat_result:
    return os.stat(name, dir_fd=parent, follow_symlinks=False)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
