"""`ringplane serve` as a process: its output, its exit status, and one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from ringplane.block.mapped_image import is_memory
from ringplane.cli.serve import serve as serve_command
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import FrontEnd
from ringplane.driver.load import Load, run_load
from ringplane.driver.process import peer_pid
from ringplane.engines.choose_engine import WORKER_ENGINES
from ringplane.options.cpus import format_cpus
from ringplane.options.engine_names import AUTO, THREAD_ENGINES
from ringplane.system.open_files import FEWEST_FILES
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER
from unit.rig import need_engine
from unit.waiting import states_of_threads, wait_until

IMAGE_SIZE = 16 << 20
MEMORY_SIZE = 16 << 20
MIB = 1 << 20
SOON = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]
SERVE = (sys.executable, "-m", "ringplane", "serve")
SCRIPT = Path(sys.executable).with_name("ringplane-vhost-user-blk")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the socket."""
    return tmp_path / "socket"


class Served:
    """A `ringplane serve` process that listens; `lines` is its output so far."""

    def __init__(self, arguments: Sequence[str], **options: object) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when the object goes)
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            [*SERVE, *arguments], stdout=subprocess.PIPE, stderr=self.errors, text=True, **options
        )
        self.lines: list[str] = []
        while not self.lines or not self.lines[-1].startswith("listening on "):
            line = self.process.stdout.readline()
            assert line, self.finish()[2]
            self.lines.append(line.rstrip("\n"))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal and wait; returns the exit status and the rest of both output streams."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int, str, str]:
        out = self.process.stdout.read()
        self.process.wait(SOON)
        self.errors.seek(0)
        return self.process.returncode, out, self.errors.read()


@pytest.fixture
def serve(path: Path, image: Path) -> Iterator[Callable[..., Served]]:
    """Serve the image at the socket, unless the arguments say otherwise."""
    started: list[Served] = []

    def start(*arguments: str, disk: Path = image, at: Path | None = path, **options: object) -> Served:
        where = ["--socket-path", str(at)] if at else []
        started.append(Served(["--blk-file", str(disk), *where, *arguments], **options))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        served.process.stdout.close()
        served.errors.close()


def refused(*arguments: object, **options: object) -> str:
    """The one-line error message; the process must have failed."""
    done = subprocess.run(  # type: ignore[call-overload]
        [*SERVE, *map(str, arguments)], capture_output=True, text=True, timeout=SOON, **options
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    # Click prints the usage before usage errors.
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def attach(path: Path) -> Driver:
    return Driver(path, memory_size=MEMORY_SIZE)


# Starting and ending


def test_sighup_picks_up_the_new_size(serve: Callable[..., Served], path: Path) -> None:
    served = serve("--num-queues", "1")
    image = path.with_name("image")
    with attach(path) as driver:
        before = driver.capacity
        for size in (2 * before, before // 2):
            os.truncate(image, size)
            served.process.send_signal(signal.SIGHUP)

            def seen(size: int = size) -> bool:
                driver.read_config()
                return driver.capacity == size

            wait_until(seen)
        assert driver.read(before // 2 - 512, 512)
    status, _, err = served.end(signal.SIGTERM)
    assert status == 0
    assert f"image: has {2 * before} bytes now" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal(serve: Callable[..., Served], path: Path, number: int) -> None:
    served = serve("--num-queues", "2")
    assert served.lines[-1] == f"listening on {path}"
    assert any(line.startswith(f"serving {path.with_name('image')} as image (16 MiB, ") for line in served.lines)
    with attach(path) as driver:
        driver.write(0, b"x" * 512)
    status, out, err = served.end(number)
    assert status == 0
    # QEMU asks for a queue per CPU of the guest, unless it gets a number.
    assert "vhost-user-blk-pci,chardev=ringplane0\n" in out
    assert f"path={path}" in out
    assert not path.exists()
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_notified_when_front_ends_may_connect(
    serve: Callable[..., Served], path: Path, tmp_path: Path, kind: str
) -> None:
    """By sd_notify(3), once, and not earlier."""
    name = str(tmp_path / "notify") if kind == "path" else f"\0{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(SOON)
        served = serve(env=os.environ | {"NOTIFY_SOCKET": name.replace("\0", "@")})
        assert manager.recv(4096) == b"READY=1"
        attach(path).close()
        assert served.end()[0] == 0
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody", "@", "vsock:2:1"])
def test_no_service_manager_listens(serve: Callable[..., Served], path: Path, address: str) -> None:
    served = serve(env=os.environ | {"NOTIFY_SOCKET": address})
    attach(path).close()
    assert served.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_ends_it_cleanly(serve: Callable[..., Served], path: Path, image: Path, number: int) -> None:
    served = serve()
    errors: list[Exception] = []
    busy = threading.Event()

    def work() -> None:
        load = Load(depth=32, read_percent=50, region=(0, MIB), seconds=60, timeout=10)
        try:
            run_load(driver, load, lambda now: busy.set() if now.requests else None)
        except ConnectionError as error:
            errors.append(error)

    with attach(path) as driver:
        driver.write(IMAGE_SIZE - 512, b"y" * 512)
        load = threading.Thread(target=work)
        load.start()
        assert busy.wait(SOON)
        status, _, err = served.end(number)
        load.join()
    assert (status, len(errors)) == (0, 1)
    assert "Traceback" not in err
    assert not path.exists()
    assert image.read_bytes()[-512:] == b"y" * 512


def test_storm_of_signals_ends_it_once(serve: Callable[..., Served], path: Path) -> None:
    served = serve()
    with attach(path):
        for number in [signal.SIGTERM, signal.SIGINT] * 50:
            served.process.send_signal(number)
        status, _, err = served.finish()
    assert status == 0
    assert "Traceback" not in err
    assert not path.exists()


def test_killed_process_leaves_a_socket_that_the_next_one_replaces(serve: Callable[..., Served], path: Path) -> None:
    first = serve()
    first.process.kill()
    first.finish()
    assert path.is_socket()
    served = serve()
    with attach(path) as driver:
        assert driver.backend_pid == served.process.pid
    assert served.end()[0] == 0


def test_front_ends_connect_and_disconnect(serve: Callable[..., Served], path: Path) -> None:
    served = serve()
    for number in range(5):
        with attach(path) as driver:
            driver.write(number * 512, bytes([number]) * 512)
    with contextlib.closing(FrontEnd(path)) as garbage:
        garbage.sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert garbage.sock.recv(1) == b""
    with attach(path) as driver:
        assert [driver.read(number * 512, 512)[0] for number in range(5)] == list(range(5))
    status, _, err = served.end()
    assert status == 0
    assert err.count("front end dropped") == 1


def test_running_out_of_fds_only_delays_new_front_ends(serve: Callable[..., Served], path: Path) -> None:
    served = serve()
    pid = served.process.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    with contextlib.closing(FrontEnd(path, timeout=1)) as peer, contextlib.suppress(Exception):
        peer.get_features()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert served.process.poll() is None
    with attach(path) as driver:
        driver.read(0, 512)
    assert served.end()[0] == 0


# Sockets


def test_live_socket_is_not_replaced(serve: Callable[..., Served], path: Path, tmp_path: Path) -> None:
    served = serve()
    other = tmp_path / "other"
    line = refused("--blk-file", other, "--socket-path", path, "--create", "1M")
    assert "another process is listening there" in line
    assert not other.exists()
    with attach(path) as driver:
        driver.read(0, 512)
    assert served.end()[0] == 0


def test_files_that_are_not_sockets_are_left_alone(image: Path, path: Path) -> None:
    path.write_text("precious")
    assert "exists and is not a socket; choose another path" in refused("--blk-file", image, "--socket-path", path)
    assert path.read_text() == "precious"


def test_mode_and_group_of_the_socket(serve: Callable[..., Served], path: Path) -> None:
    group = os.getgid()
    serve("--socket-group", str(group))
    assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o660, group)
    # Who connects there gets the disks.
    assert path.with_name("socket.upgrade").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--socket-group", "nosuchgroup"], "Invalid value for '--socket-group': group 'nosuchgroup' does not exist"),
        (["--socket-mode", "rw"], "'rw' is not a file mode; it has three octal digits, for example 0660"),
        (["--socket-mode", "999"], "'999' is not a file mode; it has three octal digits, for example 0660"),
    ],
)
def test_mode_and_group_that_do_not_exist(image: Path, path: Path, arguments: list[str], words: str) -> None:
    assert words in refused("--blk-file", image, "--socket-path", path, *arguments)


def test_mode_of_an_inherited_socket(image: Path) -> None:
    line = refused("--blk-file", image, "--fd", "0", "--socket-mode", "0660")
    assert line == "Error: --socket-mode and --socket-group are for the socket of --socket-path, not for --fd"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/socket", "nowhere does not exist; create it or choose another path"),
        ("x" * 120, "the path of a socket has at most 107 bytes; choose a shorter one"),
    ],
    ids=["missing folder", "long name"],
)
def test_invalid_socket_paths(image: Path, tmp_path: Path, name: str, words: str) -> None:
    assert words in refused("--blk-file", image, "--socket-path", tmp_path / name)


def test_inherited_listening_socket(serve: Callable[..., Served], path: Path) -> None:
    """It belongs to the parent, so its file stays."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        served = serve("--fd", str(listening.fileno()), at=None, pass_fds=[listening.fileno()])
    assert served.lines[-1] == "listening on an inherited socket"
    for _ in range(2):
        with attach(path) as driver:
            driver.read(0, 512)
    assert served.end()[0] == 0
    assert path.exists()


def test_inherited_connection_is_served_until_the_front_end_disconnects(serve: Callable[..., Served]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        served = serve("--fd", str(theirs.fileno()), at=None, pass_fds=[theirs.fileno()])
    assert served.process.poll() is None
    ours.close()
    status, _, err = served.finish()
    assert status == 0
    assert "Traceback" not in err


def test_inherited_connection_ends_with_a_signal(serve: Callable[..., Served]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        served = serve("--fd", str(theirs.fileno()), at=None, pass_fds=[theirs.fileno()])
        status, _, err = served.end()
    assert status == 0
    assert "Traceback" not in err


@pytest.mark.parametrize("fd", ["0", "77", "-1", "99999999999"])
def test_fd_that_is_not_a_socket_is_rejected(image: Path, fd: str) -> None:
    assert fd in refused("--blk-file", image, "--fd", fd, stdin=subprocess.DEVNULL)


def test_neither_or_both_of_socket_path_and_fd(image: Path, path: Path) -> None:
    assert "--fd" in refused("--blk-file", image)
    assert "--fd" in refused("--blk-file", image, "--fd", "3", "--socket-path", path)


def test_neither_image_nor_configuration(path: Path) -> None:
    line = refused("--socket-path", path)
    assert "--blk-file" in line
    assert "--config" in line


# Sharing an image


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ([], [], False),
        ([], ["--read-only"], False),
        (["--read-only"], [], False),
        (["--share-rw"], [], False),
        ([], ["--share-rw"], False),
        (["--read-only"], ["--read-only"], True),
        (["--share-rw"], ["--share-rw"], True),
    ],
)
def test_second_process_with_the_same_image(
    serve: Callable[..., Served], path: Path, image: Path, first: list[str], second: list[str], allowed: bool
) -> None:
    serve(*first)
    other = path.with_name("socket-2")
    if not allowed:
        assert "is in use already" in refused("--blk-file", image, "--socket-path", other, *second)
        assert not other.exists()
        return
    serve(*second, at=other)
    with attach(path) as one, attach(other) as two:
        assert one.read(0, 512) == two.read(0, 512)


# Images


def test_create(serve: Callable[..., Served], path: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    serve("--create", "3M", disk=new)
    assert new.stat().st_size == 3 << 20
    with attach(path) as driver:
        assert driver.capacity == 3 << 20


@pytest.mark.parametrize("size", ["3M", "1M"], ids=["as long", "of another size"])
def test_existing_image_is_served_unchanged(
    serve: Callable[..., Served], tmp_path: Path, path: Path, size: str
) -> None:
    """The same command line is for the first start and for all later ones."""
    new = tmp_path / "new"
    first = serve("--create", "3M", disk=new)
    with attach(path) as driver:
        driver.write(0, b"precious" * 64)
        driver.flush()
    assert f"INFO: {new}: created" in first.end()[2]
    second = serve("--create", size, disk=new)
    with attach(path) as driver:
        assert driver.read(0, 512) == b"precious" * 64
        assert driver.capacity == 3 << 20
    errors = second.end()[2]
    assert "created" not in errors
    assert ("exists with 3145728 bytes, not the 1048576 of create" in errors) == (size == "1M")


def test_the_hint_can_be_pasted(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Into a shell, whose words QEMU splits at single commas."""
    folder = tmp_path / "a b"
    folder.mkdir()
    served = serve(at=folder / "c,d.sock")
    _, out, _ = served.end()
    hint = out[out.index("attach QEMU with:\n") :].partition("\n")[2]
    assert f"socket,id=ringplane0,path={folder}/c,,d.sock" in shlex.split(hint)
    assert "memory-backend-memfd,id=mem,size=2G,share=on" in shlex.split(hint)


def test_names_that_are_not_text(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Linux has file names of any bytes; the log has one line about each event all the same."""
    image, path = (tmp_path / os.fsdecode(name) for name in (b"\xff\n.img", b"\xfe.sock"))
    served = serve("--create", "1M", disk=image, at=path)
    with attach(path) as driver:
        assert driver.serial().startswith("ringplane-")
    status, _, errors = served.end()
    assert status == 0
    assert all("ringplane: INFO: " in line for line in errors.splitlines())
    missing = refused("--blk-file", tmp_path / os.fsdecode(b"\xfd"), "--socket-path", path)
    assert "no such file" in missing


def test_nothing_is_created_over_a_link(image: Path, path: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image.with_name("nothing"))
    line = refused("--blk-file", link, "--socket-path", path, "--create", "1M")
    assert line == f"Error: {link}: is a symbolic link whose target does not exist; nothing is created over it"
    assert not image.with_name("nothing").exists()


@pytest.mark.parametrize(
    ("extra", "size"),
    [
        (["--socket-path", "/nowhere/socket"], "1M"),
        (["--fd", "77"], "1M"),
        (["--socket-path", "/tmp"], "1M"),
        (["--socket-path", "unused", "--block-size", "4096"], "512"),
        (["--socket-path", "unused"], "9000000T"),
        (["--socket-path", "unused"], "99999999999T"),
    ],
    ids=["socket folder", "fd", "no socket", "block size", "too large", "much too large"],
)
def test_create_leaves_nothing_behind_when_a_later_step_fails(tmp_path: Path, extra: list[str], size: str) -> None:
    new = tmp_path / "new"
    refused("--blk-file", new, "--create", size, *extra, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["", "0", "-1M", "1X", "M", "1.9e999", "nan.", "1..5G"])
def test_invalid_sizes_are_rejected(tmp_path: Path, size: str) -> None:
    refused("--blk-file", tmp_path / "new", "--socket-path", tmp_path / "socket", "--create", size)
    assert list(tmp_path.iterdir()) == []


def test_image_that_cannot_be_served(tmp_path: Path, path: Path) -> None:
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.touch()
    odd.write_bytes(bytes(1000))
    for file, words in (
        (empty, "is empty"),
        (odd, "truncate -s +24 "),
        (tmp_path, "neither a regular file nor a block device"),
        (tmp_path / "missing", "no such file"),
        (Path("/dev/null"), "neither a regular file nor a block device"),
    ):
        line = refused("--blk-file", file, "--socket-path", path, "--log-level", "error")
        assert str(file) in line
        assert words in line
    assert "not a multiple of the block size 4096" in refused(
        "--blk-file", odd, "--socket-path", path, "--block-size", "4096"
    )
    assert "neither" in refused("--blk-file", tmp_path, "--socket-path", path, "--read-only")
    assert not path.exists()


# Options


def test_read_only(serve: Callable[..., Served], path: Path, image: Path) -> None:
    image.chmod(0o444)
    served = serve("--read-only")
    assert any("read-only" in line for line in served.lines)
    with attach(path) as driver:
        driver.read(0, 512)
        with pytest.raises(OSError, match="I/O error"):
            driver.write(0, b"z" * 512)
    assert served.end()[0] == 0
    assert image.read_bytes()[:512] == bytes(512)


def test_options_that_the_guest_sees(serve: Callable[..., Served], path: Path) -> None:
    serve("--block-size", "4096", "--serial", "ABC", "--num-queues", "3", "--io-threads", "2", "--buffered")
    with attach(path) as driver:
        assert (driver.block_size, int(driver.config["num_queues"]), driver.serial()) == (4096, 3, "ABC")
        driver.write(4096, bytes(4096))


def test_buffered_is_announced(serve: Callable[..., Served]) -> None:
    assert any("buffered" in line for line in serve("--buffered").lines)


def announced(served: Served) -> str:
    """The part of the start-up message that describes how the disk is served."""
    line = next(line for line in served.lines if line.startswith("serving "))
    return line.split("iB, ")[1]


@pytest.fixture
def image_in_memory() -> Iterator[Path]:
    """An image on tmpfs."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="ringplane-test-", dir=folder) as name:
        path = Path(name, "image")
        path.touch()
        os.truncate(path, IMAGE_SIZE)
        if not served_from_memory(path):
            pytest.skip("/dev/shm is not a tmpfs")
        yield path


def served_from_memory(path: Path) -> bool:
    with open(path) as file:
        return is_memory(file.fileno())


@pytest.mark.parametrize("engine", ["auto", "memory"])
def test_image_in_memory_is_announced(
    serve: Callable[..., Served], path: Path, image_in_memory: Path, engine: str
) -> None:
    served = serve("--engine", engine, "--num-queues", "2", disk=image_in_memory)
    assert announced(served) == "engine memory, 2 queues)"
    assert not any("page cache" in line for line in served.lines)
    with attach(path) as driver:
        driver.write(512, b"m" * 512)
    assert served.end()[0] == 0
    assert image_in_memory.read_bytes()[512:1024] == b"m" * 512


def test_read_only_image_in_memory(serve: Callable[..., Served], image_in_memory: Path) -> None:
    assert announced(serve("--read-only", "--num-queues", "1", disk=image_in_memory)) == (
        "engine memory, read-only, 1 queue)"
    )


@pytest.mark.parametrize("engine", ["aio", "io_uring"])
def test_kernel_engine_is_announced(
    serve: Callable[..., Served], path: Path, image: Path, image_in_memory: Path, engine: str
) -> None:
    need_engine(engine)
    assert announced(serve("--engine", engine, "--buffered")).startswith(f"engine {engine}, buffered, ")
    other = path.with_name("other")
    assert announced(serve("--engine", engine, disk=image_in_memory, at=other)).startswith(f"engine {engine}, ")
    with attach(path) as driver, attach(other) as in_memory:
        for each in (driver, in_memory):
            each.write(0, b"e" * 512)
            assert each.read(0, 512) == b"e" * 512


def test_engine_null_reads_and_writes_nothing(serve: Callable[..., Served], path: Path, image: Path) -> None:
    image.write_bytes(b"n" * IMAGE_SIZE)
    served = serve("--engine", "null", "--num-queues", "1")
    assert announced(served) == "engine null: nothing is read or written, 1 queue)"
    with attach(path) as driver:
        driver.write(0, b"x" * 8192)
        driver.flush()
        driver.read(0, 8192)
        result = run_load(driver, Load(depth=32, read_percent=50, requests=20_000))
    assert (result.requests, result.errors, result.wrong_lengths) == (20_000, 0, 0)
    assert served.end()[0] == 0
    assert image.read_bytes() == b"n" * IMAGE_SIZE


def test_engine_memory_is_not_for_every_image(image: Path, path: Path) -> None:
    if served_from_memory(image):
        pytest.skip("the temporary folder is a tmpfs")
    line = refused("--blk-file", image, "--socket-path", path, "--engine", "memory")
    assert (
        line
        == f"Error: {image}: engine memory serves only images on tmpfs and hugetlbfs; use --engine auto for this image"
    )
    assert not path.exists()
    new = image.with_name("new")
    refused("--blk-file", new, "--create", "1M", "--socket-path", path, "--engine", "memory")
    assert not new.exists()


def test_engine_memory_of_a_file_is_not_for_every_image(config: Path) -> None:
    if served_from_memory(config):
        pytest.skip("the temporary folder is a tmpfs")
    config.write_text(f'{DISKS}engine = "memory"')
    assert f"{config.with_name('b.img')}: engine memory serves only images" in refused("--config", config)
    assert [path.name for path in config.parent.iterdir()] == ["disks.toml"]


def test_the_compiler_is_not_kept_in_memory(serve: Callable[..., Served]) -> None:
    """LLVM's code, some 50 MB, is only needed to load the data plane."""
    served = serve("--num-queues", "1")
    resident, mappings, code = 0, 0, False
    for line in Path(f"/proc/{served.process.pid}/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            resident += int(line.split()[1]) if code and line.startswith("Rss:") else 0
        else:
            code = line.endswith("libllvmlite.so") and " r-xp " in line
            mappings += code
    assert mappings
    assert resident < 5 << 10
    assert served.end()[0] == 0


def test_a_start_with_saved_code_does_not_import_numba(serve: Callable[..., Served]) -> None:
    """It takes a fifth of a second, and 23 MB. Its extension modules are mapped when it is imported."""
    # A first start may compile units that are missing, which the second one finds.
    for _ in range(2):
        served = serve("--num-queues", "1")
        mapped = Path(f"/proc/{served.process.pid}/maps").read_text()
        assert served.end()[0] == 0
    assert "/numpy/" in mapped
    assert "/numba/" not in mapped


@pytest.mark.parametrize(
    ("poll_us", "engine"), [("0", "auto"), ("1000000", "aio"), ("always", "aio"), ("always", "auto")]
)
def test_poll_us(serve: Callable[..., Served], path: Path, poll_us: str, engine: str) -> None:
    served = serve("--poll-us", poll_us, "--engine", engine, "--num-queues", "2")
    with attach(path) as driver:
        driver.write(0, b"p" * 512)
        if poll_us != "1000000":
            wait_until(lambda: ("R" in states_of_threads(served.process.pid)) == (poll_us == "always"))
        assert driver.read(0, 512) == b"p" * 512
    status, _, err = served.end()
    assert (status, "Traceback" in err) == (0, False)


@pytest.mark.parametrize("poll_us", ["-1", "", "x", "1000001", "1.5", "Always", "50us", "9" * 5000])
def test_invalid_poll_us(image: Path, path: Path, poll_us: str) -> None:
    done = CliRunner().invoke(
        serve_command, ["--blk-file", str(image), "--socket-path", str(path), f"--poll-us={poll_us}"]
    )
    assert done.exit_code == 2
    assert "Error: Invalid value for '--poll-us': " in done.output
    if len(poll_us) < 10:
        assert f"{poll_us!r} is neither a number of microseconds from 0 to 1000000 nor always" in done.output


@pytest.mark.parametrize("engine", ["", "uring", "MEMORY", "auto,aio"])
def test_unknown_engine(image: Path, path: Path, engine: str) -> None:
    done = CliRunner().invoke(
        serve_command, ["--blk-file", str(image), "--socket-path", str(path), f"--engine={engine}"]
    )
    assert done.exit_code == 2
    assert "is not one of 'auto', 'io_uring', 'aio', 'memory', 'null'" in done.output


def test_engine_options_match_the_engines() -> None:
    assert (AUTO, *WORKER_ENGINES) == THREAD_ENGINES
    assert all(name == engine.name for name, engine in WORKER_ENGINES.items())


def test_serial_that_does_not_fit(image: Path, path: Path) -> None:
    assert "20" in refused("--blk-file", image, "--socket-path", path, "--serial", "x" * 21)
    assert "20" in refused("--blk-file", image, "--socket-path", path, "--serial", "\u00e4" * 11)


def test_serial_that_is_not_text(image: Path, path: Path) -> None:
    refused("--blk-file", image, "--socket-path", path, "--serial", os.fsdecode(b"\xff"))


@pytest.mark.parametrize(
    "wrong", [["--num-queues", "0"], ["--num-queues", "65"], ["--io-threads", "0"], ["--block-size", "1024"], ["extra"]]
)
def test_option_out_of_its_range(image: Path, path: Path, wrong: list[str]) -> None:
    refused("--blk-file", image, "--socket-path", path, *wrong)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["1000"], "--physical-block-size: a physical block size of 1000: it must be a power of two from 512 to 65536"),
        (
            ["128K"],
            "--physical-block-size: a physical block size of 131072: it must be a power of two from 512 to 65536",
        ),
        (
            ["512", "--block-size", "4096"],
            "a physical block size of 512: it must not be less than the block size, 4096",
        ),
        (["0"], "'0' is not a positive size"),
        (["-4096"], "'-4096' is not a positive size"),
        (["big"], "'big' is not a size"),
    ],
)
def test_invalid_physical_block_size(image: Path, path: Path, options: list[str], why: str) -> None:
    assert why in refused("--blk-file", image, "--socket-path", path, "--physical-block-size", *options)


@pytest.mark.parametrize(("size", "exponent"), [("512", 0), ("4K", 3), ("16384", 5), ("64K", 7)])
def test_physical_block_size(serve: Callable[..., Served], path: Path, size: str, exponent: int) -> None:
    serve("--physical-block-size", size)
    with attach(path) as driver:
        assert driver.block_size == 512
        assert driver.config["physical_block_exp"] == exponent
        assert driver.config["min_io_size"] == 1 << exponent
        assert driver.config["opt_io_size"] % (1 << exponent) == 0


def test_features_are_switched(serve: Callable[..., Served], path: Path) -> None:
    served = serve("--feature", "event-idx=off", "--feature", "in-order=on")
    with attach(path) as driver:
        offered = driver.front_end.get_features()
        assert not offered & VIRTIO_F_EVENT_IDX
        assert offered & VIRTIO_F_IN_ORDER
    served.end()


@pytest.mark.parametrize("wrong", ["packed", "packed=maybe", "pack=on", ""])
def test_feature_that_cannot_be_switched(image: Path, path: Path, wrong: str) -> None:
    assert "--feature" in refused("--blk-file", image, "--socket-path", path, "--feature", wrong)


def test_feature_that_the_storage_lacks(image: Path, path: Path) -> None:
    line = refused("--blk-file", image, "--socket-path", path, "--feature", "secure-erase=on")
    assert line.endswith("secure-erase cannot be offered, because the storage does not support it")


def test_trace_prints_each_request_up_to_the_last(serve: Callable[..., Served], path: Path) -> None:
    served = serve("--trace")
    with attach(path) as driver:
        driver.write(4096, bytes(512))
        driver.flush()
    _, _, err = served.end()
    lines = [line for line in err.splitlines() if " fetch " in line or " complete " in line]
    assert len(lines) == 4, err
    assert "write" in lines[0]
    assert "sector=8" in lines[0]
    assert "result=ok" in lines[1]


def test_log_level(serve: Callable[..., Served], path: Path) -> None:
    served = serve("--log-level", "debug")
    with attach(path) as driver:
        driver.read(0, 512)
    assert "SET_VRING_KICK" in served.end()[2]


# Affinity


def allowed_cpus(pid: int) -> list[str]:
    """The allowed CPUs of each thread, the main thread's first."""
    statuses = [task.joinpath("status").read_text() for task in sorted(Path(f"/proc/{pid}/task").iterdir())]
    return [status.split("\nCpus_allowed_list:")[1].split()[0] for status in statuses]


def test_cpus(serve: Callable[..., Served], path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    served = serve("--io-threads", "2", "--cpus", str(cpus[0]), "--cpus", str(cpus[-1]))
    with attach(path) as driver:
        driver.read(0, 512)
    of_threads = allowed_cpus(served.process.pid)
    assert {str(cpus[0]), str(cpus[-1])} <= set(of_threads[1:])
    assert of_threads[0] == format_cpus(cpus)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cpus", "65535"], "CPU 65535 is not available to this process, which may use"),
        (["--cpus", "x"], "'x' is not a list of CPUs; examples: 2, 2-3, 0,2-3"),
        (
            ["--io-threads", "3", "--cpus", "0", "--cpus", "0"],
            "--cpus is given 2 times; give it once, or once for each",
        ),
    ],
)
def test_invalid_cpus(image: Path, path: Path, arguments: list[str], words: str) -> None:
    assert words in refused("--blk-file", image, "--socket-path", path, *arguments)


# Several disks


DISKS = """
[[disk]]
image = "a.img"
socket-path = "a.sock"
create = "1M"
[[disk]]
image = "b.img"
socket-path = "b.sock"
create = "2M"
num-queues = 3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "disks.toml"
    path.write_text(DISKS)
    return path


@pytest.fixture
def serve_config() -> Iterator[Callable[..., Served]]:
    """Serve the disks of a configuration file."""
    with contextlib.ExitStack() as stack:

        def start(config: Path, *arguments: str, **options: object) -> Served:
            served = Served(["--config", str(config), *arguments], **options)
            stack.callback(served.errors.close)
            stack.callback(served.process.stdout.close)
            stack.callback(served.process.wait)
            stack.callback(served.process.kill)
            return served

        yield start


def test_disks_of_a_file(serve_config: Callable[..., Served], config: Path, tmp_path: Path) -> None:
    served = serve_config(config)
    with attach(tmp_path / "a.sock") as a, attach(tmp_path / "b.sock") as b:
        assert (a.capacity, b.capacity) == (1 << 20, 2 << 20)
        a.write(0, b"a" * 512)
        b.write(0, b"b" * 512)
        status, out, err = served.end()
    lines = [*served.lines, *out.splitlines()]
    assert [line for line in lines if line.startswith("listening on")] == [
        f"listening on {tmp_path / 'a.sock'}",
        f"listening on {tmp_path / 'b.sock'}",
    ]
    assert any(line.startswith(f"serving {tmp_path / 'b.img'} as b (2 MiB, ") and "3 queues" in line for line in lines)
    assert not any("QEMU" in line for line in lines)
    assert (status, "Traceback" in err) == (0, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "b.img", "disks.toml"]
    assert (tmp_path / "a.img").read_bytes()[:512] == b"a" * 512
    # Again: now the images exist.
    again = serve_config(config)
    with attach(tmp_path / "b.sock") as b:
        assert b.read(0, 512) == b"b" * 512
    assert again.end()[0] == 0


def test_example_of_the_documentation(serve_config: Callable[..., Served], tmp_path: Path) -> None:
    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("the example names CPUs 0 and 1, which this process may not use")
    lines = (REPOSITORY / "docs" / "config.md").read_text().splitlines()
    (tmp_path / "disks.toml").write_text("\n".join(line[4:] for line in lines if line.startswith("    ")))
    served = serve_config(Path("disks.toml"), cwd=tmp_path)
    with attach(tmp_path / "system.sock") as system, attach(tmp_path / "data.sock") as data:
        assert int(system.config["num_queues"]) == 4
        assert data.serial() == "data"
    assert served.end()[0] == 0


def test_one_disk_of_a_file_is_announced_with_a_hint(serve_config: Callable[..., Served], config: Path) -> None:
    config.write_text(DISKS[: DISKS.index("[[disk]]", 10)])
    served = serve_config(config)
    assert f"path={config.with_name('a.sock')}" in served.end()[1]


def test_trace_of_several_disks_names_them(serve_config: Callable[..., Served], config: Path, tmp_path: Path) -> None:
    served = serve_config(config, "--trace")
    for name in ("a.sock", "b.sock"):
        with attach(tmp_path / name) as driver:
            driver.read(0, 512)
    fetches = [line for line in served.end()[2].splitlines() if " fetch " in line]
    assert [line.split()[0] for line in fetches] == ["a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        ["--blk-file", "x"],
        ["--image", "x"],
        ["--socket-path", "x"],
        ["--socket-mode", "0600"],
        ["--socket-group", "0"],
        ["--fd", "0"],
        ["--read-only", "--serial", "x"],
        ["--create", "1M"],
        ["--num-queues", "4"],
        ["--io-threads", "1"],
        ["--cpus", "0-0"],
        ["--engine", "auto"],
        ["--poll-us", "50"],
        ["--pin-memory"],
        ["--buffered"],
        ["--share-rw"],
        ["--block-size", "512"],
    ],
    ids=lambda options: options[0],
)
def test_options_of_a_single_disk_beside_a_file(config: Path, options: list[str]) -> None:
    done = CliRunner().invoke(serve_command, ["--config", str(config), *options])
    assert done.exit_code == 2
    assert "cannot be given beside --config; write it into the file" in done.output
    assert [path.name for path in config.parent.iterdir()] == ["disks.toml"]


def test_options_beside_a_file_are_named(config: Path) -> None:
    line = refused("--config", config, "--buffered", "--serial", "x", "--trace", "--log-level", "info")
    assert line == "Error: --direct/--buffered, --serial cannot be given beside --config; write it into the file"


def test_wrong_file_is_rejected(config: Path) -> None:
    config.write_text(f"{DISKS}queues = 3")
    line = refused("--config", config)
    assert line == f'Error: {config}: [[disk]] 2 (b.img): unknown key "queues"; did you mean "num-queues"?'
    assert "No such file" in refused("--config", config.with_name("none"))
    assert [path.name for path in config.parent.iterdir()] == ["disks.toml"]


def test_disk_that_cannot_be_served_undoes_the_others(config: Path, tmp_path: Path) -> None:
    (tmp_path / "b.sock").touch()
    line = refused("--config", config)
    assert f"{tmp_path / 'b.sock'}: exists and is not a socket" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.sock", "disks.toml"]


# Management


@pytest.mark.parametrize("command", [SERVE, (str(SCRIPT),)], ids=["serve", "script"])
def test_print_capabilities(command: tuple[str, ...]) -> None:
    done = subprocess.run([*command, "--print-capabilities"], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_script_behaves_like_the_command(image: Path, path: Path) -> None:
    process = subprocess.Popen([SCRIPT, "--blk-file", image, "--socket-path", path], stdout=subprocess.DEVNULL)
    wait_until(path.is_socket)
    with attach(path) as driver:
        assert peer_pid(driver.front_end.sock) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 0


def test_descriptor_for_management_software() -> None:
    """QEMU's docs/interop/vhost-user.json, VhostUserBackend."""
    descriptor = json.loads((REPOSITORY / "share" / "50-ringplane.json").read_text())
    assert descriptor["type"] == "block"
    assert descriptor["description"]
    assert Path(descriptor["binary"]).is_absolute()
    assert Path(descriptor["binary"]).name == SCRIPT.name
    assert set(descriptor) <= {"type", "description", "binary", "tags"}


# Without a usable cache folder


def test_cache_folder_that_is_a_file_still_works(serve: Callable[..., Served], path: Path, tmp_path: Path) -> None:
    """Not even root can write there; the code is compiled into a temporary folder, which is removed afterwards."""
    blocked, temporary = tmp_path / "file", tmp_path / "tmp"
    blocked.touch()
    temporary.mkdir()
    served = serve(env={**os.environ, "RINGPLANE_CACHE_DIR": str(blocked), "TMPDIR": str(temporary)})
    with attach(path) as driver:
        driver.read(0, 512)
    status, _, log = served.end()
    assert status == 0
    assert "compiling the data plane" in log
    assert list(temporary.iterdir()) == []


def test_without_home_it_works(serve: Callable[..., Served], path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    serve(env=environment)
    with attach(path) as driver:
        driver.read(0, 512)


# Where this process may open few files


def limited(files: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


@pytest.mark.parametrize("files", [8, 12, 20, FEWEST_FILES - 1])
def test_too_few_files(image: Path, path: Path, files: int) -> None:
    line = refused("--blk-file", image, "--socket-path", path, preexec_fn=limited(files))
    expected = f"this process may open only {files} files; raise the limit (ulimit -n, systemd's LimitNOFILE=)"
    assert line == f"Error: {expected}"
    assert not path.exists()


def test_as_few_files_as_advised(image: Path, path: Path, serve: Callable[..., Served]) -> None:
    serve(preexec_fn=limited(FEWEST_FILES))
    with attach(path) as driver:
        driver.write(0, b"x" * 512)
        driver.flush()
        assert driver.read(0, 512) == b"x" * 512
