"""An idle guest costs nothing: no thread of the back end wakes up while the guest does not use its disk."""

import threading
import time
from pathlib import Path

import pytest

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory
from .machines import Guest, read

BEGIN, END = "guest-is-idle", "guest-was-idle"
BOOT_DEADLINE = 120.0


def wake_ups(pid: int) -> int:
    """The number of context switches of a process's threads, voluntary and involuntary."""
    statuses = (task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(line.split()[1]) for status in statuses for line in status.splitlines() if "_ctxt_switches" in line)


@pytest.mark.skipif(STAND_IN, reason="only ringplane guarantees this; qemu-storage-daemon polls for a moment")
@pytest.mark.parametrize("kind", ["qemu", "uml"])
def test_no_wake_ups(kind: str, request: pytest.FixtureRequest, backend: BackendFactory, disk_image: Path) -> None:
    guest: Guest = request.getfixturevalue(kind)
    disk = backend(disk_image, num_queues=guest.cpus)
    # The disk is used first, so that its queues run.
    idle = workloads.Workload(
        workloads.script(f"dd if=/dev/vda of=/dev/null bs=64k count=16\necho {BEGIN}\nsleep 8\necho {END}\n")
    )
    running = threading.Thread(target=guest.run, args=[disk, idle])
    running.start()
    console = guest.folder / "console-1.txt"
    deadline = time.monotonic() + BOOT_DEADLINE
    while not (console.exists() and BEGIN in read(console)):
        assert time.monotonic() < deadline, "the guest did not become idle"
        time.sleep(0.1)
    time.sleep(1)
    before = wake_ups(disk.process.pid)
    time.sleep(3)
    after = wake_ups(disk.process.pid)
    still_idle = END not in read(console)
    running.join()
    assert still_idle, "the guest woke up too early for this test: the machine is very slow"
    assert after == before
    disk.stop()
