"""How a process starts: closed standard file descriptors, signals at any moment, and when the socket appears."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path

import pytest

from ringplane.compiler import apart
from ringplane.control.listener import Listener, ListenError
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import FrontEnd
from ringplane.system import standard_fds
from ringplane.system.signals import NONE
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.messages import HEADER, HEADER_SIZE, REPLY, VERSION, Request

from .interrupts import SCRIPT, SERVE, children, interrupt_starts, wait_until

SOON = 60.0
SIZE = 16 << 20
ENTRIES = [SERVE, SCRIPT]
STANDARD = (0, 1, 2)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of the socket."""
    return tmp_path / "socket"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes with piped output; what is left of them is killed."""
    with contextlib.ExitStack() as stack:

        def start_one(*words: object, **options: object) -> subprocess.Popen[str]:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen([str(word) for word in words], text=True, **{**pipes, **options})  # type: ignore[call-overload]
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_one


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[str, str]:
    """Send a signal; what the process has printed, with status 0."""
    process.send_signal(number)
    out, log = process.communicate(timeout=SOON)
    assert process.returncode == 0, log
    assert "Traceback" not in log
    return out, log


def file_of(process: subprocess.Popen[str], fd: int) -> str:
    return os.readlink(f"/proc/{process.pid}/fd/{fd}")


# Closed standard file descriptors


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


some = pytest.mark.parametrize(
    "closed", list(chain.from_iterable(combinations(STANDARD, count) for count in (1, 2, 3))), ids=str
)


@some
def test_closed_file_descriptors_are_occupied(start: Start, image: Path, path: Path, closed: Sequence[int]) -> None:
    """With them closed it serves all the same, and whatever is printed goes nowhere."""
    command = ENTRIES[len(closed) % 2]
    words = ["--blk-file", image, "--socket-path", path, "--log-level", "debug", "--trace"]
    process = start(*command, *words, preexec_fn=lambda: close(closed))
    wait_until(path.exists)
    with Driver(path, memory_size=SIZE) as driver:
        driver.write(0, b"x" * 4096)
        assert driver.read(0, 4096) == b"x" * 4096
        assert {file_of(process, fd) for fd in closed} == {os.devnull}
    end(process)
    assert image.read_bytes() == b"x" * 4096 + bytes(SIZE - 4096)
    assert not path.exists()


# Stores the files of its standard file descriptors before it serves. A newer libffi opens itself when it is imported.
PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path
_, before, image, path = sys.argv
def file_of(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return None
files = [file_of(fd) for fd in range(3)]
Path(before).write_text(json.dumps(files))
import ringplane
with ringplane.serve(image, path) as export:
    export.wait()
"""


def test_a_program_with_closed_file_descriptors(start: Start, image: Path, path: Path) -> None:
    """`ringplane.serve` in a program: those that are still closed are occupied, so no file of a disk becomes one."""
    before = path.with_name("before")
    process = start(
        sys.executable, "-c", PROGRAM, str(before), str(image), str(path), preexec_fn=lambda: close(STANDARD)
    )
    wait_until(path.exists)
    with contextlib.closing(FrontEnd(path)) as front_end:
        front_end.get_features()
        opened = json.loads(before.read_text())
        assert [file_of(process, fd) for fd in STANDARD] == [opened[fd] or os.devnull for fd in STANDARD]


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_an_inherited_socket_that_is_a_standard_file_descriptor(
    start: Start, image: Path, numbers: Sequence[int]
) -> None:
    """QEMU's --fd N: nothing that is printed or logged reaches the front end."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start(
                *SERVE, "--blk-file", image, "--fd", numbers[0], "--log-level", "debug", "--trace",
                preexec_fn=lambda: [os.dup2(theirs.fileno(), number) for number in numbers],
            )  # fmt: skip
        ours.settimeout(SOON)
        ours.sendall(encode_request(Request.GET_FEATURES))
        reply = ours.recv(4096)
        assert HEADER.unpack(reply[:HEADER_SIZE]) == (Request.GET_FEATURES, VERSION | REPLY, 8)
        assert len(reply) == HEADER_SIZE + 8
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
        # The end of the connection, and nothing before it.
        assert ours.recv(4096) == b""


def test_an_inherited_socket_that_is_closed(start: Start, image: Path) -> None:
    process = start(*SERVE, "--blk-file", image, "--fd", "0", preexec_fn=lambda: close([0]))
    _, log = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert "Error: file descriptor 0 is not a socket" in log


def test_without_dev_null_an_empty_file_stands_in(tmp_path: Path) -> None:
    """A jail without /dev: children inherit it, reading finds the end, writing fails and nothing grows."""
    code = (
        "import os, subprocess, sys; os.devnull = '/nowhere/null'\n"
        "from ringplane.system.standard_fds import occupy_streams; occupy_streams()\n"
        "print('lost', flush=True); print('lost', file=sys.stderr, flush=True)\n"
        "assert os.read(0, 1) == b''\n"
        "try: os.write(2, b'x')\n"
        "except PermissionError: pass\n"
        "else: sys.exit(2)\n"
        "assert os.open('/', os.O_PATH) > 2\n"
        "sys.exit(subprocess.run([sys.executable, '-c', 'import os; assert os.read(0, 1) == bytes()']).returncode)"
    )
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: close(STANDARD), timeout=SOON)
    assert done.returncode == 0


def test_what_is_open_stays_as_it_is() -> None:
    before = [os.fstat(fd) for fd in STANDARD]
    fds = len(os.listdir("/proc/self/fd"))
    standard_fds.occupy()
    assert [os.fstat(fd) for fd in STANDARD] == before
    assert len(os.listdir("/proc/self/fd")) == fds


# Signals


def test_starts_that_are_interrupted_at_random_moments() -> None:
    assert len(interrupt_starts(24, seed=11)) == 24


def test_signals_up_to_the_end_of_the_process(start: Start, image: Path, path: Path) -> None:
    """Also while Python ends: the status stays 0."""
    process = start(*SERVE, "--blk-file", image, "--socket-path", path)
    wait_until(path.exists)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    count = 0
    while process.poll() is None:
        process.send_signal(numbers[count % 3])
        count += 1
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert log.count("stopped by SIG") == 1


def test_signals_that_the_parent_process_has_blocked(start: Start, image: Path, path: Path) -> None:
    """They wait until they can be handled (`env --block-signal`): then none is too early."""
    blocked = {signal.SIGINT, signal.SIGTERM}
    for number in blocked:
        process = start(
            *SERVE, "--blk-file", image, "--socket-path", path,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked),
        )  # fmt: skip
        out, log = end(process, number)
        assert out == ""
        assert log.splitlines() == [line for line in log.splitlines() if "while starting" in line]
        assert f"stopped by {number.name}" in log
        assert not path.exists()


@pytest.fixture
def cold(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing has been compiled yet, and the temporary folder is the test's."""
    (tmp_path / "tmp").mkdir()
    return os.environ | {"RINGPLANE_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_compiler(
    start: Start, tmp_path: Path, path: Path, cold: dict[str, str], number: signal.Signals
) -> None:
    """What a terminal or systemd sends to all processes the compiling one ignores: its parent ends it."""
    words = ["--blk-file", tmp_path / "new", "--create", "1M", "--socket-path", path]
    process = start(*SERVE, *words, env=cold)
    wait_until(lambda: bool(children(process.pid)))
    (compiler,) = children(process.pid)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(compiler, each)
    assert not path.exists()
    out, log = end(process, number)
    assert out == ""
    # The compiler starts before it is known what it has to compile, which is logged.
    events = [line.partition("compiling")[1] or "stopped" for line in log.splitlines()]
    assert events in (["compiling", "stopped"], ["stopped"])
    assert not Path(f"/proc/{compiler}").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_compiler_ends_with_its_parent(start: Start, image: Path, path: Path, cold: dict[str, str]) -> None:
    process = start(*SERVE, "--blk-file", image, "--socket-path", path, env=cold)
    wait_until(lambda: bool(children(process.pid)))
    (compiler,) = children(process.pid)
    # When it has asked for it, its own imports are over.
    wait_until(lambda: "llvmlite" in Path(f"/proc/{compiler}/maps").read_text())
    wait_until(lambda: any((Path(cold["RINGPLANE_CACHE_DIR"])).glob("*.code")))
    process.kill()
    wait_until(lambda: not is_running(compiler))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_child_process_nothing_is_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    apart.compile_apart("ringplane.dataplane.compile_data_plane", NONE)
    assert "cannot start a process that compiles" in caplog.text


def test_other_commands_are_ended_by_a_signal(start: Start) -> None:
    """Those that do not look for signals, also by one that has come before; it says so."""
    code = (
        "import time; from ringplane.system.signals import CaughtSignals; s = CaughtSignals(); {}; s.end_at_once(); {}"
    )
    sleep, ready = "time.sleep(60)", "print('ready', flush=True)"
    process = start(sys.executable, "-c", code.format("pass", f"{ready}; {sleep}"))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SOON) == ("", "interrupted by SIGINT\n")
    assert process.returncode == -signal.SIGINT
    early = start(sys.executable, "-c", code.format("import os; os.kill(os.getpid(), 15)", sleep))
    assert early.communicate(timeout=SOON) == ("", "interrupted by SIGTERM\n")
    assert early.returncode == -signal.SIGTERM


# A signal comes when the first module is imported.
AT_FIRST_IMPORT = """
import os, sys
class Sender:
    def find_spec(self, name, *rest):
        if name.startswith("ringplane.system"):
            os.kill(os.getpid(), 2)
sys.meta_path.insert(0, Sender())
before = set(sys.modules)
from ringplane.cli import main
assert set(sys.modules) - before <= {"ringplane", "ringplane.cli", "__future__"}, set(sys.modules) - before
print("imported", flush=True)
main()
"""


def test_an_early_ctrl_c_has_no_traceback(start: Start) -> None:
    """Of all that ringplane does: only Python's own start remains."""
    process = start(sys.executable, "-c", AT_FIRST_IMPORT)
    assert process.communicate(timeout=SOON) == ("imported\n", "")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_check_says_that_a_signal_has_ended_it(start: Start, tmp_path: Path, number: int) -> None:
    """While it waits for a file that it reads."""
    config = tmp_path / "disks.toml"
    os.mkfifo(config)
    process = start(sys.executable, "-m", "ringplane", "check", config)
    # This waits until it is opened to be read.
    with config.open("w"):
        process.send_signal(number)
        out, log = process.communicate(timeout=SOON)
    assert (out, log) == ("", f"interrupted by {signal.Signals(number).name}\n")
    assert process.returncode == -number


# The socket


def test_the_socket_appears_when_a_front_end_is_answered(
    start: Start, image: Path, path: Path, cold: dict[str, str]
) -> None:
    """During a cold start nobody can connect, nor is systemd notified, but a wrong path is an error at once."""
    notify = path.with_name("notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.setblocking(False)
        process = start(*SERVE, "--blk-file", image, "--socket-path", path, env=cold | {"NOTIFY_SOCKET": str(notify)})
        wait_until(lambda: bool(children(process.pid)))
        compiling = True
        while compiling:
            seen = [each for each in (path, path.with_name("socket.upgrade")) if each.exists()]
            with contextlib.suppress(BlockingIOError):
                seen.append(manager.recv(4096))
            compiling = bool(children(process.pid))
            assert not compiling or not seen
        wait_until(path.exists)
        with contextlib.closing(FrontEnd(path)) as front_end:
            assert front_end.get_features()
        manager.settimeout(SOON)
        assert manager.recv(4096) == b"READY=1"
    end(process)


def test_a_wrong_socket_path_is_an_error_before_anything_is_compiled(
    start: Start, image: Path, path: Path, cold: dict[str, str]
) -> None:
    places = [path.with_name("nowhere") / "socket", path.with_name("x" * 120), image]
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        for place in [path, *places]:
            process = start(*SERVE, "--blk-file", image, "--socket-path", place, env=cold)
            _, log = process.communicate(timeout=SOON)
            assert process.returncode == 1
            assert log.startswith(f"Error: {place}: ")
            assert len(log.splitlines()) == 1


@pytest.mark.parametrize("name", ["s", "sock", "disk.sock", "\u00e4.sock"])
def test_a_rehearsal_leaves_nothing(tmp_path: Path, name: str) -> None:
    Listener.rehearse(tmp_path / name, 0o600)
    assert list(tmp_path.iterdir()) == []
    # As long as unix(7) allows.
    longest = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1))
    Listener.rehearse(longest)
    with pytest.raises(ListenError, match="at most 107 bytes"):
        Listener.rehearse(longest.with_name(longest.name + "x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_socket_listens_when_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Nobody who waits for the file is refused; without hard links too."""
    path = tmp_path / "socket"
    seen = []
    move = os.link if links else os.rename

    def connect_then(place: Path, target: Path) -> None:
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(place))
        seen.append(path.exists())
        move(place, target)

    def refuse(place: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", connect_then if links else refuse)
    monkeypatch.setattr(os, "rename", connect_then)
    listener = Listener.at(path, 0o640)
    assert seen == [False]
    assert [each.name for each in tmp_path.iterdir()] == ["socket"]
    assert path.stat().st_mode & 0o777 == 0o640
    listener.close()
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_somebody_takes_while_it_compiles(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    Listener.rehearse(path)
    with contextlib.closing(Listener.at(path)), pytest.raises(ListenError, match="another process is listening"):
        Listener.at(path)
