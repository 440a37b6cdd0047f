"""A guest migrates between two QEMUs with one ringplane process each, under a verified load, without any error."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory
from .initramfs import with_script
from .machines import DEADLINE, QemuGuest, Result, end_group, read
from .qmp import Qmp

# Seconds of load before the migration.
HEAD_START = 5.0


@dataclass
class Move:
    """The migration as seen from the source; `check` is called every 50 ms while the destination runs."""

    source: Qmp
    console: Path
    to: str
    begun: float = 0.0
    states: list[str] = field(default_factory=list)

    def check(self) -> None:
        if not self.begun:
            self.begun = time.monotonic() if "fio begins" in read(self.console) else 0.0
        elif not self.states and time.monotonic() > self.begun + HEAD_START:
            # A guest under load writes faster than the default speed of the migration.
            self.source.do("migrate-set-parameters", **{"max-bandwidth": 1 << 33, "downtime-limit": 3000})
            self.source.do("migrate", uri=self.to)
            self.states.append("setup")
        elif self.states and self.states[-1] not in ("completed", "failed"):
            self.states.append(self.source.do("query-migrate")["status"])
            assert self.states[-1] != "failed", self.states
            if self.states[-1] == "completed":
                self.source.do("quit")


@pytest.mark.skipif(STAND_IN, reason="QEMU's own back end cannot share an image")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_live_migration(backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, ring: str) -> None:
    qemu.properties = f"packed={'on' if ring == 'packed' else 'off'}"
    disks = [backend(disk_image, extra=["--share-rw"]) for _ in range(2)]
    result = migrate(qemu, [disk.socket for disk in disks], workloads.fio_verify_for(seconds=30, ring=ring), tmp_path)
    assert int(result.value("verified_kib")) > 0
    for disk in disks:
        disk.stop()
        assert "WARNING" not in disk.logged()


def migrate(qemu: QemuGuest, sockets: Sequence[Path], workload: workloads.Workload, tmp_path: Path) -> Result:
    """The result of a workload that begins with the first disk, and is moved to a machine with the second one."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(with_script(qemu.initramfs(workload), workload.script))
    with tempfile.TemporaryDirectory(prefix="move-") as folder, contextlib.ExitStack() as undo:
        commands = [
            [*qemu.command([socket], initrd, 512, 2), "-qmp", f"unix:{folder}/{number},server=on,wait=off"]
            for number, socket in enumerate(sockets)
        ]
        console = tmp_path / "console-source.txt"
        with console.open("wb") as output:
            source = subprocess.Popen(
                commands[0], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        undo.callback(end_group, source)
        qmp = Qmp(Path(folder) / "0")
        undo.callback(qmp.close)
        move = Move(qmp, console, f"unix:{folder}/moving")
        there = [*commands[1], "-incoming", f"unix:{folder}/moving"]
        result = qemu.run_command(there, tmp_path / "console-there.txt", DEADLINE, move.check)
    assert result.status == 0, result.console
    assert move.states[-1] == "completed"
    return result
