"""Back end processes: ringplane and qemu-storage-daemon, started on an image, ended, and why one did not start."""

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

QSD_AIO = ("native", "io_uring", "threads")
# A first start of ringplane compiles the data plane.
START_DEADLINE = 120.0
# What ringplane says then.
READY = "listening on"
STOP_DEADLINE = 20.0


def ringplane(flags: str = "") -> Subject:
    """ringplane with more flags of `ringplane serve`, as they are typed; raises BenchError."""
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise BenchError(f"--ringplane {flags!r}: {error}") from None
    return Subject(" ".join((RINGPLANE, *words)), RINGPLANE, words)


def qemu_storage_daemon(aio: str, iothread: bool = False) -> Subject:
    """qemu-storage-daemon with `aio`, its export in the main loop or in an iothread (which polls up to 32 us)."""
    return Subject(f"{QSD} {aio}{' iothread' if iothread else ''}", QSD, (aio, *(["iothread"] if iothread else [])))


def keeps_data(subject: Subject) -> bool:
    """Whether what was written can be read again; the engine `null` does no I/O at all."""
    return subject.option("--engine") != "null"


def command(subject: Subject, image: Path, socket: Path, queues: int, shared: bool) -> list[str]:
    """The command line of a back end with `queues` queues; `shared`: others have the image open too."""
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
    """A back end that listens at `socket`; what it says goes to `log`."""

    subject: Subject
    image: Path
    socket: Path
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        """The last line that it said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"


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
    """Start a back end, wait until it listens, and end it afterwards. Socket and log lie in `folder`.

    `cpus` are those that it may use; all of this process's if empty. `pulse` is called while it starts. Raises
    BenchError with its last line when it does not start.
    """
    if subject.family == QSD and not shutil.which(QSD):
        raise BenchError(f"{QSD} is not installed (Debian package qemu-utils)")
    number = len(list(folder.glob("*.log")))
    socket, log = folder / f"{number}.sock", folder / f"{number}.log"
    words = command(subject, image, socket, queues, shared)
    with log.open("wb") as output, pinned(cpus):
        # In a session of its own: a Ctrl-C is for the bench, which ends its back ends in order.
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    backend = Running(subject, image, socket, process, log)
    try:
        _wait_for_socket(backend, pulse)
        yield backend
    finally:
        _end(process)
        socket.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


@contextlib.contextmanager
def pinned(cpus: Collection[int]) -> Iterator[None]:
    """Let this thread, and so the processes that it starts meanwhile, use only some CPUs; raises BenchError."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus or before)
    except OSError as error:
        raise BenchError(f"CPUs {sorted(cpus)} cannot be used: {error.strerror}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait_for_socket(backend: Running, pulse: Callable[[], None]) -> None:
    # A connection as a probe would be the first front end that the back end sees.
    deadline = time.monotonic() + START_DEADLINE
    while not _listens(backend):
        if backend.process.poll() is not None:
            raise BenchError(f"{backend.subject.name} did not start: {backend.last_words()}")
        if time.monotonic() > deadline:
            raise BenchError(f"{backend.subject.name} did not listen in {START_DEADLINE:.0f} s: {backend.last_words()}")
        pulse()
        time.sleep(0.01)


def _listens(backend: Running) -> bool:
    # The socket of a first start of ringplane is there while the data plane is compiled still.
    told = backend.subject.family != RINGPLANE or READY in backend.log.read_text(errors="replace")
    return told and backend.socket.is_socket()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
