"""The process that opens files, asked by one that a guest controls: it opens nothing outside its folders."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from program.served import needs_all
from ringplane.opener import remote_opener
from ringplane.opener.allowed_folders import MOST_SOCKETS
from ringplane.opener.open_requests import (
    ANSWER,
    CONNECT,
    CREATE,
    DIRECT,
    LISTEN,
    LONGEST_PATH,
    OPEN,
    READ_ONLY,
    REQUEST,
    UNLINK,
    Request,
)
from ringplane.opener.server_places import Place
from ringplane.system import landlock
from unit.rig import PATIENCE, eventually, loop_device
from unit.waiting import repeating

SIZE = 1 << 20
SECRET, PUBLIC = b"secret", b"public"

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make devices")

# <linux/fs.h>
RENAME_EXCHANGE, AT_FDCWD = 2, -100


class Opening:
    """The process, and its other end, from which anything can be sent."""

    def __init__(self, *folders: Path, places: Sequence[Place] = ()) -> None:
        self.sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        with other:
            self.process = remote_opener._start(other, folders, None, places)
        assert ANSWER.unpack(self.sock.recv(100)) == (0, 0, -1)
        self._number = 0

    def ask(self, kind: int, path: bytes | str, **arguments: int) -> int:
        """The fd, 0 if there is none to be had, or minus the errno of the answer."""
        self._number += 1
        self.sock.send(Request(kind, 0, os.fsencode(path), **arguments).packed(self._number))
        return self.answer(self._number)

    def answer(self, expected: int) -> int:
        message, fds, _, _ = socket.recv_fds(self.sock, 100, 10)
        number, code, _ = ANSWER.unpack(message)
        assert number == expected
        assert len(fds) == (1 if fds else 0)
        assert not (fds and code)
        return fds[0] if fds else -code

    def open(self, path: bytes | str, how: int = READ_ONLY) -> int:
        return self.ask(OPEN, path, how=how)

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def expect_the_end(self) -> None:
        """It ends by itself, and hands over nothing before that."""
        with contextlib.suppress(ConnectionResetError):
            message, fds, _, _ = socket.recv_fds(self.sock, 100, 10)
            assert (message, list(fds)) == (b"", [])
        assert self.process.wait(PATIENCE) == 0

    def close(self) -> None:
        self.sock.close()
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture
def top() -> Iterator[Path]:
    """A folder with `allowed` and `outside`, each with an image."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        for folder, data in (("allowed/sub", PUBLIC), ("outside/sub", SECRET)):
            (Path(name) / folder).mkdir(parents=True)
            for image in ("image", "sub/image"):
                (Path(name) / folder).parent.joinpath(image).write_bytes(data)
        yield Path(name)


@pytest.fixture
def allowed(top: Path) -> Path:
    return top / "allowed"


# Run before CODE: openat2(2) does not exist, as before Linux 5.6 and in services of systemd with DynamicUser=.
WITHOUT_OPENAT2 = """
import sys; sys.path.append(sys.argv[1])
from ringplane.system import libc, seccomp
from ringplane.system.syscall_numbers import NUMBERS
libc.forbid_new_rights()
seccomp.install([
    (seccomp.LOAD, 0, 0, seccomp.NUMBER),
    (seccomp.IF_EQUAL, 0, 1, NUMBERS["openat2"]),
    (seccomp.RETURN, 0, 0, seccomp.UNKNOWN),
    (seccomp.RETURN, 0, 0, seccomp.SECCOMP_RET_ALLOW),
])
"""


@pytest.fixture(params=["openat2", "without openat2"])
def opening(allowed: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opening]:
    if request.param != "openat2":
        monkeypatch.setattr(remote_opener, "CODE", WITHOUT_OPENAT2 + remote_opener.CODE)
    process = Opening(allowed)
    yield process
    process.close()


def read_and_close(fd: int) -> bytes:
    assert fd > 0, errno.errorcode[-fd]
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Paths


@pytest.mark.parametrize("kind", [OPEN, CREATE, LISTEN, UNLINK])
@pytest.mark.parametrize(
    "path",
    [
        *(b"/etc/passwd", b"../outside/image", b"..", b".", b"sub/..", b"sub/../../outside/image", b"sub/./image"),
        *(b"./image", b"sub//image", b"sub/", b"/", b"//", b"image\0", b"\0abstract", b"sub/\0/../.."),
        b"a" * (LONGEST_PATH + 1),
    ],
)  # fmt: skip
def test_paths_that_our_end_never_sends(top: Path, kind: int, path: bytes) -> None:
    before = tree(top)
    process = Opening(top / "allowed")
    arguments = {CREATE: {"size": SIZE}, LISTEN: {"mode": 0o600}}.get(kind, {})
    process.sock.send(Request(kind, 0, path, **arguments).packed(1))
    process.expect_the_end()
    process.sock.close()
    assert tree(top) == before


@pytest.mark.parametrize("where", ["allowed/link", "allowed/sub/link"])
@pytest.mark.parametrize(
    "to", ["/etc/passwd", "../outside/image", "../../outside/image", "/proc/self/exe", "image", "/dev/zero", "none"]
)
def test_links_are_not_followed(opening: Opening, top: Path, where: str, to: str) -> None:
    """Also those that stay inside."""
    (top / where).symlink_to(to)
    name = where.removeprefix("allowed/")
    for how in (0, READ_ONLY, DIRECT, READ_ONLY | DIRECT):
        assert opening.open(name, how) == -errno.ELOOP
    assert opening.ask(CREATE, name, size=SIZE) == -errno.EEXIST
    assert opening.ask(LISTEN, name, mode=0o600) == -errno.EADDRINUSE
    assert opening.ask(UNLINK, name) == -errno.EPERM
    assert os.readlink(top / where) == to


@pytest.mark.parametrize("to", ["../outside", "/", "/etc", "sub", "../allowed/sub", "."])
def test_links_in_the_middle_are_not_followed(opening: Opening, top: Path, to: str) -> None:
    (top / "allowed/link").symlink_to(to)
    before = tree(top)
    for name in ("link/image", "link/passwd", "link/sub/image"):
        assert opening.open(name) == -errno.ELOOP
        assert opening.ask(CREATE, name, size=SIZE) == -errno.ELOOP
        assert opening.ask(LISTEN, name) == -errno.ELOOP
    assert tree(top) == before


def test_magic_links_are_not_followed(top: Path) -> None:
    """Those of /proc lead anywhere without naming a path."""
    proc = Path(f"/proc/{os.getpid()}")
    with (top / "outside/image").open("rb") as file, contextlib.closing(Opening(proc)) as opening:
        for name in (f"fd/{file.fileno()}", "root/etc/passwd", "cwd/image", "exe", "fd/0"):
            assert opening.open(name) == -errno.ELOOP


def test_what_is_not_an_image(opening: Opening, allowed: Path) -> None:
    os.mkfifo(allowed / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(allowed / "socket"))
        for name in ("fifo", "socket", "sub"):
            for how in (0, READ_ONLY, DIRECT):
                assert opening.open(name, how) == -errno.ENOTBLK
            assert opening.ask(UNLINK, name) == -errno.EPERM
    assert opening.open("none") == -errno.ENOENT
    assert opening.open("image/none") == -errno.ENOTDIR


@needs_root
def test_devices(opening: Opening, top: Path) -> None:
    """Block devices are opened only below a folder of /dev, other devices never."""
    with loop_device_of(top) as device:
        os.mknod(top / "allowed/block", stat.S_IFBLK | 0o600, device.stat().st_rdev)
        os.mknod(top / "allowed/character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert opening.open("block") == -errno.ENODEV
        assert opening.open("character") == -errno.ENOTBLK
        with contextlib.closing(Opening(Path("/dev"))) as of_dev:
            fd = of_dev.open(device.name, 0)
            assert fd > 0
            assert os.fstat(fd).st_rdev == device.stat().st_rdev
            assert os.pwrite(fd, b"x" * 512, 0) == 512
            os.close(fd)
            assert of_dev.open("null") == -errno.ENOTBLK


@contextlib.contextmanager
def loop_device_of(folder: Path) -> Iterator[Path]:
    (folder / "storage").write_bytes(bytes(SIZE))
    with loop_device(folder / "storage") as device:
        yield device


def test_other_folders(top: Path) -> None:
    process = Opening(top / "allowed")
    process.sock.send(Request(OPEN, 1, b"image", how=READ_ONLY).packed(1))
    process.expect_the_end()
    process.sock.close()


def test_a_folder_that_was_moved(opening: Opening, top: Path) -> None:
    """It is still the folder, and what has its path now is not."""
    (top / "allowed").rename(top / "moved")
    (top / "allowed").symlink_to("outside")
    assert read_and_close(opening.open("image")) == PUBLIC
    assert opening.ask(CREATE, "new", size=SIZE) == 0
    assert (top / "moved/new").exists()
    assert tree(top / "outside") == ["image", "sub", "sub/image"]


def test_hard_links_are_files_of_the_folder(opening: Opening, top: Path) -> None:
    """They can only be made by who may (protected_hardlinks in proc(5)); nothing distinguishes them."""
    (top / "allowed/hard").hardlink_to(top / "outside/image")
    assert read_and_close(opening.open("hard")) == SECRET


# Races


@contextlib.contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Meanwhile these two paths exchange what they lead to, again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), AT_FDCWD, os.fsencode(other)

    def exchange() -> None:
        assert libc.renameat2(AT_FDCWD, *paths, RENAME_EXCHANGE) == 0

    with repeating(exchange):
        yield


ROUNDS = 1000

# What a request may end with while something is exchanged.
REFUSED = {-code for code in (errno.ELOOP, errno.ENOTBLK, errno.ESTALE, errno.EXDEV, errno.EAGAIN, errno.ENXIO)}


def test_a_folder_that_becomes_a_link_and_back(opening: Opening, top: Path) -> None:
    (top / "allowed/link").symlink_to("../outside/sub")
    with exchanging(top / "allowed/sub", top / "allowed/link"):
        for number in range(ROUNDS):
            fd = opening.open("sub/image")
            assert fd in REFUSED or read_and_close(fd) == PUBLIC
            assert opening.ask(CREATE, f"sub/{number}", size=512) in {0, *REFUSED}
            made = opening.ask(LISTEN, f"sub/s{number}", mode=0o600)
            assert made in REFUSED or os.close(made) is None
    assert tree(top / "outside") == ["image", "sub", "sub/image"]


def test_an_image_that_becomes_a_link_or_a_fifo_and_back(opening: Opening, top: Path) -> None:
    (top / "allowed/link").symlink_to("../outside/image")
    os.mkfifo(top / "allowed/fifo")
    for name in ("link", "fifo"):
        with exchanging(top / "allowed/image", top / "allowed" / name):
            for _ in range(ROUNDS):
                fd = opening.open("image")
                assert fd in REFUSED or read_and_close(fd) == PUBLIC


def test_a_folder_that_moves_outside_and_back(opening: Opening, top: Path) -> None:
    with exchanging(top / "allowed/sub", top / "outside/sub"):
        for _ in range(ROUNDS):
            # Each of the two is inside in turn. One that has left when it is opened is refused by Landlock.
            fd = opening.open("sub/image")
            assert fd in {-errno.EACCES, *REFUSED} or read_and_close(fd) in (PUBLIC, SECRET)


def test_only_what_it_made_is_removed(opening: Opening, top: Path) -> None:
    """Not what has taken its place."""
    (top / "allowed/precious").write_bytes(PUBLIC)
    assert opening.ask(CREATE, "made", size=SIZE) == 0
    (top / "allowed/precious").rename(top / "allowed/made")
    assert opening.ask(UNLINK, "made") == -errno.ESTALE
    assert (top / "allowed/made").read_bytes() == PUBLIC


# Messages


def packed(
    kind: int, *, number: int = 1, how: int = 0, folder: int = 0, size: int = 0, mode: int = -1, group: int = -1
) -> bytes:
    return REQUEST.pack(number, kind, how, folder, size, mode, group) + b"new"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        b"x" * REQUEST.size,
        packed(OPEN)[: REQUEST.size],
        b"\0" * 100,
        b"\xff" * 100,
        b"x" * (1 << 16),
        random.Random(1).randbytes(100),
        random.Random(2).randbytes(4000),
        packed(0),
        packed(5),
        packed(255),
        packed(OPEN, number=0),
        packed(OPEN, how=4),
        packed(OPEN, how=255),
        packed(OPEN, folder=1),
        packed(OPEN, folder=65535),
        packed(OPEN, size=1),
        packed(OPEN, mode=0o600),
        packed(OPEN, group=0),
        packed(CREATE),
        packed(CREATE, size=-1),
        packed(CREATE, size=1, how=1),
        packed(CREATE, size=1, mode=0o777),
        packed(LISTEN, mode=0o1000),
        packed(LISTEN, mode=-2),
        packed(LISTEN, group=-2),
        packed(LISTEN, group=(1 << 32) - 1),
        packed(LISTEN, size=1),
        packed(LISTEN, how=1),
        packed(UNLINK, size=1),
        packed(UNLINK, how=1),
        packed(UNLINK, group=1),
    ],
)
def test_messages_that_our_end_never_sends(top: Path, message: bytes) -> None:
    before = tree(top)
    process = Opening(top / "allowed")
    process.sock.send(message)
    process.expect_the_end()
    process.sock.close()
    assert tree(top) == before


def test_random_messages(top: Path) -> None:
    """Changed bits in messages that are right: it ends, or answers, and makes nothing outside."""
    numbers = random.Random(3)
    before = tree(top / "outside")
    process = Opening(top / "allowed")
    for _ in range(100):
        message = bytearray(packed(numbers.choice([OPEN, CREATE, LISTEN, UNLINK]), size=numbers.choice([0, 4096])))
        for _ in range(numbers.randrange(3)):
            message[numbers.randrange(len(message))] ^= 1 << numbers.randrange(8)
        try:
            process.sock.send(message)
            answer, fds, _, _ = socket.recv_fds(process.sock, 100, 10)
        except (BrokenPipeError, ConnectionResetError):
            answer, fds = b"", []
        for fd in fds:
            os.close(fd)
        if not answer:
            assert process.process.wait(PATIENCE) == 0
            process.sock.close()
            process = Opening(top / "allowed")
    process.close()
    assert tree(top / "outside") == before


def test_fds_that_come_with_a_request_are_not_kept(opening: Opening, allowed: Path) -> None:
    before = opening.fds()
    with (allowed / "image").open("rb") as file:
        for number in range(1000, 1100):
            socket.send_fds(opening.sock, [Request(OPEN, 0, b"image", how=1).packed(number)], [file.fileno()] * 100)
            assert read_and_close(opening.answer(number)) == PUBLIC
    assert eventually(lambda: opening.fds() == before)


def test_many_requests(opening: Opening, allowed: Path) -> None:
    before = opening.fds()
    for number in range(2000):
        assert opening.ask(CREATE, f"sub/{number % 10}", size=SIZE) == 0
        assert read_and_close(opening.open(f"sub/{number % 10}", 0)) == bytes(100)
        assert opening.ask(UNLINK, f"sub/{number % 10}") == 0
    assert eventually(lambda: opening.fds() == before)
    assert tree(allowed) == ["image", "sub", "sub/image"]


def test_more_sockets_than_anybody_needs(opening: Opening) -> None:
    for number in range(MOST_SOCKETS):
        fd = opening.ask(LISTEN, f"sub/{number}", mode=0o600)
        assert fd > 0
        os.close(fd)
    assert opening.ask(LISTEN, "sub/one-more", mode=0o600) == -errno.EMFILE
    assert opening.ask(UNLINK, "sub/7") == 0
    os.close(opening.ask(LISTEN, "sub/one-more", mode=0o600))


def test_answers_that_nobody_reads(allowed: Path) -> None:
    """It does not wait for its answers to be read: it ends."""
    process = Opening(allowed)
    process.sock.setblocking(False)
    request = Request(OPEN, 0, b"image", how=READ_ONLY).packed(1)

    def send() -> bool:
        with contextlib.suppress(BlockingIOError):
            try:
                process.sock.send(request)
            except (BrokenPipeError, ConnectionResetError):
                return True
        return False

    assert eventually(send)
    assert process.process.wait(PATIENCE) == 0
    process.sock.close()


def test_the_end_of_the_socket(allowed: Path) -> None:
    process = Opening(allowed)
    process.sock.shutdown(socket.SHUT_WR)
    process.expect_the_end()
    process.sock.close()


# What code in the process could do

CODE = """
import errno, json, os, socket, sys
sys.path.append(sys.argv[1])
from ringplane.opener.allowed_folders import open_folder
from ringplane.opener.opening_sandbox import confine
from ringplane.system.libc import system_call
from ringplane.system.syscall_numbers import NUMBERS
import struct, mmap

parent, sock, control = os.getppid(), socket.socket(socket.AF_UNIX), socket.socket(fileno=0)
(folder, outside), answers = sys.argv[2:4], os.dup(1)


def openat2(path, flags):
    return system_call(NUMBERS["openat2"], -100, os.fsencode(path), struct.pack("QQQ", flags, 0, 0), 24)


def make_outside():
    how = struct.pack("QQQ", os.O_CREAT | os.O_RDWR, 0o600, 0)
    system_call(NUMBERS["openat2"], -100, os.fsencode(outside + "/new"), how, 24)


def bind_outside():
    sock.bind(outside + "/socket")


ATTEMPTS = {
    "open by path": lambda: os.open(folder + "/image", os.O_RDONLY),
    "read a file outside": lambda: openat2(outside + "/image", os.O_RDONLY),
    "read /etc/passwd": lambda: openat2("/etc/passwd", os.O_RDONLY),
    "list the folder": lambda: openat2(folder, os.O_RDONLY | os.O_DIRECTORY),
    "make a file outside": make_outside,
    "make a socket outside": bind_outside,
    "remove outside": lambda: system_call(NUMBERS["unlinkat"], -100, os.fsencode(outside + "/image"), 0),
    "read": lambda: os.read(0, 1),
    "write": lambda: os.write(answers, b"x"),
    "connect": lambda: sock.connect(folder + "/socket"),
    "rename": lambda: os.rename(folder + "/image", folder + "/other"),
    "link": lambda: os.link(folder + "/image", folder + "/other"),
    "change mode": lambda: os.chmod(folder + "/image", 0o666),
    "inet socket": lambda: socket.socket(socket.AF_INET),
    "connect to a port": lambda: socket.socket(socket.AF_INET).connect(("127.0.0.1", 9)),
    "netlink socket": lambda: socket.socket(socket.AF_NETLINK),
    "signal": lambda: os.kill(parent, 0),
    "fork": lambda: system_call(NUMBERS["clone"], 17, 0, 0, 0, 0),
    "map code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "become root": lambda: os.setuid(0),
    "memory file": lambda: os.memfd_create("x"),
}


def attempt(function):
    try:
        function()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]


confine([open_folder(folder)], eval(sys.argv[5]))
found = {name: attempt(function) for name, function in ATTEMPTS.items()}
control.sendmsg([json.dumps(found).encode()])
exec(sys.argv[4])
"""


def confined(top: Path, code: str, places: object = ()) -> tuple[dict[str, str], int]:
    """What each attempt led to in a process that may connect to these places, and the exit status after this code."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        package = str(Path(remote_opener.__file__).parents[2])
        arguments = [package, str(top / "allowed"), str(top / "outside"), code, repr(places)]
        command = [sys.executable, "-I", "-S", "-c", CODE, *arguments]
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        theirs.close()
        ours.settimeout(PATIENCE)
        return json.loads(ours.recv(1 << 16) or "{}"), process.wait(PATIENCE)


@needs_all
def test_nothing_but_opening_is_left(top: Path) -> None:
    before = tree(top)
    found, status = confined(top, "os._exit(5)")
    by_landlock = {
        *("read a file outside", "read /etc/passwd", "list the folder", "make a file outside"),
        *("make a socket outside", "remove outside"),
    }
    assert status == 5
    assert found == {name: "EACCES" if name in by_landlock else "EPERM" for name in found}
    assert tree(top) == before


@needs_all
def test_one_that_connects_to_servers(top: Path) -> None:
    """Sockets of their families, and no other ports."""
    found, _ = confined(top, "os._exit(5)", [(int(socket.AF_INET), ("127.0.0.1", 10809))])
    usual, _ = confined(top, "os._exit(5)")
    changed = {name: result for name, result in found.items() if result != usual[name]}
    by_port = "EACCES" if landlock.version() >= 4 else "ECONNREFUSED"
    # There is no such socket; its connection is refused by nobody but the file system.
    assert changed == {"connect": "ENOENT", "inet socket": "done", "connect to a port": by_port}


@pytest.mark.parametrize(
    ("number", "path", "arguments"), [(1, b"", {}), (0, b"x", {}), (0, b"", {"how": 1}), (0, b"", {"size": 1})]
)
def test_places_that_our_end_never_sends(allowed: Path, number: int, path: bytes, arguments: dict[str, int]) -> None:
    process = Opening(allowed, places=[(socket.AF_UNIX, str(allowed / "none"))])
    assert process.ask(CONNECT, b"") == -errno.ENOENT
    process.sock.send(Request(CONNECT, number, path, **arguments).packed(2))
    process.expect_the_end()
    process.sock.close()


def test_it_connects_nowhere_without_servers(opening: Opening) -> None:
    opening.sock.send(Request(CONNECT, 0, b"").packed(1))
    opening.expect_the_end()


@needs_all
@pytest.mark.parametrize("name", ["execve", "ptrace", "unshare", "mount"])
def test_calls_that_end_it(top: Path, name: str) -> None:
    _, status = confined(top, f"system_call(NUMBERS[{name!r}], 0, 0, 0, 0, 0)\nos._exit(5)")
    assert status == -signal.SIGSYS
