"""The process that opens files for another one, which has given up the right to do so (remote_opener.py starts it).

Its standard input is the socket between both. It ends when the other process has ended or closed its socket, and after
a message that our end never sends: then the other process has been taken over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct

from ringplane.opener.allowed_folders import AllowedFolders, Folder, open_folder
from ringplane.opener.open_requests import ABSENT, ANSWER, CONNECT, LONGEST_REQUEST, READY, Request, parsed
from ringplane.opener.opening_sandbox import change_user, confine
from ringplane.opener.server_places import Place, connect, from_text

NO_FOLDER = -1

FD = struct.Struct("i")

STDOUT, STDERR = 1, 2


def main(arguments: list[str]) -> None:
    """The arguments: the process ID of the other process, a user and a group or `-` for both, two fds for the process
    that compiles policies or `-`, places, `-`, folders.
    """
    # Everything that is used later has to be imported and open by now.
    with socket.socket(fileno=0) as sock:
        pid, user, group, compiling, *rest = arguments
        end = rest.index(ABSENT)
        places = list(map(from_text, rest[:end]))
        folders = _prepare(sock, user, group, rest[end + 1 :])
        parent = _watched(int(pid))
        if folders and os.getppid() == int(pid):
            # /dev/null: nothing of what follows is for users.
            os.dup2(STDOUT, STDERR)
            if compiling != ABSENT:
                _begin_compiling(compiling, parent, rest[end + 1 :], folders)
            confine(folders, places)
            _answer(sock, READY, 0)
            _serve(sock, parent, AllowedFolders(folders), len(folders), places)
    # Nothing is left to do, and the interpreter's own end would need more system calls.
    os._exit(0)


def _begin_compiling(fds: str, parent: int, paths: list[str], folders: list[Folder]) -> None:
    # Few processes need it.
    from ringplane.opener.compiling_process import begin

    sock, code = map(int, fds.split(","))
    begin(sock, code, [fd for fd in (parent, _watched(os.getpid())) if fd >= 0], paths, folders)


def _watched(pid: int) -> int:
    """An fd that can be read when this process has ended; -1 if there are none (pidfd_open(2)).

    The end of the socket says the same, unless the other process gives it away.
    """
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return -1


def _prepare(sock: socket.socket, uid: str, gid: str, paths: list[str]) -> list[Folder]:
    """The open folders, as the user; none if that is impossible, which the other process has been sent."""
    folders = []
    for number, path in enumerate(paths):
        try:
            folders.append(open_folder(path))
        except OSError as error:
            _answer(sock, READY, error.errno or errno.EIO, number)
            return []
    try:
        if uid != ABSENT:
            change_user(int(uid), int(gid))
    except OSError as error:
        _answer(sock, READY, error.errno or errno.EIO)
        return []
    return folders


def _serve(sock: socket.socket, parent: int, folders: AllowedFolders, count: int, places: list[Place]) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if parent >= 0:
        poll.register(parent, select.POLLIN)
    while parent not in (fd for fd, _ in poll.poll()):
        # Fds that came with it are closed by the kernel, because there is no room for them.
        message = sock.recv(LONGEST_REQUEST + 1)
        try:
            number, request = parsed(message, count, len(places))
        except ValueError:
            return
        try:
            fd, code = _done(request, folders, places), 0
        except OSError as error:
            fd, code = None, error.errno or errno.EIO
        if not _answer(sock, number, code, fd=fd):
            return


def _done(request: Request, folders: AllowedFolders, places: list[Place]) -> int | None:
    """See AllowedFolders.do. Raises OSError."""
    return connect(places[request.folder]).detach() if request.kind == CONNECT else folders.do(request)


def _answer(sock: socket.socket, number: int, code: int, folder: int = NO_FOLDER, fd: int | None = None) -> bool:
    """Send an answer, and close its fd. Whether it was sent: our end reads them all."""
    fds = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, FD.pack(fd))]
    try:
        # Not blocking, so that this process ends in any case when the other one does.
        sock.sendmsg([ANSWER.pack(number, code, folder)], fds, socket.MSG_DONTWAIT)
        return True
    except OSError:
        return False
    finally:
        if fd is not None:
            os.close(fd)
