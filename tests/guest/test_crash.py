"""The back end is killed under load, again and again, and the guest notices nothing but pauses."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import workloads
from .backends import STAND_IN, Backend, BackendFactory
from .machines import QemuGuest, read

KILLS = 20
# Seconds from one kill to the next: a new process is there within one, and QEMU looks for it each second.
LIFE = 2.5


@dataclass
class Crashing:
    """A back end that is killed now and then while its guest is at work; a `Guest` takes it for a `Backend`."""

    backend: Backend
    console: Path
    kills: int = 0
    last: float = field(default_factory=time.monotonic)

    @property
    def socket(self) -> Path:
        return self.backend.socket

    def check_alive(self) -> None:
        """Called every 50 ms while the guest runs."""
        self.backend.check_alive()
        if self.kills < KILLS and time.monotonic() - self.last > LIFE and "fio begins" in read(self.console):
            self.backend.crash()
            self.kills += 1
            self.last = time.monotonic()


@pytest.mark.skipif(STAND_IN, reason="QEMU's own back end does not track what is in flight")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, ring: str
) -> None:
    qemu.chardev = "reconnect=1"
    qemu.properties = f"packed={'on' if ring == 'packed' else 'off'}"
    disk = Crashing(backend(disk_image), tmp_path / "console-1.txt")
    seen = qemu.run(disk, workloads.fio_verify_for(seconds=int(KILLS * LIFE) + 15, ring=ring))  # type: ignore[arg-type]
    assert disk.kills == KILLS
    assert int(seen.value("verified_kib")) > 0
    disk.backend.stop()
