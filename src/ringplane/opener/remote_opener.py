"""Our end of the process that opens files (opening_process.py). What it sends is checked: it is not trusted.

It may be asked from any thread, before and after this process has given up its rights, by one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ringplane.opener.allowed_folders import open_folder
from ringplane.opener.exchange import KILLED, NO_ROOM, Check, Exchange, WrongAnswer, unpacked
from ringplane.opener.open_requests import (
    ABSENT,
    ANSWER,
    CONNECT,
    CREATE,
    DIRECT,
    LARGEST_SIZE,
    LISTEN,
    LONGEST_PATH,
    OPEN,
    POLICIES,
    READ_ONLY,
    UNLINK,
    UNSET,
    Request,
    is_below_dev,
    is_readable_only,
    is_relative,
)
from ringplane.opener.opener import OpenerEnded
from ringplane.opener.remote_compiler import RemoteCompiler
from ringplane.opener.server_places import Place, as_text, shown
from ringplane.system.signals import NONE, Signals, held_back

log = logging.getLogger(__name__)

# Only Python's own modules and ours, which come last, whatever the environment says.
CODE = "import sys; sys.path.append(sys.argv[1]); from ringplane.opener.opening_process import main; main(sys.argv[2:])"

# Seconds that an answer may take with the requests before it, that to a request which removes something, the start of
# the process, and its end.
PATIENCE, REMOVING_PATIENCE, START_PATIENCE, END_PATIENCE = 10.0, 2.0, 60.0, 1.0

GIVEN_UP = "the process that opens files has ended: %s; no disk can be added until a restart, all continue%s"
ENDED = "the process that opens files has ended; restart ringplane to add disks (those that are served continue{but})"

FOR_POLICIES = f"a name that ends with {POLICIES.decode()} is for policies; choose another"

CANNOT_COMPILE = (
    "this system cannot share memory for code (Linux 5.1, x86-64), so only policies can be used that are loaded at the "
    "start"
)

# Of the environment of the process; NumPy's library starts a thread per CPU otherwise, where policies are compiled.
PASSED, ONE_THREAD = ("LD_LIBRARY_PATH",), {"OPENBLAS_NUM_THREADS": "1"}

# In both, of a process that connects to servers too.
BUT = ", but NBD disks that were added cannot connect again until then"

BUSY = "another file is being opened, and its storage does not answer; try again"

# What its errors mean here.
MEANINGS = {
    errno.ELOOP: "there is a symbolic link in its path, and none are followed here; give the path that it leads to",
    errno.ESTALE: "another file has taken its place meanwhile; try again",
    errno.EXDEV: "it was moved out of its folder meanwhile; try again",
    errno.ENODEV: "is a block device; they are opened only below an allowed folder in /dev",
    errno.ENOTBLK: "neither a regular file nor a block device",
    errno.EADDRINUSE: "exists already; choose another path or remove it",
}


class OpenerError(RuntimeError):
    """The process that opens files cannot be started; the text is one line for the person who starts it."""


class RemoteOpener:
    """An `Opener`, for what is below the folders, and for these servers.

    A server without places is one whose images may be added, and to which this process has a connection of its own.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        user: tuple[int, int] | None = None,
        servers: Mapping[Hashable, Sequence[Place]] = MappingProxyType({}),
        *,
        compiling: bool = False,
    ) -> None:
        """Start the process; `user`: the user and the group that it becomes. Raises OpenerError.

        `compiling`: also the one that compiles policies. `wait_until_ready` has to be called before anything else.
        """
        self.folders, self._servers = tuple(folders), servers
        self._all_places = [place for places in servers.values() for place in places]
        self._but = BUT if self._all_places else ""
        # Each as it was given, and where it leads, with its number.
        self._places = [
            (Path(place), number)
            for number, path in enumerate(folders)
            for place in dict.fromkeys((os.path.abspath(path), os.path.realpath(path)))
        ]
        self._devices = [is_below_dev(path) for path in folders]
        self._lock = threading.Lock()
        self._ready = self._ended = False
        self.sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._exchange = Exchange(self.sock)
        self.compiler = _compiler() if compiling else None
        try:
            with other:
                fds = self.compiler.fds if self.compiler is not None else ()
                self._process = _start(other, self.folders, user, self._all_places, fds)
                if self.compiler is not None:
                    self.compiler.started()
        except OSError as error:
            self.close_sockets()
            raise OpenerError(f"cannot start the process that opens files: {error.strerror or error}") from None

    def wait_until_ready(self, signals: Signals = NONE) -> None:
        """Raises OpenerError, for example for a folder that does not exist, and Interrupted. May be called again."""
        if self._ready:
            return
        if not signals.wait(self.sock.fileno(), START_PATIENCE):
            raise OpenerError("the process that opens files does not start")
        try:
            _, code, folder = unpacked(self.sock.recv(ANSWER.size + 1))
        except (OSError, WrongAnswer):
            raise OpenerError(f"the process that opens files ended with status {self._process.wait()}") from None
        if code:
            raise OpenerError(self._why_not_ready(code, folder))
        self._ready = True
        if self.compiler is not None and not self.compiler.wait_until_ready(signals):
            log.warning("%s", CANNOT_COMPILE)
            self.compiler.close()
            self.compiler = None

    def _why_not_ready(self, code: int, folder: int) -> str:
        if 0 <= folder < len(self.folders):
            return _why_not_this_folder(self.folders[folder], code)
        return f"the process that opens files cannot change the user: {os.strerror(code)}"

    @property
    def pid(self) -> int:
        """The ID of the process."""
        return self._process.pid

    @property
    def hangs(self) -> bool:
        """Whether a request whose time is over has no answer yet: the next one would have to wait for that."""
        return self._exchange.unanswered is not None and not NONE.wait(self.sock.fileno(), 0)

    def allows(self, path: Path) -> bool:
        """Whether it is below one of the folders."""
        try:
            self.place(path)
        except OSError:
            return False
        return True

    def reaches(self, server: Hashable) -> bool:
        """See Opener."""
        return server in self._servers

    def places(self, server: Hashable) -> Sequence[Place]:
        """See Opener."""
        return self._servers.get(server, ())

    def connect(self, place: Place, patience: float) -> socket.socket:
        """See Opener."""
        request = Request(CONNECT, self._all_places.index(place), b"")
        sock = socket.socket(fileno=self._get(request, partial(_check_connection, place[0]), shown(place), patience))
        # Its file does not block already; Python does not look at that.
        sock.setblocking(False)
        return sock

    def open(self, path: Path, *, read_only: bool, direct: bool) -> int:
        """See Opener."""
        how = (READ_ONLY if read_only else 0) | (DIRECT if direct else 0)
        devices = self._devices[self.place(path)[0]]
        return self._ask(path, OPEN, partial(_check_image, how, devices), how=how)

    def open_again(self, fd: int, path: Path, *, direct: bool) -> int:
        """See Opener."""
        return self.open(path, read_only=False, direct=direct)

    def create(self, path: Path, size: int) -> None:
        """See Opener."""
        if size > LARGEST_SIZE:
            raise OverflowError
        self._ask(path, CREATE, None, size=size)

    def store_name(self, path: Path) -> None:
        """See Opener. The process may not read folders; ext4, XFS and Btrfs store the name when the file is synced."""

    def unlink(self, path: Path) -> None:
        """Remove one of the two files that were created last, or a socket that was made here.

        If that takes too long, it is done before the next request.
        """
        self._ask(path, UNLINK, None, patience=REMOVING_PATIENCE)

    def listen(self, path: Path, mode: int | None, group: int | None) -> socket.socket:
        """A UNIX socket that listens at this path, where nothing may be; None: what umask(2) leaves, our own group."""
        access = {"mode": UNSET if mode is None else mode, "group": UNSET if group is None else group}
        return socket.socket(fileno=self._ask(path, LISTEN, _check_listener, **access))

    def close(self) -> None:
        """End the process, and whatever waits for it. A second call does nothing."""
        self._ended = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self.close_sockets()
        # If its storage hangs, it ends later.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.wait(END_PATIENCE)

    def close_sockets(self) -> None:
        """Those of the processes."""
        self.sock.close()
        if self.compiler is not None:
            self.compiler.close()

    def report_end(self) -> None:
        """The process has ended; log it unless that is known."""
        with self._lock:
            self._give_up(KILLED)

    def _ask(self, path: Path, kind: int, check: Check | None, patience: float | None = None, **arguments: int) -> int:
        """The fd of the answer if there is a check for it, else -1. Raises OSError, OpenerEnded."""
        folder, relative = self.place(path)
        request = Request(kind, folder, relative, **arguments)
        if not is_readable_only(request):
            raise OSError(errno.EPERM, FOR_POLICIES, str(path))
        return self._get(request, check, str(path), patience)

    def _get(self, request: Request, check: Check | None, what: str, patience: float | None = None) -> int:
        """As `_ask`, for `what`."""
        patience = PATIENCE if patience is None else patience
        deadline = time.monotonic() + patience
        if not self._lock.acquire(timeout=patience):
            self._exchange.postpone(request)
            raise OpenerEnded(f"{what}: {BUSY}")
        try:
            code, fd = self._do(request, check, deadline)
        except TimeoutError:
            # Connecting waits for no storage, only for a request before it that does.
            why = BUSY if request.kind == CONNECT else "its storage does not answer; try again"
            raise OpenerEnded(f"{what}: {why}") from None
        finally:
            self._lock.release()
        if code == NO_ROOM:
            code = errno.EMFILE
        if code:
            raise OSError(code, MEANINGS.get(code, os.strerror(code)), what)
        return fd

    def place(self, path: Path) -> tuple[int, bytes]:
        """The number of its folder, and where it is below that. Raises OSError."""
        path = Path(os.path.abspath(path)) if ".." not in path.parts else path
        for place, number in self._places:
            relative = os.fsencode(path.relative_to(place)) if path.is_relative_to(place) else b"."
            if is_relative(relative):
                if len(relative) > LONGEST_PATH:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
                return number, relative
        names = ", ".join(map(str, self.folders))
        raise OSError(errno.EXDEV, f"it is not below a folder of --allow-folder ({names})", str(path))

    # With the lock.

    def _do(self, request: Request, check: Check | None, deadline: float) -> tuple[int, int]:
        """The errno and the fd of the answer, of which one is there. Raises OpenerEnded, TimeoutError."""
        if self._ended:
            raise self._has_ended()
        try:
            return self._exchange.ask(request, check, deadline)
        except TimeoutError:
            raise
        except (BrokenPipeError, ConnectionResetError):
            self._give_up(KILLED)
            raise self._has_ended() from None
        except (OSError, WrongAnswer) as error:
            self._give_up(str(error))
            raise self._has_ended() from None

    def _has_ended(self) -> OpenerEnded:
        return OpenerEnded(ENDED.format(but=self._but))

    def _give_up(self, why: str) -> None:
        if self._ended:
            return
        self._ended = True
        log.error(GIVEN_UP, why, self._but)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def find_folder_problem(folder: Path) -> str:
    """What a RemoteOpener would say of this folder; empty: nothing."""
    try:
        os.close(open_folder(os.path.abspath(folder)).fd)
    except OSError as error:
        return _why_not_this_folder(folder, error.errno or errno.EIO)
    return ""


def _why_not_this_folder(folder: Path, code: int) -> str:
    return f"{folder}: files cannot be opened below this folder (--allow-folder): {os.strerror(code)}; name another one"


def _compiler() -> RemoteCompiler | None:
    """None if this system does not have what it takes."""
    try:
        return RemoteCompiler()
    except OSError:
        log.warning("%s", CANNOT_COMPILE)
        return None


def _start(
    sock: socket.socket,
    folders: Sequence[Path],
    user: tuple[int, int] | None,
    places: Sequence[Place] = (),
    compiling: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    package = Path(__file__).resolve().parents[2]
    ids = map(str, user) if user is not None else (ABSENT, ABSENT)
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        CODE,
        str(package),
        str(os.getpid()),
        *ids,
        ",".join(map(str, compiling)) or ABSENT,
        *map(as_text, places),
        ABSENT,
        *map(os.path.abspath, folders),
    ]
    # Signals are for us, also those that a terminal or `systemctl kill` sends to both. It ends with us, after the
    # sockets have been removed.
    environment = {name: value for name, value in os.environ.items() if name in PASSED or name.startswith("NUMBA_")}
    with held_back(signal.valid_signals()):
        return subprocess.Popen(
            command,
            env=environment | ONE_THREAD,
            cwd="/",
            stdin=sock.fileno(),
            stdout=subprocess.DEVNULL,
            process_group=0,
            pass_fds=compiling,
        )


def _check_image(how: int, devices: bool, fd: int) -> None:
    """It is a regular file, or a block device if these are allowed, and is open as was asked for."""
    mode, flags = os.fstat(fd).st_mode, fcntl.fcntl(fd, fcntl.F_GETFL)
    if not stat.S_ISREG(mode) and not (devices and stat.S_ISBLK(mode)):
        raise WrongAnswer("it sent what is not an image")
    wanted = (os.O_RDONLY if how & READ_ONLY else os.O_RDWR) | (os.O_DIRECT if how & DIRECT else 0)
    if flags & (os.O_ACCMODE | os.O_DIRECT | os.O_APPEND | os.O_PATH) != wanted:
        raise WrongAnswer("it sent an image that is opened in another way")


def _check_listener(fd: int) -> None:
    """It is a UNIX stream socket that listens."""
    _check_socket(fd, socket.AF_UNIX, listens=True)


def _check_connection(family: int, fd: int) -> None:
    """It is a stream socket of this family that does not listen and does not block."""
    _check_socket(fd, family, listens=False)
    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK:
        raise WrongAnswer("it sent a socket that blocks")


def _check_socket(fd: int, family: int, *, listens: bool) -> None:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise WrongAnswer("it sent what is not a socket")
    sock = socket.socket(fileno=fd)
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if (sock.family, sock.type, found) != (family, socket.SOCK_STREAM, listens):
            raise WrongAnswer("it sent another socket")
    finally:
        sock.detach()
