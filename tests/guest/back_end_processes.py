"""Back end processes, ringplane or QEMU's own instead, started on an image and stopped like a service."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from unit.rig import listens

from . import kernels

# The control experiment: the same tests with QEMU's own back end instead of ringplane.
STAND_IN = os.environ.get("RINGPLANE_TEST_BACKEND") == "qemu-storage-daemon"
# A cold start compiles the data plane, which takes minutes if ten processes share two CPUs.
START_DEADLINE = 300.0
STOP_DEADLINE = 30.0


@dataclass
class Backend:
    """A running back end process."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path
    stopped: bool = field(default=False, init=False)

    def crash(self) -> None:
        """Kill it at any moment, and start it again at once."""
        self.check_alive()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = start(self.process.args, self.log)  # type: ignore[arg-type]

    def upgrade(self) -> None:
        """Start a new process that takes over from it; the old one must exit with status 0."""
        self.check_alive()
        old, arguments = self.process, list(self.process.args)  # type: ignore[arg-type]
        self.process = start([*arguments, *([] if "--upgrade" in arguments else ["--upgrade"])], self.log)
        assert old.wait(STOP_DEADLINE) == 0, self.logged()

    def stop(self) -> None:
        """Stop the back end like a service manager; it must have run until then, and exit with status 0."""
        self.stopped = True
        self.check_alive()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end in {STOP_DEADLINE:.0f} s after SIGTERM:\n{self.logged()}") from None
        assert status == 0, f"the back end ended with status {status}:\n{self.logged()}"

    def check_alive(self) -> None:
        status = self.process.poll()
        assert status is None, f"the back end ended by itself with status {status}:\n{self.logged()}"

    def kill(self) -> None:
        # Once it is reaped, its pid may belong to another process.
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def logged(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Disturbed:
    """A back end that is disturbed so often, at intervals, while its guest works; a `Guest` uses it like a `Backend`.

    The guest's load is workloads.fio_verify_until_enough: it ends when all has happened, however long that takes.
    """

    backend: Backend
    # Ends the load.
    say_enough: Callable[[], None]
    console: Path
    happens: Callable[[], None]
    most: int
    seconds_between: float
    times: int = 0
    last: float = field(default_factory=time.monotonic)

    @property
    def socket(self) -> Path:
        return self.backend.socket

    def check_alive(self) -> None:
        """Disturb the back end when it is time; called every 50 ms while the guest runs."""
        self.backend.check_alive()
        due = time.monotonic() - self.last > self.seconds_between
        if self.times < self.most and due and "fio begins" in self.console.read_text(errors="replace"):
            self.happens()
            self.times += 1
            self.last = time.monotonic()
            if self.times == self.most:
                self.say_enough()


class BackendFactory(Protocol):
    """The type of the fixture `backend`; 0 queues: the back end's default."""

    def __call__(
        self, image: Path | str, num_queues: int = 2, extra: Sequence[str] = (), *, read_only: bool = False
    ) -> Backend: ...


def ringplane(image: Path | str, socket: Path, num_queues: int, read_only: bool) -> list[str]:
    """`image`: a path or an address."""
    what = "--blk-file" if isinstance(image, Path) else "--image"
    return [
        *(sys.executable, "-m", "ringplane", "serve", what, str(image), "--socket-path", str(socket)),
        *(("--num-queues", str(num_queues)) if num_queues else ()),
        *(["--read-only"] if read_only else []),
    ]


def stand_in(image: Path | str, socket: Path, num_queues: int, read_only: bool) -> list[str]:
    """QEMU's own back end: if a test fails with it as well, the fault is not ringplane's."""
    program = kernels.program("qemu-storage-daemon", "qemu-utils")
    switch = "on" if read_only else "off"
    disk = f"driver=file,node-name=f,filename={image},cache.direct=on,aio=native,read-only={switch}"
    writable = "off" if read_only else "on"
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable={writable}"
    return [
        *(str(program), "--blockdev", disk, "--blockdev", f"driver=raw,node-name=d,file=f,read-only={switch}"),
        *("--export", f"{export},num-queues={num_queues or 64}"),
    ]


def environment() -> dict[str, str]:
    """An environment in which a child process imports the same ringplane as this test run."""
    found = importlib.util.find_spec("ringplane")
    if found is None or not found.submodule_search_locations:
        return dict(os.environ)
    source = str(Path(found.submodule_search_locations[0]).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}


def wait_for_socket(backend: Backend) -> None:
    """Wait until the back end listens."""
    end = time.monotonic() + START_DEADLINE
    while not listens(backend.socket):
        backend.check_alive()
        assert time.monotonic() < end, f"no socket after {START_DEADLINE:.0f} s:\n{backend.logged()}"
        time.sleep(0.02)


def launch(
    folder: Path, log: Path, image: Path | str, num_queues: int, extra: Sequence[str], read_only: bool
) -> Backend:
    """Start a back end with its socket in this folder; it may not listen yet."""
    socket = folder / f"{log.stem}.sock"
    make = stand_in if STAND_IN else ringplane
    return Backend(start([*make(image, socket, num_queues, read_only), *extra], log), socket, log)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
