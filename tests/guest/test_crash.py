"""The back end is killed repeatedly under load, and the guest notices only pauses."""

from functools import partial
from pathlib import Path

import pytest

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory, Disturbed
from .machines import QemuGuest

KILLS = 20
# Seconds between kills: a new process starts within one second, and QEMU tries to reconnect every second.
LIFE = 2.5


@pytest.mark.skipif(STAND_IN, reason="QEMU's own back end does not track requests in flight")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, ring: str
) -> None:
    qemu.chardev = "reconnect=1"
    qemu.properties = f"packed={'on' if ring == 'packed' else 'off'}"
    started = backend(disk_image)
    enough = partial(workloads.say_enough, disk_image)
    disk = Disturbed(started, enough, tmp_path / "console-1.txt", started.crash, KILLS, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough(ring))  # type: ignore[arg-type]
    assert disk.times == KILLS
    assert int(seen.value("verified_kib")) > 0
    started.stop()
