"""Back end processes: starts and stops ringplane and qemu-storage-daemon, and reports why one did not start."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ringplane.bench import qsd
from ringplane.bench.errors import BenchError, never
from ringplane.bench.places import Place
from ringplane.bench.results import FIO, QSD, RINGPLANE, Subject
from ringplane.options.cpus import format_cpus
from ringplane.options.image_address import ImageAddress, RemoteImage
from ringplane.options.nbd_uri import NbdUri

# The first start of ringplane compiles the data plane.
START_DEADLINE = 120.0
# The line that ringplane prints when it is ready.
READY = "listening on"
STOP_DEADLINE = 20.0
# What qemu-storage-daemon puts before a message about an image, and says where its module for Ceph is missing.
QSD_OPTION = re.compile(rf"^{QSD}: --blockdev {{.*}}: ")
NO_DRIVER = "Unknown driver 'rbd'"


def ringplane(flags: str = "") -> Subject:
    """ringplane with more options of `ringplane serve`, written as on a command line; raises BenchError."""
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise BenchError(f"--ringplane {flags!r}: cannot be split into options: {error}") from None
    return Subject(" ".join((RINGPLANE, *words)), RINGPLANE, words)


def serves(subject: Subject, place: Place) -> bool:
    """Whether a subject is measured in a place."""
    if subject.family == QSD:
        return (qsd.REMOTE in subject.flags) == place.is_remote
    return subject.family != FIO or not place.is_remote


def require(subject: Subject) -> None:
    """Raise BenchError if the program is not installed."""
    if subject.family == QSD and not shutil.which(QSD):
        raise BenchError(f"{QSD} is not installed: apt install qemu-system-common, or use --against nothing")


def keeps_data(subject: Subject) -> bool:
    """Whether written data can be read again; the engine `null` does no I/O at all."""
    return subject.option("--engine") != "null"


def command(
    subject: Subject, image: ImageAddress, socket: Path, queues: int, *, shared: bool = False, read_only: bool = False
) -> list[str]:
    """The command line of a back end with `queues` queues; `shared`: other processes have the image open too.

    Raises BenchError.
    """
    if subject.family == QSD:
        return qsd.command(subject, image, socket, queues, shared=shared, read_only=read_only)
    serve = [sys.executable, "-m", "ringplane", "serve", *_image(image, shared), "--socket-path", str(socket)]
    read = ["--read-only"] if read_only else []
    return [*serve, "--num-queues", str(queues), "--log-level", "warning", *read, *subject.flags]


def _image(image: ImageAddress, shared: bool) -> list[str]:
    if isinstance(image, RemoteImage):
        return ["--image", image.address]
    return ["--blk-file", str(image), *(["--share-rw"] if shared else [])]


@dataclass(frozen=True, slots=True)
class Running:
    """A back end that listens at `socket`; its standard output and error are files."""

    subject: Subject
    image: ImageAddress
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
    image: ImageAddress,
    folder: Path,
    queues: int,
    *,
    shared: bool = False,
    read_only: bool = False,
    cpus: Collection[int] = (),
    pulse: Callable[[], None] = never,
) -> Iterator[Running]:
    """Start a back end, wait until it listens, and stop it afterwards. Its socket and output are in `folder`.

    `cpus` are the CPUs that it may use; empty: all CPUs of this process. `pulse` is called while it starts. Raises
    BenchError with its last line on standard error if it does not start.
    """
    number = len(list(folder.glob("*.out")))
    socket, output, errors = (folder / f"{number}.{kind}" for kind in ("sock", "out", "err"))
    words = command(subject, image, socket, queues, shared=shared, read_only=read_only)
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
            raise BenchError(f"{backend.subject.name} did not start: {_explained(backend.last_line()) or status}")
        if time.monotonic() > deadline:
            after = f"did not listen within {START_DEADLINE:.0f} s{_why_waiting(backend.image)}"
            raise BenchError(f"{backend.subject.name} {after}{ending(backend.last_line())}")
        pulse()
        time.sleep(0.01)


def _explained(line: str) -> str:
    """The last message of a back end without its own options, and with what to do if that is known."""
    line = QSD_OPTION.sub("", line)
    return f"{line}; apt install qemu-block-extra" if line.endswith(NO_DRIVER) else line


def _why_waiting(image: ImageAddress) -> str:
    """Why a back end may wait for a server."""
    if isinstance(image, NbdUri):
        return "; the server has to accept two clients at a time (qemu-nbd --shared=2)"
    return ""


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
