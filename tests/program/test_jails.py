"""`ringplane serve` in jails: without /proc and /dev, without a writable folder, with system calls refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ringplane
from ringplane.block.image import Image, ImageError
from ringplane.driver import Driver
from ringplane.options.image_options import ImageOptions
from ringplane.system import eventfd as eventfds
from ringplane.system import procfs

from .counting import compiled, counting

IMAGE_SIZE = MEMORY_SIZE = 16 << 20
SOON = 240.0
SERVE = [sys.executable, "-m", "ringplane", "serve"]
JAIL = [sys.executable, str(Path(__file__).with_name("jail.py"))]
NO_LOCKS = f"fcntl:{fcntl.F_OFD_SETLK}=ENOLCK"

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make these jails")


class Served:
    """A process that serves an image at `socket` in the jail of `prefix`; `status` is set if it failed to start."""

    def __init__(self, prefix: Sequence[str], image: Path, *arguments: str, environment: dict[str, str] | None) -> None:
        self.socket = image.with_name("socket")
        where = ["--blk-file", str(image), "--socket-path", str(self.socket)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when the object goes)
        self.process = subprocess.Popen(
            [*prefix, *SERVE, *where, *arguments],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        assert self.process.stdout
        self.status: int | None = None
        while not (line := self.process.stdout.readline()).startswith("listening on "):
            if not line:
                self.status = self.process.wait(SOON)
                break

    @property
    def errors(self) -> list[str]:
        self._errors.seek(0)
        return self._errors.read().splitlines()

    def exercise(self, queues: int = 2) -> None:
        """Write, flush and read on some queues, then stop."""
        assert self.status is None, self.errors
        with Driver(self.socket, queues, memory_size=MEMORY_SIZE) as driver:
            for queue in range(queues):
                driver.write(4096 * queue, bytes([queue + 1]) * 4096, queue=queue)
                driver.flush(queue=queue)
                driver.discard(1 << 20, 4096)
                assert driver.read(4096 * queue, 4096, queue=queue) == bytes([queue + 1]) * 4096
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SOON) == 0, self.errors
        assert not self.socket.exists()

    def refusal(self) -> str:
        """The one-line error of a process that failed to start."""
        assert self.status == 1, self.errors
        # The first start after an installation reports that it compiles.
        (line,) = (line for line in self.errors if " INFO: " not in line)
        assert line.startswith("Error: ")
        return line

    def warnings(self) -> list[str]:
        return [line for line in self.errors if "WARNING" in line]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self._errors.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(image: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(
            prefix: Sequence[str], *arguments: str, disk: Path = image, environment: dict[str, str] | None = None
        ) -> Served:
            served = Served(prefix, disk, *arguments, environment=environment)
            stack.callback(served.close)
            return served

        yield start


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, IMAGE_SIZE)
    return path


@pytest.fixture
def image_in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "image")
        path.touch()
        os.truncate(path, IMAGE_SIZE)
        yield path


def in_namespace(*commands: str) -> list[str]:
    """A prefix that runs these shell commands first, in a new mount namespace."""
    # /proc may be mounted several times over each other.
    return ["unshare", "--mount", "bash", "-euc", "; ".join([*commands, 'exec "$@"']), "jail"]


WITHOUT_PROC = "while [ -e /proc/self ]; do umount -l /proc; done"
WITHOUT_SYS = "while [ -e /sys/block ]; do umount -l /sys; done"
WITHOUT_DEV = "mount -t tmpfs -o size=64k tmpfs /dev"


# Without /proc, /sys, /dev


@needs_root
@pytest.mark.parametrize("options", [["--engine", "io_uring"], ["--engine", "aio"]])
def test_without_proc_disks_are_served_with_one_warning(serve: Serve, options: list[str]) -> None:
    """Through the page cache each I/O thread has its own open file of the image."""
    served = serve(in_namespace(WITHOUT_PROC), "--buffered", "--io-threads", "2", "--sandbox", *options)
    served.exercise()
    (warning,) = served.warnings()
    assert " WARNING: /proc is not mounted: " in warning


@needs_root
def test_without_sys_and_dev_disks_are_served_without_a_warning(serve: Serve) -> None:
    served = serve(in_namespace(WITHOUT_SYS, WITHOUT_DEV))
    served.exercise()
    assert served.warnings() == []


@needs_root
def test_several_disks_on_a_thread_without_dev(serve: Serve, tmp_path: Path) -> None:
    """The thread signals front ends with the help of an empty file, which is /dev/null if that exists."""
    config = tmp_path / "disks.toml"
    disk = '[[disk]]\nimage = "{0}.img"\nsocket-path = "{0}.sock"\ncreate = "1M"\n'
    config.write_text(disk.format("a") + disk.format("b"))
    command = [*in_namespace(WITHOUT_DEV), *SERVE, "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        for _ in range(2):
            while not (line := process.stdout.readline()).startswith("listening on "):
                assert line, process.stderr.read()
        with Driver(tmp_path / "b.sock", memory_size=MEMORY_SIZE) as driver:
            driver.write(0, b"b" * 512)
        process.terminate()
        assert "WARNING" not in process.stderr.read()


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(procfs, "SELF", tmp_path / "no proc")
    monkeypatch.setattr(procfs, "BOOT_ID", tmp_path / "no proc")


def test_an_image_that_was_replaced_is_not_opened_again_by_its_path(image: Path, without_proc: None) -> None:
    with contextlib.closing(Image(image, ImageOptions(direct=False))) as opened:
        assert os.path.sameopenfile(opened.open_again(), opened.fd)
        image.rename(image.with_name("moved"))
        image.write_bytes(bytes(IMAGE_SIZE))
        with pytest.raises(ImageError, match=r"is another file now.* mount /proc, or give the disk one I/O thread"):
            opened.open_again()
        # The advice helps.
        image.unlink()
        with pytest.raises(ImageError, match="cannot be opened again for another thread: No such file"):
            opened.open_again()
    image.with_name("moved").rename(image)
    with ringplane.serve(image, image.with_name("socket"), direct=False, io_threads=1):
        pass


def test_an_image_that_was_replaced_is_opened_again_with_proc(image: Path) -> None:
    with contextlib.closing(Image(image, ImageOptions(direct=False))) as opened:
        image.unlink()
        image.write_bytes(bytes(IMAGE_SIZE))
        assert os.path.sameopenfile(opened.open_again(), opened.fd)


def test_only_eventfds_are_eventfds_without_proc(without_proc: None, image: Path) -> None:
    eventfd = os.eventfd(0)
    eventfds.check_eventfd(eventfd, "kick fd")
    with open(image) as file:
        for fd in (*os.pipe(), file.fileno()):
            with pytest.raises(OSError, match="the kick fd is not an eventfd"):
                eventfds.check_eventfd(fd, "kick fd")
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
    os.close(eventfd)


def test_values_from_proc_are_empty_without_it(without_proc: None) -> None:
    found = (list(procfs.mappings()), procfs.other_threads(), procfs.boot_id(), procfs.kind_of(0))
    assert found == ([], 0, b"", "")


# Unavailable locks


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EPERM", "EIO"])
def test_a_writable_image_without_locks_is_refused_and_served_with_lock_off(serve: Serve, code: str) -> None:
    jail = [*JAIL, f"fcntl:{fcntl.F_OFD_SETLK}={code}"]
    line = serve(jail).refusal()
    assert "/image: cannot be locked (fcntl(2), F_OFD_SETLK: " in line
    assert line.endswith("; --lock off serves it without a lock: then take care that nothing else writes to it")
    # The advice helps.
    served = serve(jail, "--lock", "off")
    served.exercise()
    assert served.warnings() == []


def test_a_read_only_image_without_locks_is_served_with_one_line(serve: Serve) -> None:
    served = serve([*JAIL, NO_LOCKS], "--read-only")
    assert served.status is None
    lines = [line for line in served.errors if "lock" in line]
    assert len(lines) == 1
    assert lines[0].endswith(
        "cannot be locked (fcntl(2), F_OFD_SETLK: No locks available): "
        "it is served read-only without a lock; nothing may write to it meanwhile"
    )


def test_lock_on_needs_a_lock_for_read_only_images_too(serve: Serve) -> None:
    assert "cannot be locked" in serve([*JAIL, NO_LOCKS], "--read-only", "--lock", "on").refusal()


@pytest.mark.parametrize(("lock", "excludes"), [("auto", True), ("on", True), ("off", False)])
def test_opens_that_are_locked_out(image: Path, lock: str, excludes: bool) -> None:
    with contextlib.closing(Image(image, ImageOptions(lock=lock))):
        if excludes:
            with pytest.raises(ImageError, match="is in use already"):
                Image(image)
        else:
            Image(image).close()
    with contextlib.closing(Image(image)):
        if excludes:
            with pytest.raises(ImageError, match="is in use already"):
                Image(image, ImageOptions(lock=lock))
        else:
            Image(image, ImageOptions(lock=lock)).close()


def test_a_write_lock_of_another_program_excludes_ringplane(image: Path) -> None:
    """For example lockf(3); QEMU uses only read locks."""
    program = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{program}; print('locked', flush=True); sys.stdin.read()", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ImageError, match="is in use already"):
            Image(image)
        other.communicate()
    Image(image).close()


def test_a_lock_that_does_not_exist(image: Path) -> None:
    with pytest.raises(ValueError, match='lock: "maybe" is not one of "auto", "on", "off"'):
        ringplane.serve(image, image.with_name("socket"), lock="maybe")


# Forbidden engines


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
def test_no_engine_for_a_file(serve: Serve, code: str) -> None:
    line = serve([*JAIL, f"io_uring_setup={code},io_setup={code}"]).refusal()
    why = {"EPERM": "Operation not permitted", "ENOSYS": "Function not implemented"}[code]
    assert "/image: no engine for files and devices here, only for images on tmpfs: " in line
    assert f"io_uring is unavailable (io_uring_setup(2): {why}): " in line
    assert f"Linux AIO is unavailable (io_setup(2): {why}): " in line
    assert line.count("seccomp profile") == 2


def test_without_an_engine_images_in_memory_are_served(serve: Serve, image_in_memory: Path) -> None:
    """The I/O thread copies the data itself, and only needs epoll to sleep."""
    served = serve([*JAIL, "io_uring_setup=EPERM,io_setup=EPERM"], disk=image_in_memory)
    served.exercise()
    assert served.warnings() == []


def test_without_io_uring_aio_is_used_and_one_line_says_why(serve: Serve) -> None:
    served = serve([*JAIL, "io_uring_setup=EPERM"])
    served.exercise()
    assert sum("using Linux AIO: io_uring is unavailable (io_uring_setup(2): " in line for line in served.errors) == 1


@pytest.mark.parametrize(
    ("engine", "call"), [("io_uring", "io_uring_setup"), ("aio", "io_setup"), ("io_uring", "io_uring_register")]
)
def test_a_requested_engine_that_is_forbidden(serve: Serve, image: Path, engine: str, call: str) -> None:
    line = serve([*JAIL, f"{call}=EPERM"], "--engine", engine).refusal()
    assert f"is unavailable ({call}(2)" in line
    assert "Operation not permitted): it is forbidden; allow it " in line
    assert not image.with_name("socket").exists()


# Without a home or a writable folder


@pytest.fixture
def folder_of_somebody() -> Iterator[Path]:
    """A folder of another user, with an image. It is not below pytest's folders, which only root can access."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image")
        image.touch()
        os.truncate(image, IMAGE_SIZE)
        for path in (folder, image):
            os.chown(path, 54321, 54321)
        yield Path(folder)


def without_anything(folder: Path) -> list[str]:
    """A prefix: a uid that is not in passwd(5), a system that is read-only except this folder."""
    everything_read_only = (
        "mount -t tmpfs -o mode=755 tmpfs /dev/shm",
        "for place in / /tmp /var /var/tmp /home /root /run; do "
        "mountpoint -q $place || mount --bind $place $place; mount -o remount,bind,ro $place; done",
        f"mount --bind {folder} {folder}",
        f"mount -o remount,bind,rw {folder}",
    )
    # It may read everything, because Python may be installed in a home directory.
    somebody = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    somebody += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    return [*in_namespace(*everything_read_only), *somebody]


@needs_root
def test_a_user_without_anything_is_served_without_a_cache(serve: Serve, folder_of_somebody: Path) -> None:
    """And without HOME."""
    environment = {"PATH": os.environ["PATH"]}
    served = serve(without_anything(folder_of_somebody), disk=folder_of_somebody / "image", environment=environment)
    served.exercise()
    (warning,) = served.warnings()
    assert " WARNING: compiling the data plane, which takes some 6 s of CPU time, at each start: " in warning
    assert warning.endswith("; set RINGPLANE_CACHE_DIR to a folder that this user can write to")


@needs_root
@pytest.mark.parametrize("options", [["--engine", "io_uring"], ["--engine", "aio"], ["--zoned", "1M"]], ids=str)
def test_a_user_without_anything_loads_what_root_has_compiled(
    serve: Serve, folder_of_somebody: Path, tmp_path: Path, options: list[str]
) -> None:
    """`ringplane compile --into FOLDER` was run when the system was built; nothing is compiled any more."""
    filled, image = tmp_path / "filled", folder_of_somebody / "image"
    subprocess.run([sys.executable, "-m", "ringplane", "compile", "--into", filled], check=True)
    if "--zoned" in options:
        image.unlink()
        options = [*options, "--create", "16M"]
    counted = counting(folder_of_somebody)
    os.chown(folder_of_somebody / "sitecustomize.py", 54321, 54321)
    environment = {"PATH": os.environ["PATH"], "RINGPLANE_CACHE_DIR": str(filled), **counted}
    served = serve(without_anything(folder_of_somebody), *options, disk=image, environment=environment)
    assert served.status is None, served.errors
    assert served.warnings() == []
    assert compiled(folder_of_somebody) == []


def test_an_unusable_cache_folder_is_logged_before_compiling(tmp_path: Path) -> None:
    """The warning of the whole command; other tests cover compiling."""
    program = (
        "import logging; logging.basicConfig()\n"
        "from ringplane.dataplane import compile_data_plane\n"
        "compile_data_plane.compile_apart = lambda *arguments: None\n"
        "compile_data_plane.warm_up()\n"
    )
    (tmp_path / "file").touch()
    environment = {**os.environ, "RINGPLANE_CACHE_DIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert f"RINGPLANE_CACHE_DIR={tmp_path}/file is not a folder; name one" in line
