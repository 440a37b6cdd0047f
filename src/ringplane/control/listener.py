"""The listening socket of a disk: created at a path, or inherited. A stale one is replaced, a live one rejected."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ringplane.opener.opener import OpenerEnded
from ringplane.options.users import format_group
from ringplane.system.standard_fds import move_socket

if TYPE_CHECKING:
    from ringplane.opener.remote_opener import RemoteOpener

log = logging.getLogger(__name__)


# The longest name in unix(7)'s sun_path in bytes, without the zero at its end.
LONGEST_PATH = 107

# The mode of a group's socket.
GROUP_MODE = 0o660


class ListenError(Exception):
    """The socket cannot be used; the text is one line for the person who named it."""


class Listener:
    """A UNIX stream socket that front ends connect to, or one connection that was inherited."""

    def __init__(self, sock: socket.socket, path: Path | None = None, opener: RemoteOpener | None = None) -> None:
        """`opener`: what has made it and removes its file, which may take long, if not this process."""
        self.sock = sock
        self.path = path
        self.opener = opener
        self.connected = not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        # Whether we remove its file: not while another process listens on it (control/handover.py).
        self.owned = True
        self._identity = None
        with contextlib.suppress(OSError):
            self._identity = _identity(path) if path else None

    @classmethod
    def at(cls, path: Path, mode: int | None = None, group: int | None = None) -> Listener:
        """Listen at `path`; raises ListenError.

        When the file appears, front ends can connect.
        By default the file has the mode that umask(2) leaves, and the group of this process. With a `group` its members
        can connect, unless `mode` says something else.
        """
        remove_stale(path)
        place = _place_beside(path)
        sock = _bound(place, path, mode, group)
        try:
            _move(place, path)
        except OSError as error:
            sock.close()
            raise _cannot_listen(path, error) from None
        finally:
            place.unlink(missing_ok=True)
        return cls(sock, path)

    @classmethod
    def remote(cls, opener: RemoteOpener, path: Path, mode: int | None, group: int | None) -> Listener:
        """As `at`, by the process that opens files, which replaces nothing. Raises ListenError, OpenerEnded."""
        try:
            sock = opener.listen(path, GROUP_MODE if mode is None and group is not None else mode, group)
        except PermissionError as error:
            if group is not None and error.errno == errno.EPERM:
                raise _not_a_member(path, group) from None
            raise _cannot_listen(path, error) from None
        except OSError as error:
            raise _cannot_listen(path, error) from None
        return cls(sock, path, opener)

    @staticmethod
    def rehearse(path: Path, mode: int | None = None, group: int | None = None) -> None:
        """Raise the ListenError that `at` would raise now, without a socket at `path`: nobody can be served yet."""
        remove_stale(path)
        place = _place_beside(path)
        _bound(place, path, mode, group).close()
        place.unlink()

    @classmethod
    def inherited(cls, fd: int) -> Listener:
        """Serve the socket that was inherited as `fd`; raises ListenError."""
        fd = move_socket(fd)
        try:
            sock = socket.socket(fileno=fd)
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ListenError(f"file descriptor {fd} is not a socket: {why}") from None
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise ListenError(f"file descriptor {fd} is not a UNIX stream socket")
        return cls(sock)

    def close(self) -> None:
        """Close the socket and remove its file."""
        self.sock.close()
        self.remove_file()

    def remove_file(self) -> None:
        """Remove the socket's file, if it is still the one that we created."""
        if self.owned and self.path and self._identity:
            try:
                self._remove(self.path)
            except (OSError, OpenerEnded) as error:
                # The next process to listen there replaces it.
                why = error.strerror if isinstance(error, OSError) else error
                log.warning("%s: cannot remove the socket's file: %s", self.path, why)

    def _remove(self, path: Path) -> None:
        """Raises OSError, also if it cannot be known whose file this is, and OpenerEnded."""
        with contextlib.suppress(FileNotFoundError):
            if _identity(path) == self._identity:
                if self.opener is None:
                    path.unlink()
                else:
                    self.opener.unlink(path)

    def __str__(self) -> str:
        return str(self.path) if self.path else "an inherited socket"


def _bound(place: Path, path: Path, mode: int | None, group: int | None) -> socket.socket:
    """A socket that listens at `place`; raises a ListenError that names `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        try:
            sock.bind(str(place))
            undo.callback(place.unlink)
            _set_access(place, path, GROUP_MODE if mode is None and group is not None else mode, group)
            sock.listen()
        except OSError as error:
            raise _cannot_listen(path, error) from None
        undo.pop_all()
    return sock


def _place_beside(path: Path) -> Path:
    """The path of the socket until it listens: `disk.sock~`, or `disk.soc~` if there is no room for a longer name.

    ss(8) shows this path.
    """
    place = path.with_name(f"{path.name}~")
    if len(os.fsencode(place)) > LONGEST_PATH:
        place = path.with_name(path.name[:-1] + ("#" if path.name.endswith("~") else "~"))
    remove_stale(place)
    return place


def _move(place: Path, path: Path) -> None:
    """Move the socket without replacing anything at `path`. Raises OSError."""
    try:
        os.link(place, path)
    except FileExistsError:
        raise
    except OSError:
        # The file system has no hard links.
        os.rename(place, path)


def _set_access(place: Path, path: Path, mode: int | None, group: int | None) -> None:
    """Set `mode` and `group` if they are not None; raises ListenError and OSError."""
    if group is not None:
        try:
            os.chown(place, -1, group, follow_symlinks=False)
        except PermissionError:
            raise _not_a_member(path, group) from None
    if mode is not None:
        os.chmod(place, mode)


def _identity(path: Path) -> tuple[int, int]:
    """Raises OSError."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def check(path: Path, group: int | None) -> None:
    """Raises ListenError if `Listener.at` would, but creates nothing."""
    _is_stale(path)
    try:
        os.stat(f"{path.parent}/.")
        if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise OSError("AF_UNIX path too long")
    except OSError as error:
        raise _cannot_listen(path, error) from None
    if group is not None and os.geteuid() != 0 and group not in (os.getegid(), *os.getgroups()):
        raise _not_a_member(path, group)


def _cannot_listen(path: Path, error: OSError) -> ListenError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ListenError(f"{path}: the folder {path.parent} does not exist; create it or choose another path")
    if isinstance(error, PermissionError):
        return ListenError(f"{path}: user {os.geteuid()} may not create a socket in the folder {path.parent}")
    if len(os.fsencode(path)) > LONGEST_PATH:
        return ListenError(f"{path}: the path of a socket has at most {LONGEST_PATH} bytes; choose a shorter one")
    return ListenError(f"{path}: cannot listen on this socket: {error.strerror or error}")


def _not_a_member(path: Path, group: int) -> ListenError:
    name = format_group(group)
    return ListenError(
        f"{path}: its group cannot be {name}: this user is not a member; "
        f"join with: usermod -aG {name} USER, then log in again"
    )


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on; raises ListenError if the path is in use."""
    if _is_stale(path):
        path.unlink()


def _is_stale(path: Path) -> bool:
    """Whether the path is a socket that nobody listens on; raises ListenError for anything else there."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: exists and is not a socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except PermissionError:
            raise ListenError(f"{path}: a socket of another user exists; choose another path or remove it") from None
        except OSError:
            # A full queue of waiting front ends is a live server too.
            pass
    raise ListenError(
        f"{path}: another process is listening there; choose another path, or --upgrade to take over from it"
    )
