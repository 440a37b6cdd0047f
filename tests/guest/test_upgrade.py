"""A new process takes over from the running one under load, again and again, and the guest notices nothing at all."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import workloads
from .backends import STAND_IN, Backend, BackendFactory
from .machines import QemuGuest, read

UPGRADES = 8
# Seconds from one to the next.
LIFE = 2.0


@dataclass
class Upgrading:
    """A back end that is replaced now and then while its guest is at work; a `Guest` takes it for a `Backend`."""

    backend: Backend
    console: Path
    upgrades: int = 0
    last: float = field(default_factory=time.monotonic)

    @property
    def socket(self) -> Path:
        return self.backend.socket

    def check_alive(self) -> None:
        """Called every 50 ms while the guest runs."""
        self.backend.check_alive()
        if self.upgrades < UPGRADES and time.monotonic() - self.last > LIFE and "fio begins" in read(self.console):
            self.backend.upgrade()
            self.upgrades += 1
            self.last = time.monotonic()


@pytest.mark.skipif(STAND_IN, reason="QEMU's own back end cannot be taken over from")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_upgraded_under_load(
    backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, ring: str
) -> None:
    """QEMU would not connect again: there is no `reconnect` here."""
    qemu.properties = f"packed={'on' if ring == 'packed' else 'off'}"
    disk = Upgrading(backend(disk_image), tmp_path / "console-1.txt")
    seen = qemu.run(disk, workloads.fio_verify_for(seconds=int(UPGRADES * (LIFE + 4)), ring=ring))  # type: ignore[arg-type]
    assert disk.upgrades == UPGRADES
    assert int(seen.value("verified_kib")) > 0
    disk.backend.stop()
    assert "WARNING" not in disk.backend.told()
