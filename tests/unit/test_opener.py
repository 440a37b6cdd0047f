"""What opens files: this process, and the one beside it. What that one sends is checked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringplane.block.image import open_or_create
from ringplane.opener import remote_opener
from ringplane.opener.open_requests import ANSWER, OPEN, parsed
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.opener.remote_opener import MEANINGS, OpenerError, RemoteOpener
from ringplane.opener.server_places import Place, as_text, from_text, shown
from ringplane.options.image_options import ImageOptions
from ringplane.system import landlock, seccomp

from .waiting import PATIENCE, wait_until

PACKAGE = Path(remote_opener.__file__).parents[2]
SIZE = 1 << 20

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that all users can enter, on a file system with O_DIRECT."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        (Path(name) / "image").write_bytes(bytes(SIZE))
        yield Path(name)


@contextlib.contextmanager
def started(*folders: Path, user: tuple[int, int] | None = None) -> Iterator[RemoteOpener]:
    with contextlib.closing(RemoteOpener(folders, user)) as opener:
        opener.wait_until_ready()
        yield opener


@pytest.fixture
def remote(folder: Path) -> Iterator[RemoteOpener]:
    with started(folder) as opener:
        yield opener


@pytest.fixture(params=["local", "remote"])
def opener(request: pytest.FixtureRequest, folder: Path) -> Iterator[Opener]:
    if request.param == "local":
        yield LOCAL
    else:
        with started(folder) as opener:
            yield opener


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What both do


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_an_image_is_opened(opener: Opener, folder: Path, read_only: bool, direct: bool) -> None:
    fd = opener.open(folder / "image", read_only=read_only, direct=direct)
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == (os.O_RDONLY if read_only else os.O_RDWR)
        assert bool(flags & os.O_DIRECT) == direct
        assert not os.get_inheritable(fd)
        assert os.path.samestat(os.fstat(fd), (folder / "image").stat())
        # Rights to a file stay with it: the process that opened it has given up some.
        if not read_only:
            os.ftruncate(fd, 2 * SIZE)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        again = opener.open_again(fd, folder / "image", direct=direct)
        assert os.path.sameopenfile(again, fd)
        os.close(again)
    finally:
        os.close(fd)


def test_an_image_is_created_and_removed(opener: Opener, folder: Path) -> None:
    new = folder / "new"
    opener.create(new, 1 << 40)
    status = new.stat()
    assert (status.st_size, status.st_blocks, stat.S_IMODE(status.st_mode)) == (1 << 40, 0, 0o600)
    with pytest.raises(FileExistsError):
        opener.create(new, SIZE)
    opener.unlink(new)
    (folder / "dangling").symlink_to("none")
    with pytest.raises(FileExistsError):
        opener.create(folder / "dangling", SIZE)
    assert content(folder) == ["dangling", "image"]


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 63])
def test_nothing_is_left_of_an_image_that_cannot_be_so_long(opener: Opener, folder: Path, size: int) -> None:
    with pytest.raises((OSError, OverflowError)):
        opener.create(folder / "new", size)
    assert content(folder) == ["image"]


def test_errors_are_those_of_open(opener: Opener, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        opener.open(folder / "none", read_only=True, direct=False)
    with pytest.raises(FileNotFoundError):
        opener.create(folder / "none" / "new", SIZE)
    with pytest.raises(NotADirectoryError):
        opener.create(folder / "image" / "new", SIZE)


# Paths


def test_a_folder_is_known_by_its_path_and_by_where_it_leads(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "sub" / "a").write_bytes(bytes(SIZE))
    (folder / "link").symlink_to("images")
    with started(folder / "link") as opener:
        for path in ("link/sub/a", "images/sub/a"):
            os.close(opener.open(folder / path, read_only=True, direct=False))
        for path in ("image", "images", "link", "link/../image", "link/sub/../sub/a", "images2/a"):
            with pytest.raises(OSError, match="not below a folder of --allow-folder") as caught:
                opener.open(folder / path, read_only=True, direct=False)
            assert caught.value.errno == errno.EXDEV


def test_several_folders_and_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("one", "two"):
        (folder / name).mkdir()
    with started(Path("one"), Path("two")) as opener:
        opener.create(folder / "one" / "a", SIZE)
        opener.create(Path("two/b"), 2 * SIZE)
        assert (Path("one/a").stat().st_size, Path("two/b").stat().st_size) == (SIZE, 2 * SIZE)


def test_only_what_was_made_is_removed(remote: RemoteOpener, folder: Path) -> None:
    def refuse(path: Path, code: int) -> None:
        with pytest.raises(OSError, match=re.escape(MEANINGS.get(code, os.strerror(code)))):
            remote.unlink(path)

    refuse(folder / "image", errno.EPERM)
    for name in ("first", "second", "third"):
        remote.create(folder / name, SIZE)
    refuse(folder / "first", errno.EPERM)
    (folder / "second").rename(folder / "moved")
    refuse(folder / "second", errno.ENOENT)
    (folder / "image").replace(folder / "third")
    refuse(folder / "third", errno.ESTALE)
    refuse(folder / "third", errno.EPERM)
    assert content(folder) == ["first", "moved", "third"]


def test_what_was_made_where_something_else_was_made_before_is_removed(remote: RemoteOpener, folder: Path) -> None:
    path = folder / "new"
    for _ in range(2):
        remote.listen(path, 0o600, None).close()
        path.unlink()
        remote.create(path, SIZE)
        path.unlink()
    remote.create(path, SIZE)
    remote.unlink(path)
    assert content(folder) == ["image"]


# Sockets


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777, 0o000])
def test_a_socket_has_its_mode_and_listens(remote: RemoteOpener, folder: Path, mode: int) -> None:
    path = folder / "socket"
    with remote.listen(path, mode, None) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == mode
        connect(path)
        sock.accept()[0].close()
    remote.unlink(path)
    assert content(folder) == ["image"]


def test_a_socket_has_the_mode_that_umask_leaves(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with started(folder) as opener, opener.listen(folder / "socket", None, None):
            assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o750
            # A mode of its own changes nothing for the next one.
            opener.listen(folder / "other", 0o666, None).close()
            opener.listen(folder / "third", None, None).close()
            assert stat.S_IMODE((folder / "third").stat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_a_socket_for_the_own_group_or_one_that_is_none(remote: RemoteOpener, folder: Path) -> None:
    with remote.listen(folder / "socket", 0o660, os.getgid()):
        assert (folder / "socket").stat().st_gid == os.getgid()
    with pytest.raises(PermissionError) as caught:
        remote.listen(folder / "other", 0o660, 12345)
    assert caught.value.errno == errno.EPERM
    assert content(folder) == ["image", "socket"]


def test_nothing_is_replaced_by_a_socket(remote: RemoteOpener, folder: Path) -> None:
    (folder / "dangling").symlink_to("none")
    remote.listen(folder / "socket", 0o600, None).close()
    for name in ("image", "dangling", "socket"):
        with pytest.raises(OSError, match="exists already"):
            remote.listen(folder / name, 0o600, None)
    assert content(folder) == ["dangling", "image", "socket"]
    # The one that it made can still be removed.
    remote.unlink(folder / "socket")


def test_long_paths_of_sockets(remote: RemoteOpener, folder: Path) -> None:
    """Only the name of the file is limited, because the process is in its folder when it makes it."""
    deep = folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with remote.listen(deep / ("s" * 107), 0o600, None):
        remote.unlink(deep / ("s" * 107))
    with pytest.raises(OSError, match="too long"):
        remote.listen(deep / ("s" * 108), 0o600, None)
    assert content(deep) == []


# Its start and its end


def test_folders_that_cannot_be_used(folder: Path) -> None:
    for name, words in (("none", "No such file or directory"), ("image", "Not a directory")):
        sentence = rf"{name}: files cannot be opened below this folder .*{words}"
        with pytest.raises(OpenerError, match=sentence), started(folder, folder / name):
            pass
        assert words in remote_opener.find_folder_problem(folder / name)
    assert remote_opener.find_folder_problem(folder) == ""


def test_a_process_that_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_opener, "CODE", "raise SystemExit(7)")
    with pytest.raises(OpenerError, match="ended with status 7"), started(folder):
        pass
    monkeypatch.setattr(sys, "executable", str(folder / "none"))
    with pytest.raises(OpenerError, match="cannot start the process that opens files: No such file"):
        RemoteOpener([folder])


def test_it_ends_when_it_is_closed(folder: Path) -> None:
    with started(folder) as opener:
        process = opener._process
    assert process.returncode == 0
    opener.close()
    with pytest.raises(OpenerEnded):
        opener.open(folder / "image", read_only=True, direct=False)


PARENT = """
import os, socket, sys
from pathlib import Path
from ringplane.opener.remote_opener import RemoteOpener
opener = RemoteOpener([Path(sys.argv[1])])
opener.wait_until_ready()
with socket.socket(fileno=0) as sock:
    socket.send_fds(sock, [str(opener.pid).encode()], [opener.sock.fileno()])
    sock.recv(1)
"""


@pytest.mark.parametrize("keep", [False, True], ids=["socket closed", "socket given away"])
def test_it_ends_with_its_parent(folder: Path, keep: bool) -> None:
    """Also if another process has the parent's end of the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen([sys.executable, "-c", PARENT, folder], stdin=theirs.fileno())
        data, fds, _, _ = socket.recv_fds(ours, 100, 1)
        if not keep:
            os.close(fds.pop())
        child = os.pidfd_open(int(data))
        try:
            process.kill()
            process.wait()
            poll = select.poll()
            poll.register(child, select.POLLIN)
            assert poll.poll(PATIENCE * 1000)
        finally:
            for fd in (child, *fds):
                os.close(fd)


def test_signals_are_for_the_parent(remote: RemoteOpener, folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(remote.pid, number)
    os.close(remote.open(folder / "image", read_only=True, direct=False))


# What it has given up; hostile/test_opening_process.py tries it


def test_its_rights(remote: RemoteOpener) -> None:
    proc = Path(f"/proc/{remote.pid}")
    lines = (line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    status: dict[str, str] = {name: value for name, value in lines}  # noqa: C416
    assert (status["NoNewPrivs"], status["Threads"]) == ("1", "1")
    assert status["Seccomp"] == ("2" if seccomp.available() else "0")
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert not [line for line in (proc / "maps").read_text().splitlines() if "wx" in line.split()[1]]
    links = [os.readlink(each) for each in (proc / "fd").iterdir()]
    # A newer libffi opens itself when it is imported.
    others = [link for link in links if not link.startswith("/var/tmp") and "/libffi.so" not in link]
    assert sorted(link.partition(":")[0] for link in others) == [
        *(["/dev/null"] * 2), "anon_inode", "socket",
    ]  # fmt: skip
    assert (proc / "environ").read_bytes().count(b"\0") <= 1


@needs_root
def test_it_becomes_the_user(folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    (folder / "of root").touch(0o600)
    (folder / "of nobody").touch(0o600)
    os.chown(folder / "of nobody", nobody.pw_uid, -1)
    with started(folder, user=(nobody.pw_uid, nobody.pw_gid)) as opener:
        os.close(opener.open(folder / "of nobody", read_only=False, direct=False))
        for refused in (
            lambda: opener.open(folder / "of root", read_only=True, direct=False),
            lambda: opener.create(folder / "new", SIZE),
            lambda: opener.listen(folder / "socket", 0o600, None),
        ):
            with pytest.raises(PermissionError):
                refused()


IMPORTS = """
import sys
sys.path.append(sys.argv[1])
import ringplane.opener.opening_process
print(*sys.modules)
"""


def test_it_imports_little() -> None:
    """Each of these takes a megabyte or more."""
    command = [sys.executable, "-I", "-S", "-c", IMPORTS, str(PACKAGE)]
    names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout.split()
    assert not {"typing", "pathlib", "logging", "dataclasses", "asyncio", "subprocess", "numpy", "numba"} & set(names)
    assert {name for name in names if name.startswith("ringplane.")} == {
        "ringplane.opener",
        *(
            f"ringplane.opener.{name}"
            for name in ("opening_process", "allowed_folders", "open_requests", "server_places")
        ),
        "ringplane.opener.opening_sandbox",
        "ringplane.system",
        *(f"ringplane.system.{name}" for name in ("landlock", "libc", "seccomp", "syscall_numbers")),
    }


# Servers

LOCALHOST = "127.0.0.1"


@contextlib.contextmanager
def listening(family: int, address: Any, queue: int = 1) -> Iterator[socket.socket]:
    with socket.socket(family) as sock:
        sock.bind(address)
        sock.listen(queue)
        sock.settimeout(PATIENCE)
        yield sock


@pytest.mark.parametrize("kind", ["UNIX", "TCP", "TCP over IPv6"])
def test_it_connects_to_servers(folder: Path, kind: str) -> None:
    family, address = {
        "UNIX": (socket.AF_UNIX, str(folder / "a server")),
        "TCP": (socket.AF_INET, (LOCALHOST, 0)),
        "TCP over IPv6": (socket.AF_INET6, ("::1", 0)),
    }[kind]
    with listening(family, address) as server:
        places = [(family, server.getsockname()), (socket.AF_UNIX, str(folder / "none"))]
        with contextlib.closing(RemoteOpener([folder], None, {"server": places, "another": ()})) as opener:
            opener.wait_until_ready()
            assert opener.places("server") == places
            assert opener.places("another") == opener.places("unknown") == ()
            assert [opener.reaches(name) for name in ("server", "another", "unknown")] == [True, True, False]
            with opener.connect(places[0], PATIENCE) as ours, server.accept()[0] as theirs:
                assert not ours.getblocking()
                assert not os.get_inheritable(ours.fileno())
                theirs.send(b"hello")
                assert select.select([ours], [], [], PATIENCE)[0]
                assert ours.recv(10) == b"hello"
            with pytest.raises(FileNotFoundError):
                opener.connect(places[1], PATIENCE)
            # It still does what it did.
            os.close(opener.open(folder / "image", read_only=True, direct=False))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ((socket.AF_UNIX, "/run/a server"), "/run/a server"),
        ((socket.AF_INET, ("10.0.0.1", 10809)), "10.0.0.1:10809"),
        ((socket.AF_INET6, ("fd00::1", 10809, 0, 0)), "[fd00::1]:10809"),
    ],
)
def test_a_server_in_messages(place: Place, text: str) -> None:
    assert shown(place) == text
    assert from_text(as_text(place)) == place


def connect_often(opener: Opener, place: Place, connected: contextlib.ExitStack) -> None:
    for _ in range(100):
        connected.enter_context(opener.connect(place, PATIENCE))


def test_a_server_whose_queue_is_full(folder: Path) -> None:
    """Neither process waits for it."""
    place = (socket.AF_UNIX, str(folder / "server"))
    with listening(*place, queue=0), contextlib.closing(RemoteOpener([folder], None, {"server": [place]})) as opener:
        opener.wait_until_ready()
        with contextlib.ExitStack() as waiting, pytest.raises(BlockingIOError):
            connect_often(opener, place, waiting)


@contextlib.contextmanager
def connecting(folder: Path) -> Iterator[tuple[RemoteOpener, Place]]:
    """It may connect to this server."""
    place = (socket.AF_UNIX, str(folder / "server"))
    with listening(*place, queue=8), contextlib.closing(RemoteOpener([folder], None, {"server": [place]})) as opener:
        opener.wait_until_ready()
        yield opener, place


def test_connecting_while_storage_hangs(folder: Path) -> None:
    """It takes no longer than it may, and works when the storage answers."""
    words = "/server: another file is being opened, and its storage does not answer"
    with connecting(folder) as (opener, place):
        with opener._lock, pytest.raises(OpenerEnded, match=words):
            opener.connect(place, 0.01)
        os.kill(opener.pid, signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(OpenerEnded, match=words):
                opener.connect(place, 0.01)
        os.kill(opener.pid, signal.SIGCONT)
        before = number_of_fds()
        opener.connect(place, PATIENCE).close()
        assert number_of_fds() == before


def test_connecting_after_its_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not all disks continue then whatever happens."""
    words = "NBD disks that were added cannot connect again until then"
    with connecting(folder) as (opener, place):
        os.kill(opener.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(OpenerEnded, match=rf"\(those that are served continue, but {words}\)$"):
                opener.connect(place, PATIENCE)
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        f"no disk can be added until a restart, all continue, but {words}"
    ]


# What it sends is checked


class Impostor:
    """The other end of a RemoteOpener, in the place of the process."""

    pid = -1

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def wait(self, _: float | None = None) -> int:
        return 0

    def answer(self, *fds: int, number: int = 1, code: int = 0) -> None:
        self.send(ANSWER.pack(number, code, -1), *fds)

    def send(self, message: bytes, *fds: int) -> None:
        socket.send_fds(self.sock, [message], fds)


@pytest.fixture
def impostor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RemoteOpener, Impostor]]:
    made: list[Impostor] = []

    def start(sock: socket.socket, *_: object) -> Impostor:
        made.append(Impostor(sock.dup()))
        return made[0]

    monkeypatch.setattr(remote_opener, "_start", start)
    with contextlib.closing(RemoteOpener([folder])) as opener, made[0].sock:
        yield opener, made[0]


def opened(*flags: int, path: str = "image") -> Callable[[Path], int]:
    return lambda folder: os.open(folder / path, sum(flags))


def a_socket(
    kind: int = socket.SOCK_STREAM, family: int = socket.AF_UNIX, listens: bool = True
) -> Callable[[Path], int]:
    def make(folder: Path) -> int:
        sock = socket.socket(family, kind)
        sock.bind(str(folder / "made") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        if listens:
            sock.listen()
        return sock.detach()

    return make


def a_pipe(_: Path) -> int:
    reads, writes = os.pipe()
    os.close(writes)
    return reads


def open_it(opener: RemoteOpener, folder: Path) -> object:
    return opener.open(folder / "image", read_only=False, direct=False)


def listen_there(opener: RemoteOpener, folder: Path) -> object:
    return opener.listen(folder / "socket", 0o600, None)


def number_of_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("ask", "make"),
    [
        (open_it, opened(os.O_RDONLY, path=".")),
        (open_it, lambda _: os.open("/dev/null", os.O_RDWR)),
        (open_it, a_pipe),
        (open_it, a_socket()),
        (open_it, lambda _: os.eventfd(0)),
        (open_it, opened(os.O_PATH)),
        (open_it, opened(os.O_RDONLY)),
        (open_it, opened(os.O_WRONLY)),
        (open_it, opened(os.O_RDWR, os.O_APPEND)),
        (open_it, opened(os.O_RDWR, os.O_DIRECT)),
        (listen_there, opened(os.O_RDWR)),
        (listen_there, a_pipe),
        (listen_there, a_socket(listens=False)),
        (listen_there, a_socket(socket.SOCK_DGRAM, listens=False)),
        (listen_there, a_socket(socket.SOCK_SEQPACKET)),
        (listen_there, a_socket(family=socket.AF_INET)),
    ],
)
def test_an_fd_that_is_not_what_was_asked_for(
    impostor: tuple[RemoteOpener, Impostor],
    folder: Path,
    ask: Callable[[RemoteOpener, Path], object],
    make: Callable[[Path], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    opener, other = impostor
    fd = make(folder)
    before = number_of_fds()
    other.answer(fd)
    expect_the_end(opener, folder, ask, caplog)
    assert number_of_fds() == before
    os.close(fd)


def expect_the_end(opener: RemoteOpener, folder: Path, ask: Callable[..., Any], caplog: Any) -> None:
    """It is not used any more, and one line says so."""
    for _ in range(2):
        with pytest.raises(OpenerEnded, match="has ended; restart ringplane to add disks"):
            ask(opener, folder)
    opener.report_end()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("the process that opens files has ended: it sent")


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (ANSWER.pack(1, 0, -1), 0),
        (ANSWER.pack(1, 0, -1), 2),
        (ANSWER.pack(1, 0, -1), 8),
        (ANSWER.pack(1, errno.ENOENT, -1), 1),
        (ANSWER.pack(1, 99999, -1), 0),
        (ANSWER.pack(1, -1, -1), 0),
        (ANSWER.pack(1, 0, -1)[:-1], 1),
        (ANSWER.pack(1, 0, -1) + b"x", 1),
        (b"x" * 65536, 0),
    ],
)
def test_answers_that_are_none(
    impostor: tuple[RemoteOpener, Impostor], folder: Path, message: bytes, fds: int, caplog: pytest.LogCaptureFixture
) -> None:
    opener, other = impostor
    with (folder / "image").open("r+b") as file:
        before = number_of_fds()
        other.send(message, *[file.fileno()] * fds)
        expect_the_end(opener, folder, open_it, caplog)
        assert number_of_fds() == before


def test_an_answer_to_what_was_not_asked(impostor: tuple[RemoteOpener, Impostor], folder: Path) -> None:
    opener, other = impostor
    with (folder / "image").open("r+b") as file:
        before = number_of_fds()
        other.answer(file.fileno(), number=2)
        with pytest.raises(OpenerEnded):
            open_it(opener, folder)
        assert number_of_fds() == before


def test_more_fds_than_there_is_room_for(impostor: tuple[RemoteOpener, Impostor], folder: Path) -> None:
    opener, other = impostor
    with (folder / "image").open("r+b") as file:
        before = number_of_fds()
        other.answer(*[file.fileno()] * 100)
        with pytest.raises(OpenerEnded):
            open_it(opener, folder)
        assert number_of_fds() == before


def test_no_fd_where_none_is_asked_for(impostor: tuple[RemoteOpener, Impostor], folder: Path) -> None:
    opener, other = impostor
    with (folder / "image").open("r+b") as file:
        before = number_of_fds()
        other.answer(file.fileno())
        with pytest.raises(OpenerEnded):
            opener.create(folder / "new", SIZE)
        assert number_of_fds() == before


def test_a_user_that_it_cannot_become(impostor: tuple[RemoteOpener, Impostor]) -> None:
    opener, other = impostor
    other.answer(number=0, code=errno.EPERM)
    with pytest.raises(OpenerError, match="cannot change the user: Operation not permitted"):
        opener.wait_until_ready()


def test_a_late_answer_is_not_that_to_the_next_request(
    impostor: tuple[RemoteOpener, Impostor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, other = impostor
    (folder / "other").write_bytes(bytes(SIZE))
    with (folder / "other").open("r+b") as late, (folder / "image").open("r+b") as right:
        monkeypatch.setattr(remote_opener, "PATIENCE", 0.01)
        with pytest.raises(OpenerEnded, match="its storage does not answer"):
            open_it(opener, folder)
        monkeypatch.setattr(remote_opener, "PATIENCE", PATIENCE)
        before = number_of_fds()
        other.answer(late.fileno(), number=1)
        other.answer(right.fileno(), number=2)
        fd = opener.open(folder / "image", read_only=False, direct=False)
        assert os.path.sameopenfile(fd, right.fileno())
        os.close(fd)
        assert number_of_fds() == before


class NotedLock:
    """It is free, and notes when it was taken."""

    def acquire(self, timeout: float) -> bool:
        self.taken = time.monotonic()
        return True

    def release(self) -> None:
        pass


def test_the_time_for_an_answer_begins_before_those_of_others(
    impostor: tuple[RemoteOpener, Impostor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, _ = impostor
    deadlines: list[float] = []

    def ask(request: object, check: object, deadline: float) -> tuple[int, int]:
        deadlines.append(deadline)
        return errno.ENOENT, -1

    lock = NotedLock()
    with monkeypatch.context() as patched:
        patched.setattr(opener, "_lock", lock)
        patched.setattr(opener._exchange, "ask", ask)
        with pytest.raises(FileNotFoundError):
            open_it(opener, folder)
    assert deadlines[0] <= lock.taken + remote_opener.PATIENCE


def test_it_is_closed_while_it_hangs(
    remote: RemoteOpener, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it any longer, and it ends when it can."""
    monkeypatch.setattr(remote_opener, "PATIENCE", PATIENCE)
    monkeypatch.setattr(remote_opener, "END_PATIENCE", 0.01)
    os.kill(remote.pid, signal.SIGSTOP)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            remote.create(folder / "new", SIZE)
        except OpenerEnded as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: remote._exchange.unanswered is not None)
    remote.close()
    thread.join(PATIENCE)
    assert len(errors) == 1
    os.kill(remote.pid, signal.SIGCONT)
    wait_until(lambda: remote._process.poll() == 0)
    assert caplog.records == []


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """This process cannot open one more file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_room_for_one_more_file(remote: RemoteOpener, folder: Path) -> None:
    """That is not the fault of the process, which is used again, and nothing is left of what was made."""
    for _ in range(3):
        with no_room(), pytest.raises(OSError, match="Too many open files"):
            remote.open(folder / "image", read_only=True, direct=False)
        with no_room(), pytest.raises(OSError, match="Too many open files"):
            remote.listen(folder / "socket", 0o600, None)
        assert content(folder) == ["image"]
    os.close(remote.open(folder / "image", read_only=True, direct=False))
    remote.listen(folder / "socket", 0o600, None).close()


def test_what_was_done_too_late_is_undone(remote: RemoteOpener, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in (
        lambda: remote.create(folder / "new", SIZE),
        lambda: remote.listen(folder / "socket", 0o600, None).close(),
    ):
        os.kill(remote.pid, signal.SIGSTOP)
        monkeypatch.setattr(remote_opener, "PATIENCE", 0.01)
        for _ in range(3):
            with pytest.raises(OpenerEnded, match="its storage does not answer; try again"):
                ask()
        os.kill(remote.pid, signal.SIGCONT)
        monkeypatch.setattr(remote_opener, "PATIENCE", PATIENCE)
        ask()
    remote.unlink(folder / "new")
    remote.unlink(folder / "socket")
    assert content(folder) == ["image"]


def hang(remote: RemoteOpener, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on its storage does not answer, until `answer`."""
    os.kill(remote.pid, signal.SIGSTOP)
    monkeypatch.setattr(remote_opener, "PATIENCE", 0.01)
    monkeypatch.setattr(remote_opener, "REMOVING_PATIENCE", 0.01)


def answer(remote: RemoteOpener, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(remote.pid, signal.SIGCONT)
    monkeypatch.setattr(remote_opener, "PATIENCE", PATIENCE)
    monkeypatch.setattr(remote_opener, "REMOVING_PATIENCE", PATIENCE)


@pytest.mark.parametrize("waiting", [False, True], ids=["first", "behind another request"])
def test_what_could_not_be_removed_in_time_is_removed_later(
    remote: RemoteOpener, folder: Path, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    paths = [folder / "new", folder / "socket"]
    remote.create(paths[0], SIZE)
    remote.listen(paths[1], 0o600, None).close()
    hang(remote, monkeypatch)
    if waiting:
        with pytest.raises(OpenerEnded):
            remote.open(folder / "image", read_only=True, direct=False)
    for path in paths:
        with pytest.raises(OpenerEnded):
            remote.unlink(path)
    answer(remote, monkeypatch)
    before = number_of_fds()
    os.close(remote.open(folder / "image", read_only=True, direct=False))
    assert content(folder) == ["image"]
    assert number_of_fds() == before


def test_an_image_that_was_created_too_late_is_created_again(
    remote: RemoteOpener, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ImageOptions(create=SIZE)
    hang(remote, monkeypatch)
    with pytest.raises(OpenerEnded):
        open_or_create(folder / "new", options, opener=remote)
    answer(remote, monkeypatch)
    wait_until(lambda: (folder / "new").exists())
    with contextlib.closing(open_or_create(folder / "new", options, opener=remote)) as image:
        assert image.created
        image.unlink()
    assert content(folder) == ["image"]


def test_the_end_during_a_request(remote: RemoteOpener, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process is stopped, so that the request is waiting when it is killed."""
    os.kill(remote.pid, signal.SIGSTOP)
    with (
        subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(0.2); os.kill({remote.pid}, {signal.SIGKILL:d})"]
        ),
        pytest.raises(OpenerEnded),
    ):
        remote.open(folder / "image", read_only=True, direct=False)
    remote.report_end()
    assert [record.getMessage() for record in caplog.records] == [
        "the process that opens files has ended: it was killed, or has failed; no disk can be added until a restart, "
        "all continue"
    ]


# Messages


def test_requests_arrive_as_they_were_sent() -> None:
    sent = remote_opener.Request(OPEN, 1, b"a/b", how=3)
    number, request = parsed(sent.packed(7), 2)
    fields = [
        (each.kind, each.folder, each.path, each.how, each.size, each.mode, each.group) for each in (sent, request)
    ]
    assert (number, fields[0]) == (7, fields[1])


def test_landlock_rights_of_older_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that the kernel knows are named in a rule."""
    rules: list[tuple[int, int]] = []

    def note(number: int, *arguments: object) -> int:
        if number == landlock.NUMBERS["landlock_create_ruleset"]:
            return 1 if arguments[0] == 0 else os.open("/dev/null", os.O_RDONLY)
        if number == landlock.NUMBERS["landlock_add_rule"]:
            rules.append(landlock.PATH_BENEATH_ATTR.unpack(arguments[2]))  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(landlock, "system_call", note)
    landlock.keep_only({5: (1 << 16) - 1})
    assert rules == [((1 << 13) - 1, 5)]


def test_a_listener_says_that_its_opener_has_ended(remote: RemoteOpener, folder: Path, caplog: Any) -> None:
    from ringplane.control.listener import Listener, ListenError

    listener = Listener.remote(remote, folder / "socket", 0o600, None)
    with pytest.raises(ListenError, match="exists already"):
        Listener.remote(remote, folder / "socket", 0o600, None)
    with pytest.raises(ListenError, match="this user is not a member"):
        Listener.remote(remote, folder / "other", None, 12345)
    with pytest.raises(ListenError, match=r"the folder .* does not exist"):
        Listener.remote(remote, folder / "none" / "socket", None, None)
    os.kill(remote.pid, signal.SIGKILL)
    wait_until(lambda: remote._process.poll() is not None)
    listener.close()
    assert "cannot remove the socket's file: the process that opens files has ended" in caplog.text
