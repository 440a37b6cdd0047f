"""An idle guest costs nothing: no thread of the back end wakes up while the guest does not use its disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unit.waiting import eventually

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory
from .machines import Guest, read

BEGIN, END = "guest-is-idle", "guest-was-idle"
# Longer than any period of a timer.
SECONDS = 3.0


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
        workloads.script(f"dd if=/dev/vda of=/dev/null bs=64k count=16\necho {BEGIN}\nsleep 10\necho {END}\n")
    )
    running = threading.Thread(target=guest.run, args=[disk, idle])
    running.start()
    console = guest.folder / "console-1.txt"
    assert eventually(lambda: console.exists() and BEGIN in read(console)), "the guest did not become idle"
    asleep = sleeps(disk.process.pid, until=lambda: END in read(console))
    running.join()
    assert asleep, f"a thread woke up in each {SECONDS} seconds of the guest's sleep"
    disk.stop()


def sleeps(pid: int, until: Callable[[], bool]) -> bool:
    """Whether the process sleeps for SECONDS before something happens."""
    seen, since = wake_ups(pid), time.monotonic()
    while not until():
        if (now := wake_ups(pid)) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            return True
        time.sleep(0.1)
    return False
