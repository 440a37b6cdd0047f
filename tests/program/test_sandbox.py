"""The sandbox: what a confined process can no longer do, in each of its threads, and that it still serves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pwd
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ringplane.cli.serve import serve as serve_command
from ringplane.control import sandbox
from ringplane.driver import Driver, Load, run_load
from ringplane.driver.frontend import FrontEnd
from ringplane.engines.uring import OPERATIONS, Uring, prepare_flush, wait
from ringplane.native import io_uring
from ringplane.native.io_uring import SQE_SIZE
from ringplane.options.users import User, parse_user
from ringplane.system import landlock, seccomp
from ringplane.system.seccomp import REFUSE, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, UNKNOWN, Only
from ringplane.system.syscall_numbers import FIRST_COMMON, MACHINE, MACHINES, NUMBERS, TABLE
from ringplane.virtio.blk_zones import VIRTIO_BLK_T_ZONE_APPEND, VIRTIO_BLK_T_ZONE_FINISH, VIRTIO_BLK_T_ZONE_RESET
from strict_sandbox import STRICT_SERVE
from unit.nbd_server import NbdServer
from unit.rig import loop_device, need_engine
from unit.waiting import wait_until

from .served import needs_all

IMAGE_SIZE = 16 << 20
MEMORY_SIZE = 16 << 20
MIB = 1 << 20
SOON = 60.0

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


class Served:
    """A process that serves a disk at `socket`; `command` are arguments of Python."""

    def __init__(self, folder: Path, command: list[str], *arguments: str, image: Path | None = None) -> None:
        self.socket, self.image = folder / "socket", image or folder / "image"
        where = ["--blk-file", str(self.image), "--socket-path", self.socket.name]
        with tempfile.NamedTemporaryFile("w", prefix="errors-", dir=folder, delete=False) as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, *where, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
            )
        self._errors = Path(errors.name)
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("listening on "):
            assert line, self._errors.read_text()

    def attach(self, **options: Any) -> Driver:
        return Driver(self.socket, memory_size=MEMORY_SIZE, **options)

    def statuses(self) -> dict[str, dict[str, str]]:
        """/proc/PID/task/*/status of each thread."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        lines = {task.name: (task / "status").read_text().splitlines() for task in tasks}
        return {task: dict(line.split(":\t", 1) for line in each if ":\t" in line) for task, each in lines.items()}

    def log(self) -> str:
        """The content of standard error."""
        return self._errors.read_text()

    def end(self, number: int = signal.SIGTERM) -> str:
        """Stop it and return its standard error; it must exit with status 0."""
        self.process.send_signal(number)
        assert self.process.wait(SOON) == 0, self._errors.read_text()
        return self._errors.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve an existing or a new image with `ringplane serve`, or with the strict filter."""
    started: list[Served] = []

    def start(*arguments: str, strict: bool = False, image: Path | None = None) -> Served:
        path = image or tmp_path / "image"
        if not path.exists():
            path.touch()
            os.truncate(path, IMAGE_SIZE)
        command = ["-c", STRICT_SERVE] if strict else ["-m", "ringplane", "serve"]
        started.append(Served(tmp_path, command, *arguments, image=image))
        return started[-1]

    yield start
    for served in started:
        served.close()


# System calls by number


@pytest.mark.parametrize(("machine", "header"), [("x86_64", "asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")])
def test_system_call_numbers_match_the_kernel(machine: str, header: str) -> None:
    places = [Path("/usr/include", header), Path(f"/usr/include/{MACHINE}-linux-gnu", header)]
    found = [place for place in places if place.exists()]
    if not found:
        pytest.skip("the kernel's headers are not installed (linux-libc-dev)")
    text = found[0].read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.M)}
    other_names = {"newfstatat": "fstatat", "pread64": "pread64"}
    for name, each in TABLE.items():
        number = each[MACHINES.index(machine)]
        assert numbers.get(name, numbers.get(other_names.get(name, name), -1)) == number, name


# The filter as a program


def decide(program: list[seccomp.Instruction], number: int, *arguments: int, arch: int = seccomp.AUDIT_ARCH) -> int:
    """The result of running the filter for this call."""
    data = struct.pack("IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    at = accumulator = 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == seccomp.RETURN:
            return operand
        if code == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("I", data, operand)
        elif code == seccomp.AND:
            accumulator &= operand
        else:
            true = accumulator == operand if code == seccomp.IF_EQUAL else accumulator >= operand
            at += if_true if true else if_false


def test_program() -> None:
    program = seccomp.program(
        ["read", "epoll_pwait2"], {"ioctl": Only(1, (7, 8, 9)), "mmap": Only(2, (0,), mask=4)}, ["execve"]
    )
    expected = {
        ("read", 1, 2, 3): SECCOMP_RET_ALLOW,
        ("epoll_pwait2",): SECCOMP_RET_ALLOW,
        ("ioctl", 0, 7): SECCOMP_RET_ALLOW,
        ("ioctl", 0, 9): SECCOMP_RET_ALLOW,
        ("ioctl", 7, 10): REFUSE,
        ("mmap", 0, 0, 3): SECCOMP_RET_ALLOW,
        ("mmap", 0, 0, 7): REFUSE,
        ("write",): REFUSE,
        ("execve",): SECCOMP_RET_KILL_PROCESS,
        ("io_uring_setup",): UNKNOWN,
    }
    for (name, *arguments), answer in expected.items():
        assert decide(program, NUMBERS[str(name)], *map(int, arguments)) == answer, name
    assert decide(program, FIRST_COMMON + 1000) == UNKNOWN
    assert decide(program, NUMBERS["read"] | 1 << 30) == UNKNOWN
    assert decide(program, NUMBERS["read"], arch=0x4000_0003) == SECCOMP_RET_KILL_PROCESS


# What a confined process cannot do, in each thread

# Prints, for each thread and attempt, the error's name, or "done".
ATTEMPTS = """
import errno, json, mmap, os, socket, sys
from concurrent.futures import Future
import ringplane
from ringplane.control import sandbox
from ringplane.system import landlock
from ringplane.system import libc
from ringplane.system.syscall_numbers import NUMBERS

folder, how, image, port, other_port = sys.argv[1:]
elsewhere = os.path.join(os.path.dirname(folder), "elsewhere")
parent = os.getppid()


def files_alone(folders, *_):
    libc.forbid_new_rights()
    landlock.give_up_files(folders)


def map_code():
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)


def make_code():
    libc.system_call(NUMBERS["mprotect"], libc.mmap_shared(os.memfd_create("x"), 4096, 0), 4096, 5)


def connect_abstract():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\\0ringplane test " + str(parent))


ATTEMPTS = {
    "read a file": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)),
    "make a file": lambda: os.close(os.open(os.path.join(folder, "new"), os.O_CREAT | os.O_WRONLY)),
    "list a folder": lambda: os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
    "rename": lambda: os.rename(os.path.join(folder, "a"), os.path.join(folder, "b")),
    "remove elsewhere": lambda: os.unlink(elsewhere),
    "signal others": lambda: os.kill(parent, 0),
    "abstract socket": connect_abstract,
    "inet socket": lambda: socket.socket(socket.AF_INET).close(),
    "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "connect to a server": lambda: socket.socket().connect(("127.0.0.1", int(port))),
    "connect elsewhere": lambda: socket.socket().connect(("127.0.0.1", int(other_port))),
    "inet bind": lambda: socket.socket(socket.AF_INET).bind(("127.0.0.1", 0)),
    "map code": map_code,
    "make code": make_code,
    "fork": lambda: os.fork() or os._exit(0),
    "io_uring": lambda: libc.system_call(NUMBERS["io_uring_setup"], 0, 0),
    "change mode": lambda: os.chmod(folder, 0o700),
    "become root": lambda: os.setuid(0),
    "be dumped": lambda: libc.system_call(NUMBERS["prctl"], libc.PR_SET_DUMPABLE, 1, 0, 0, 0),
    "type": lambda: libc.system_call(NUMBERS["ioctl"], 0, 0x5412, b"x"),
    "other's CPUs": lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
    "remove a socket": lambda: os.unlink(os.path.join(folder, "removable")),
    "make a socket's file": lambda: os.mknod(os.path.join(folder, "removable")),
}


def attempt_all():
    return {name: attempt(function) for name, function in ATTEMPTS.items()}


def attempt(function):
    try:
        function()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]


def on_control_thread():
    future = Future()
    export.threads.soon(lambda: future.set_result(attempt_all()))
    return future.result()


give_up = {"all": sandbox.confine, "files": files_alone}[how]
create = None if "://" in image else 1 << 20
with ringplane.serve(image, folder + "/socket", create=create, give_up=give_up) as export:
    (worker,) = export.threads.workers.values()
    found = {"I/O": worker.call(attempt_all).result(), "control": on_control_thread(), "main": attempt_all()}
print(json.dumps(found))
"""


# By thread and attempt.
Attempts = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    folder = tmp_path / "sockets"
    folder.mkdir()
    for name in ("a", "removable", "../elsewhere"):
        (folder / name).touch()

    def attempt_all(
        how: str, image: str = str(folder / "image"), port: int = 1, other_port: int = 1
    ) -> dict[str, dict[str, str]]:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ATTEMPTS, str(folder), how, image, str(port), str(other_port)]
        # Some of the attempts succeed without the filter, and must be harmless.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SOON, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert not (folder / "socket").exists()
        found: dict[str, dict[str, str]] = json.loads(done.stdout)
        return found

    return attempt_all


# The others: EPERM.
REFUSED = {"io_uring": "ENOSYS", "remove elsewhere": "EACCES"}


@needs_all
def test_nothing_but_serving_is_left(attempts: Attempts) -> None:
    found = attempts("all")
    assert found["I/O"].pop("remove a socket") == "done"
    assert found["control"].pop("remove a socket") == found["main"].pop("remove a socket") == "ENOENT"
    refused = dict.fromkeys(found["main"], "EPERM") | REFUSED
    assert found == dict.fromkeys(("I/O", "control", "main"), refused)


@needs_all
@pytest.mark.parametrize("kind", ["UNIX", "TCP"])
def test_an_nbd_disk_keeps_the_right_to_connect_to_its_server(attempts: Attempts, tmp_path: Path, kind: str) -> None:
    """At a UNIX socket, or at one TCP port; and no other right that a file does not need."""
    server = NbdServer(tmp_path / "nbd", bytearray(MIB), port=0 if kind == "TCP" else None)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        port = server.port or tcp.getsockname()[1]
        with open_abstract():
            found = attempts("all", server.uri, port, elsewhere.getsockname()[1])
    server.stop()
    assert found["I/O"].pop("remove a socket") == "done"
    assert found["control"].pop("remove a socket") == found["main"].pop("remove a socket") == "ENOENT"
    allowed = {"inet socket": "done", "connect to a server": "done", "connect elsewhere": "done"}
    if landlock.version() >= 4:
        allowed |= {"connect elsewhere": "EACCES"} | ({} if kind == "TCP" else {"connect to a server": "EACCES"})
    if landlock.version() < 6:
        allowed["abstract socket"] = "done"
    for thread, each in found.items():
        assert {name: how for name, how in each.items() if how != REFUSED.get(name, "EPERM")} == allowed, thread


@needs_all
def test_landlock_holds_without_the_filter(attempts: Attempts) -> None:
    expected = dict.fromkeys(
        ("read a file", "make a file", "list a folder", "rename", "remove elsewhere", "make a socket's file"), "EACCES"
    )
    if landlock.version() >= 4:
        expected |= {"inet bind": "EACCES"}
    if landlock.version() >= 6:
        expected |= {"signal others": "EPERM", "abstract socket": "EPERM"}
    with open_abstract():
        for thread, each in attempts("files").items():
            assert {name: each[name] for name in expected} == expected, thread
            assert each["remove a socket"] in ("done", "ENOENT")


@contextlib.contextmanager
def open_abstract() -> Iterator[None]:
    """A listening abstract socket, so that only Landlock can refuse a connection to it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0ringplane test {os.getpid()}")
        sock.listen()
        yield


@needs_all
@pytest.mark.parametrize(
    "call",
    ["os.execv('/bin/true', ['true'])", "system_call(NUMBERS['ptrace'], 0)", "system_call(NUMBERS['unshare'], 0)"],
)
def test_deadly_calls_end_the_process(call: str) -> None:
    code = (
        "import os\n"
        "from ringplane.system.libc import system_call\n"
        "from ringplane.system.syscall_numbers import NUMBERS\n"
        f"from ringplane.control.sandbox import confine\nconfine([])\n"
        f"print('confined', flush=True)\n{call}\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "confined\n"), done.stderr


LATE = """
import json, logging, threading, time
from ringplane.control.sandbox import confine
logging.basicConfig()
threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
confine([])
try:
    json.loads("no JSON")
except ValueError:
    logging.exception("logged without the lines of the source, which cannot be read")
"""


def test_threads_that_started_too_early_are_reported() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, env=environment, timeout=SOON)
    assert done.returncode == 0
    assert "threads started earlier (1) keep their capabilities and access to files" in done.stderr
    assert "json.decoder.JSONDecodeError: Expecting value" in done.stderr
    assert "decoder.py" in done.stderr


def test_a_policy_follows_a_file(serve: Callable[..., Served], tmp_path: Path) -> None:
    """The thread that waits for the file is as confined as the others, and may do what it needs."""
    trigger = tmp_path / "now"
    served = serve("--policy", f"error,operation=write,trigger={trigger}", strict=True)

    def fails() -> bool:
        try:
            driver.write(0, bytes(512))
        except OSError:
            return True
        return False

    with served.attach() as driver:
        assert not fails()
        trigger.touch()
        wait_until(fails)
        trigger.unlink()
        wait_until(lambda: not fails())
        rights = {status["Name"]: (status["Seccomp"], status["CapEff"]) for status in served.statuses().values()}
    assert rights["ringplane-files"] == rights["ringplane-io-0"] == ("2", "0" * 16)
    served.end()


@pytest.mark.parametrize("operation", [0, 18, 19, 45])
def test_an_io_uring_ring_does_only_io(operation: int) -> None:
    """io_uring's NOP, OPENAT, CLOSE and SOCKET fail; rings are restricted with and without the sandbox."""
    need_engine("io_uring")
    assert operation not in OPERATIONS
    engine = Uring(4)
    try:
        engine.attach_thread()
        prepare_flush(engine.address, 1, 0)
        (ctypes.c_uint8 * SQE_SIZE).from_address(engine._sqes)[0] = operation
        while not engine._engine["completed"][0]:
            wait(engine.address, -1, 1)
        assert engine._completions["result"][0] == -errno.EACCES
        with pytest.raises(PermissionError):
            # IORING_REGISTER_PERSONALITY
            io_uring.register(engine._fd, 9)
    finally:
        engine.close()


# `ringplane serve`


@needs_all
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_all_threads_are_confined(serve: Callable[..., Served], engine: str) -> None:
    served = serve("--io-threads", "2", "--engine", engine, "--sandbox")
    with served.attach() as driver:
        driver.write(0, b"x" * 4096)
        driver.flush()
        statuses = served.statuses()
        # The main thread, the control thread, and two helpers per I/O thread; maybe also the kernel's own.
        assert len(statuses) >= 8
        for status in statuses.values():
            assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
            assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        proc = Path(f"/proc/{served.process.pid}")
        assert not [line for line in (proc / "maps").read_text().splitlines() if "wx" in line.split()[1]]
        assert re.search(r"^Max core file size +0 +0 ", (proc / "limits").read_text(), re.M)
        assert dump_flags(proc / "smaps") == {True}
    assert "Landlock" not in served.end()


def dump_flags(smaps: Path) -> set[bool]:
    """Whether mappings of guest memory are excluded from core dumps."""
    found, of_guest = set(), False
    for line in smaps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_guest = "memfd:" in line
        elif of_guest and line.startswith("VmFlags:"):
            found.add("dd" in line.split())
    return found


def test_without_a_sandbox(serve: Callable[..., Served]) -> None:
    statuses = serve("--no-sandbox").statuses()
    before = {status["Seccomp"] for status in statuses.values()}
    assert before == {re.search(r"Seccomp:\t(\d)", Path("/proc/self/status").read_text())[1]}  # type: ignore[index]


def exercise(served: Served, *, discards: bool = True) -> None:
    """Requests of all types, and several front ends one after the other."""
    for _ in range(2):
        with served.attach() as driver:
            driver.write(0, b"x" * 65536)
            driver.flush()
            assert driver.read(4096, 4096) == b"x" * 4096
            if discards:
                driver.write_zeroes(4096, 4096, unmap=True)
                driver.write_zeroes(8192, 4096)
                driver.discard(MIB, MIB)
                assert driver.read(4096, 8192) == bytes(8192)
            run_load(driver, Load(depth=32, read_percent=50, region=(0, MIB), seconds=0.2, verify=True))


@needs_all
def test_a_waiting_front_end_needs_no_forbidden_call(serve: Callable[..., Served]) -> None:
    served = serve(strict=True)
    with served.attach(), contextlib.closing(FrontEnd(served.socket)) as second:
        wait_until(lambda: "waits until the first one" in served.log())
        served.process.send_signal(signal.SIGUSR1)
        assert second.get_features()
    served.end()


@needs_all
@pytest.mark.parametrize(
    "arguments",
    [
        ("--engine", "io_uring", "--num-queues", "2", "--io-threads", "2", "--cpus", "0"),
        ("--engine", "aio", "--num-queues", "2", "--trace"),
        ("--num-queues", "8", "--io-threads", "8"),
        ("--engine", "io_uring", "--pin-memory", "--buffered"),
        ("--engine", "aio", "--feature", "packed=off", "--block-size", "4096"),
        ("--engine", "io_uring", "--feature", "in-order=on", "--feature", "inband-notifications=on"),
        ("--poll-us", "always", "--engine", "aio"),
        ("--engine", "io_uring", "--limit", "total-iops-sec=5000", "--limit", "write-bytes-sec=100M"),
    ],
    ids=" ".join,
)
def test_nothing_forbidden_is_called(serve: Callable[..., Served], arguments: tuple[str, ...]) -> None:
    served = serve(*arguments, strict=True)
    exercise(served)
    with served.attach() as driver:
        driver.set_write_back(False)
        driver.write(0, b"y" * 4096)
        driver.set_write_back(True)
        for size in (2 * IMAGE_SIZE, IMAGE_SIZE):
            os.truncate(served.image, size)
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda size=size: driver.read_config() or driver.capacity == size)  # type: ignore
    exercise(served)
    errors = served.end()
    assert "Traceback" not in errors
    assert not served.socket.exists()
    assert ("complete" in errors) == ("--trace" in arguments)


@needs_all
@pytest.mark.parametrize("engine", ["memory", "null"])
def test_nothing_forbidden_is_called_without_the_kernels_io(serve: Callable[..., Served], engine: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        served = serve("--engine", engine, strict=True, image=Path(folder) / "image")
        if engine == "memory":
            exercise(served)
        with served.attach() as driver:
            driver.write(0, b"x" * 4096)
            os.truncate(served.image, 2 * IMAGE_SIZE)
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda: driver.read_config() or driver.capacity == 2 * IMAGE_SIZE)  # type: ignore
            driver.write(2 * IMAGE_SIZE - 4096, b"x" * 4096)
            # A page of a mapping disappears, and a signal handler replaces it.
            os.truncate(served.image, 4096)
            with contextlib.suppress(OSError):
                driver.write(8192, b"x" * 4096)
        served.end()


@needs_all
@needs_root
def test_nothing_forbidden_is_called_for_a_block_device(serve: Callable[..., Served], device: Path) -> None:
    served = serve(strict=True, image=device)
    exercise(served)
    served.process.send_signal(signal.SIGHUP)
    with served.attach() as driver:
        driver.read(0, 512)
    assert "unchanged" in served.end()


@pytest.fixture
def device() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        os.truncate(file.name, IMAGE_SIZE)
        with loop_device(Path(file.name)) as device:
            yield device


@needs_all
def test_nothing_forbidden_is_called_for_zones(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve("--zoned", "256K", strict=True)
    for _ in range(2):
        with served.attach() as driver:
            driver.write(0, b"x" * 4096)
            driver.flush()
            assert driver.request(VIRTIO_BLK_T_ZONE_APPEND, 512, b"y" * 4096, read=8).status == 0
            assert driver.request(VIRTIO_BLK_T_ZONE_FINISH, 512).status == 0
            for zone in (0, 512):
                assert driver.request(VIRTIO_BLK_T_ZONE_RESET, zone).status == 0
    served.end()
    assert (tmp_path / "image.zones").exists()


@needs_all
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_nothing_forbidden_is_called_for_a_successor(serve: Callable[..., Served], engine: str) -> None:
    """Each process takes over from the previous one, and all are confined."""
    served = serve("--engine", engine, strict=True)
    with served.attach() as driver:
        driver.write(0, b"x" * 4096)
        for _ in range(2):
            before, served = served, serve("--engine", engine, "--upgrade", strict=True)
            assert before.process.wait(SOON) == 0
            assert driver.read(0, 4096) == b"x" * 4096
            driver.flush()
    exercise(served)
    assert "takes over" not in served.end()
    assert not served.socket.exists()
    assert not served.socket.with_name("socket.upgrade").exists()


# Kernels without parts of it

BARE = """
from ringplane.system import landlock
landlock.version = lambda: 0
from ringplane.cli.serve import serve
serve()
"""


def test_missing_parts_are_logged(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(IMAGE_SIZE))
    served = Served(tmp_path, ["-c", BARE])
    try:
        exercise(served)
        assert {status["NoNewPrivs"] for status in served.statuses().values()} == {"1"}
        assert (
            served.end()
            .splitlines()[0]
            .endswith("WARNING: the sandbox is incomplete: this system does not have Landlock")
        )
    finally:
        served.close()


def test_a_required_sandbox_must_be_complete(tmp_path: Path) -> None:
    where = ["--blk-file", str(tmp_path / "image"), "--create", "1M", "--socket-path", str(tmp_path / "socket")]
    command = [sys.executable, "-c", BARE, *where, "--sandbox"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stderr) == (1, "Error: --sandbox needs Landlock, which this system does not have\n")
    assert list(tmp_path.iterdir()) == []


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, *arguments: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(landlock, "system_call", refuse)
    monkeypatch.setattr(seccomp, "system_call", refuse)
    assert sandbox.missing() == ["Landlock", "seccomp filters"]


@pytest.mark.parametrize(("version", "rights"), [(1, (0x1FFF, 0, 0)), (4, (0x7FFF, 3, 0)), (9, (0xFFFF, 3, 3))])
def test_only_supported_rights_are_requested_from_an_older_landlock(
    monkeypatch: pytest.MonkeyPatch, version: int, rights: tuple[int, ...]
) -> None:
    asked = []

    def note(number: int, *arguments: object) -> int:
        if number != NUMBERS["landlock_create_ruleset"]:
            return 0
        if arguments[0] == 0:
            return version
        asked.append(landlock.RULESET_ATTR.unpack(arguments[0]))  # type: ignore[arg-type]
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(landlock, "system_call", note)
    landlock.give_up_files([])
    assert asked == [rights]


# Another user


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder that all users can access, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@needs_root
@pytest.mark.parametrize("options", [[], ["--no-sandbox"]], ids=["sandbox", "no sandbox"])
def test_another_user(folder_of_nobody: Path, options: list[str]) -> None:
    nobody = pwd.getpwnam("nobody")
    (folder_of_nobody / "image").write_bytes(bytes(IMAGE_SIZE))
    served = Served(
        folder_of_nobody, ["-m", "ringplane", "serve"], "--user", "nobody", "--pin-memory", "--trace", *options
    )
    try:
        exercise(served)
        for status in served.statuses().values():
            assert set(status["Uid"].split()) == {str(nobody.pw_uid)}
            assert set(status["Gid"].split()) == {str(nobody.pw_gid)}
            assert (status["Groups"].strip(), int(status["CapEff"], 16)) == ("", 0)
        # It belongs to root, because the process is not dumpable.
        assert Path(f"/proc/{served.process.pid}/mem").stat().st_uid == 0
        errors = served.end()
        assert "cannot pin" not in errors
        # The folder belongs to root.
        assert "socket: cannot remove the socket's file: Permission denied" in errors
    finally:
        served.close()


@needs_root
def test_a_folder_that_another_user_cannot_enter(folder_of_nobody: Path) -> None:
    """It can be served in, but nothing can be removed there at the end, which the log says."""
    os.chmod(folder_of_nobody, 0o700)
    (folder_of_nobody / "image").write_bytes(bytes(IMAGE_SIZE))
    served = Served(folder_of_nobody, ["-m", "ringplane", "serve"], "--user", "nobody")
    try:
        exercise(served)
        assert "socket: cannot remove the socket's file: Permission denied" in served.end()
    finally:
        served.close()


@needs_root
def test_the_folder_of_another_user(folder_of_nobody: Path) -> None:
    os.chown(folder_of_nobody, pwd.getpwnam("nobody").pw_uid, -1)
    (folder_of_nobody / "image").write_bytes(bytes(IMAGE_SIZE))
    served = Served(folder_of_nobody, ["-m", "ringplane", "serve"], "--user", "nobody")
    try:
        exercise(served)
        assert "cannot remove" not in served.end()
        assert not served.socket.exists()
    finally:
        served.close()


def test_switching_the_user_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(groups: list[int]) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(sandbox.SandboxError, match="cannot become user daemon: Operation not permitted; only root"):
        sandbox.change_user(parse_user("daemon"))


def test_user_options_are_parsed() -> None:
    root = pwd.getpwuid(0)
    assert parse_user(root.pw_name) == User(root.pw_name, 0, root.pw_gid)
    assert parse_user("0:12345") == User("0:12345", 0, 12345)
    assert parse_user("123456:0") == User("123456:0", 123456, 0)
    for wrong, words in {
        "": "user '' does not exist",
        "nobody-of-this-name": "does not exist",
        "0:no-such-group": "group 'no-such-group' does not exist",
        "123456": "user 123456 has no entry in the user database",
        "4294967295:0": "too large for the number of a user",
        "0:99999999999": "too large for the number of a group",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_user(wrong)


def test_a_user_that_does_not_exist() -> None:
    done = CliRunner().invoke(serve_command, ["--user", "nobody-of-this-name"])
    assert done.exit_code == 2
    assert "user 'nobody-of-this-name' does not exist" in done.output
