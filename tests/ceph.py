"""Real Ceph clusters of one monitor and one OSD (../shared/ceph-one-node beside the repository), in memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from unit.waiting import stop_process

PROGRAM = Path(__file__).parents[2] / "shared/ceph-one-node"

# Where all processes of a run of tests find their cluster; the one that has begun the run stops it (tests/conftest.py).
SHARED = "RINGPLANE_TEST_CLUSTER"

PATIENCE = 120

# A program that writes to an image.
WRITE = """
import ctypes, sys
conf, pool, name, offset, data = sys.argv[1:]
rados, rbd = ctypes.CDLL("librados.so.2"), ctypes.CDLL("librbd.so.1")
cluster, place, image = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
content = bytes.fromhex(data)
assert rados.rados_create(ctypes.byref(cluster), None) == 0
assert rados.rados_conf_read_file(cluster, conf.encode()) == 0
assert rados.rados_connect(cluster) == 0
assert rados.rados_ioctx_create(cluster, pool.encode(), ctypes.byref(place)) == 0
assert rbd.rbd_open(place, name.encode(), ctypes.byref(image), None) == 0
assert rbd.rbd_write(image, ctypes.c_uint64(int(offset)), ctypes.c_size_t(len(content)), content) == len(content)
assert rbd.rbd_close(image) == 0
rados.rados_ioctx_destroy(place)
rados.rados_shutdown(cluster)
"""


class CephCluster:
    """A cluster in this folder, which may run already."""

    def __init__(self, folder: Path, store: str = "memstore") -> None:
        """`bluestore` can be started again after its end; `memstore` is quicker."""
        self.folder, self.conf = folder, folder / "ceph.conf"
        self._store = store

    def start(self) -> None:
        """Start what does not run, and return when I/O works."""
        self._do("start")

    def _do(self, action: str) -> None:
        environment = {**os.environ, "CEPH_STORE": self._store}
        done = subprocess.run(
            [PROGRAM, action, self.folder], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr

    def stop_osd(self) -> None:
        """Until `continue_osd` it does nothing."""
        stop_process(self._osd())

    def continue_osd(self) -> None:
        os.kill(self._osd(), signal.SIGCONT)

    def kill_osd(self) -> None:
        """Kill the OSD, and start it again at once."""
        _kill(self._osd())
        self.start()

    def kill_monitor(self) -> None:
        """Kill the monitor; `start` starts it again."""
        _kill(self._pid("mon"))

    def _osd(self) -> int:
        return self._pid("osd")

    def _pid(self, daemon: str) -> int:
        return int((self.folder / f"{daemon}.pid").read_text().split()[0])

    def ceph(self, *arguments: str) -> str:
        return self._run("ceph", *arguments)

    def rbd(self, *arguments: str) -> str:
        return self._run("rbd", *arguments)

    def rados(self, *arguments: str) -> str:
        return self._run("rados", *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "--conf", str(self.conf), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def new_image(self, size: str = "64M", *arguments: str, pool: str = "rbd") -> str:
        """A new image with a name of its own: POOL/NAME."""
        name = f"{pool}/test-{uuid.uuid4().hex[:8]}"
        self.rbd("create", name, "--size", size, *arguments)
        return name

    def write(self, image: str, offset: int, data: bytes) -> None:
        """As another client, which takes the exclusive lock of the image for it."""
        pool, _, name = image.partition("/")
        command = [sys.executable, "-c", WRITE, str(self.conf), pool, name, str(offset), data.hex()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr

    def wait_for_owner(self, image: str) -> None:
        """Wait until the client that has the exclusive lock watches the image, again after the OSD was killed.

        Until then another client that wants the lock takes the first one for dead, and has it blocklisted.
        """
        end = time.monotonic() + PATIENCE
        while not self._locks(image) <= self._cookies("status", image, key="cookie"):
            assert time.monotonic() < end, f"the owner of {image} does not watch it"

    def owners(self, image: str) -> int:
        """How many clients have the exclusive lock."""
        return len(self._locks(image))

    def _locks(self, image: str) -> set[str]:
        return self._cookies("lock", "ls", image, key="id")

    def _cookies(self, *command: str, key: str) -> set[str]:
        """How locks and watches of librbd are numbered: "auto 94231" as the name of the lock, and 94231."""
        found = json.loads(self.rbd(*command, "--format", "json"))
        return {str(each[key]).removeprefix("auto ") for each in (found["watchers"] if key == "cookie" else found)}

    def address(self, image: str, more: str = "") -> str:
        """What ringplane calls it; `more` are options of the address."""
        return f"rbd:{image}:conf={self.conf}{more}"

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.continue_osd()
        self._do("stop")
        shutil.rmtree(self.folder)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def need_ceph() -> None:
    """Skip a test that needs a cluster where none can be started; CI must not."""
    if os.environ.get("CI") != "true" and not (PROGRAM.exists() and shutil.which("ceph-osd")):
        pytest.skip(f"{PROGRAM} and Debian's packages ceph-mon, ceph-osd, ceph-common and librbd1 are needed")


def stop_shared() -> None:
    """Stop the cluster of this run, if there is one."""
    folder = Path(os.environ.pop(SHARED, "/nonexistent"))
    if folder.exists():
        CephCluster(folder).stop()
