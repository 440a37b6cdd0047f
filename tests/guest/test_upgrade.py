"""A new process takes over from the running one under load, repeatedly, and the guest notices nothing."""

from functools import partial
from pathlib import Path

import pytest

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory, Disturbed
from .machines import QemuGuest

UPGRADES = 8
# Seconds between takeovers.
LIFE = 2.0


@pytest.mark.skipif(STAND_IN, reason="QEMU's own back end cannot be taken over from")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_upgraded_under_load(
    backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, ring: str
) -> None:
    """QEMU would not reconnect, because `reconnect` is not set here."""
    qemu.properties = f"packed={'on' if ring == 'packed' else 'off'}"
    started = backend(disk_image)
    enough = partial(workloads.say_enough, disk_image)
    disk = Disturbed(started, enough, tmp_path / "console-1.txt", started.upgrade, UPGRADES, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough(ring))  # type: ignore[arg-type]
    assert disk.times == UPGRADES
    assert int(seen.value("verified_kib")) > 0
    started.stop()
    assert "WARNING" not in started.logged()
