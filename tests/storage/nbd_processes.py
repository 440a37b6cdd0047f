"""Real NBD servers: qemu-nbd and nbdkit, which a test can kill and start again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 60.0

EXPORT = "disk"
SIZE = 64 << 20


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: apt-get install {package}"
    return found


@dataclass
class NbdServer:
    """A server of this image at a socket in the folder of the image, or at a TCP port."""

    command: Callable[[NbdServer], Sequence[str]]
    image: Path
    port: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def connections(self) -> int:
        """Of a disk with two I/O threads."""
        return 1 if self.command is qemu_nbd_alone else 2

    @property
    def socket(self) -> Path:
        return self.image.with_suffix(".nbd")

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/{EXPORT}" if self.port else f"nbd+unix:///{EXPORT}?socket={self.socket}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command(self), stdin=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while not self._listens():
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)

    def _listens(self) -> bool:
        """Without a connection: a server may end with its first client."""
        if not self.port:
            return self.socket.exists()
        return f":{self.port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def crash(self) -> None:
        """Kill it at any moment, and start it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()


def qemu_nbd(server: NbdServer) -> Sequence[str]:
    """With several connections, in the page cache, so that nothing is lost when it is killed."""
    place = ["-p", str(server.port), "-b", "127.0.0.1"] if server.port else ["-k", str(server.socket)]
    options = ["-f", "raw", "-x", EXPORT, "-t", "--shared=8", "--discard=unmap", "--detect-zeroes=off"]
    return [program("qemu-nbd", "qemu-utils"), *options, *place, str(server.image)]


def qemu_nbd_alone(server: NbdServer) -> Sequence[str]:
    """With one connection at a time."""
    return [each for each in qemu_nbd(server) if each != "--shared=8"]


def nbdkit(server: NbdServer) -> Sequence[str]:
    place = ["-p", str(server.port), "-i", "127.0.0.1"] if server.port else ["-U", str(server.socket)]
    return [program("nbdkit", "nbdkit"), "-f", *place, "-e", EXPORT, "file", str(server.image)]


# Starts a server of this kind with a new image: command, tcp=True.
Start = Callable[..., NbdServer]


def starting() -> Iterator[Start]:
    """For a fixture: its servers are stopped after the test."""
    started: list[NbdServer] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:

        def begin(command: Callable[[NbdServer], Sequence[str]], *, tcp: bool = False) -> NbdServer:
            image = Path(folder, f"{len(started)}.img")
            with image.open("wb") as file:
                file.truncate(SIZE)
            started.append(NbdServer(command, image, free_port() if tcp else 0))
            return started[-1]

        yield begin
        for server in started:
            server.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
