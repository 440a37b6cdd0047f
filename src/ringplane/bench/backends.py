"""Back end processes: starts and stops ringplane and qemu-storage-daemon, and reports why one did not start."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ringplane.bench.errors import BenchError, never
from ringplane.bench.results import QSD, RINGPLANE, Subject
from ringplane.options.cpus import format_cpus

QSD_AIO = ("native", "io_uring", "threads")
# The first start of ringplane compiles the data plane.
START_DEADLINE = 120.0
# The line that ringplane prints when it is ready.
READY = "listening on"
STOP_DEADLINE = 20.0


def ringplane(flags: str = "") -> Subject:
    """ringplane with more options of `ringplane serve`, written as on a command line; raises BenchError."""
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise BenchError(f"--ringplane {flags!r}: cannot be split into options: {error}") from None
    return Subject(" ".join((RINGPLANE, *words)), RINGPLANE, words)


def qemu_storage_daemon(aio: str, iothread: bool = False) -> Subject:
    """qemu-storage-daemon with `aio`, its export in the main loop or in an iothread (which polls up to 32 us)."""
    return Subject(f"{QSD} {aio}{' iothread' if iothread else ''}", QSD, (aio, *(["iothread"] if iothread else [])))


def require(subject: Subject) -> None:
    """Raise BenchError if the program is not installed."""
    if subject.family == QSD and not shutil.which(QSD):
        raise BenchError(f"{QSD} is not installed: apt install qemu-system-common, or use --against nothing")


def keeps_data(subject: Subject) -> bool:
    """Whether written data can be read again; the engine `null` does no I/O at all."""
    return subject.option("--engine") != "null"


def command(subject: Subject, image: Path, socket: Path, queues: int, shared: bool) -> list[str]:
    """The command line of a back end with `queues` queues; `shared`: other processes have the image open too."""
    if subject.family == RINGPLANE:
        serve = [sys.executable, "-m", "ringplane", "serve", "--blk-file", str(image), "--socket-path", str(socket)]
        share = ["--share-rw"] if shared else []
        return [*serve, "--num-queues", str(queues), "--log-level", "warning", *share, *subject.flags]
    kind = "host_device" if image.is_block_device() else "file"
    locking = ",locking=off" if shared else ""
    iothread = "iothread" in subject.flags
    return [
        QSD,
        *(["--object", "iothread,id=iothread"] if iothread else []),
        "--blockdev", f"driver={kind},node-name=file,filename={image},cache.direct=on,aio={subject.flags[0]}{locking}",
        "--blockdev", "driver=raw,node-name=disk,file=file",
        "--export", f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,"
        f"num-queues={queues}{',iothread=iothread' if iothread else ''}",
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Running:
    """A back end that listens at `socket`; its standard output and error are files."""

    subject: Subject
    image: Path
    socket: Path
    process: subprocess.Popen[bytes]
    output: Path
    errors: Path

    def last_line(self) -> str:
        """The last line on its standard error; empty if there is none."""
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip().removeprefix("Error: ") if lines else ""


@contextlib.contextmanager
def running(
    subject: Subject,
    image: Path,
    folder: Path,
    queues: int,
    *,
    shared: bool = False,
    cpus: Collection[int] = (),
    pulse: Callable[[], None] = never,
) -> Iterator[Running]:
    """Start a back end, wait until it listens, and stop it afterwards. Its socket and output are in `folder`.

    `cpus` are the CPUs that it may use; empty: all CPUs of this process. `pulse` is called while it starts. Raises
    BenchError with its last line on standard error if it does not start.
    """
    number = len(list(folder.glob("*.out")))
    socket, output, errors = (folder / f"{number}.{kind}" for kind in ("sock", "out", "err"))
    words = command(subject, image, socket, queues, shared)
    with output.open("wb") as out, errors.open("wb") as err, pinned(cpus):
        # It has its own session: Ctrl-C must signal only the bench, which stops its back ends in order.
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
    backend = Running(subject, image, socket, process, output, errors)
    try:
        _wait_for_socket(backend, pulse)
        yield backend
    finally:
        _end(process)
        for path in (socket, output, errors):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def pinned(cpus: Collection[int]) -> Iterator[None]:
    """Restrict this thread, and the processes that it starts meanwhile, to some CPUs; raises BenchError."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus or before)
    except OSError as error:
        raise BenchError(f"CPUs {format_cpus(cpus)} cannot be used: {error.strerror}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait_for_socket(backend: Running, pulse: Callable[[], None]) -> None:
    # A probe by connect(2) would be the first front end of the back end.
    deadline = time.monotonic() + START_DEADLINE
    while not _listens(backend):
        if backend.process.poll() is not None:
            status = f"exit status {backend.process.returncode}"
            raise BenchError(f"{backend.subject.name} did not start: {backend.last_line() or status}")
        if time.monotonic() > deadline:
            after = f"did not listen within {START_DEADLINE:.0f} s"
            raise BenchError(f"{backend.subject.name} {after}{ending(backend.last_line())}")
        pulse()
        time.sleep(0.01)


def _listens(backend: Running) -> bool:
    # ringplane's socket may exist before it can serve: the data plane is compiled first.
    ready = backend.subject.family != RINGPLANE or READY in backend.output.read_text(errors="replace")
    return ready and backend.socket.is_socket()


def ending(last_line: str) -> str:
    """The end of an error message about a back end."""
    return f"; its last message: {last_line}" if last_line else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
