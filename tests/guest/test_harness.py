"""The harness itself: a guest that fails, hangs, dies or is cut off must never count as a success."""

import threading
import time
from pathlib import Path

import pytest

from . import host, initramfs, machines, workloads
from .back_end_processes import BackendFactory
from .machines import Guest, GuestError, QemuGuest, UmlGuest, result_in
from .workloads import Workload

FAILING = Workload(workloads.script("say before\nfalse\nsay after\n"))


@pytest.fixture
def impostor(tmp_path: Path) -> Guest:
    """A guest whose machine is any command that the test gives."""
    return Guest(tmp_path, lambda workload: b"", tmp_path)


def run(guest: Guest, script: str, deadline: float = 20.0) -> int:
    return guest.run_command(["sh", "-c", script], guest.folder / "console.txt", deadline).status


def test_the_result_is_read(impostor: Guest) -> None:
    assert run(impostor, "echo hello; echo 'RINGPLANE-GUEST-RESULT: 7'") == 7


@pytest.mark.parametrize(
    "console",
    [
        "",
        "RINGPLANE-GUEST-RESULT: 0",  # the end of the line is missing: it might have become 01
        "RINGPLANE-GUEST-RESULT: \n",
        "RINGPLANE-GUEST-RES\n",
        "echo RINGPLANE-GUEST-RESULT: 0\n",
        "RINGPLANE-GUEST-RESULT: 0 [   1.0] a message of the kernel\n",
    ],
)
def test_a_truncated_console_has_no_result(console: str) -> None:
    assert result_in(f"guest: running the script\n{console}") is None


def test_carriage_returns_are_accepted() -> None:
    result = result_in("value=5\r\n\r\nRINGPLANE-GUEST-RESULT: 0\r\n[    1.9] reboot: Power down\r\n")
    assert result is not None
    assert result.status == 0
    assert result.value("value") == "5"


def test_missing_value_is_an_error() -> None:
    result = result_in("values=5\nRINGPLANE-GUEST-RESULT: 0\n")
    assert result is not None
    with pytest.raises(GuestError, match="no value="):
        result.value("value")


def test_guest_that_dies_without_a_result(impostor: Guest) -> None:
    with pytest.raises(GuestError, match=r"without a result(?s:.*)last words"):
        run(impostor, "echo last words; exit 0")


def test_machine_that_fails_after_its_result(impostor: Guest) -> None:
    with pytest.raises(GuestError, match="ended with status 3"):
        run(impostor, "echo 'RINGPLANE-GUEST-RESULT: 0'; exit 3")


def test_a_hanging_guest_is_killed_with_all_its_processes(impostor: Guest) -> None:
    with pytest.raises(GuestError, match=r"no result from the guest in 1 s(?s:.*)\d+"):
        run(impostor, "sleep 1000 & echo $!; wait", deadline=1.0)
    child = int((impostor.folder / "console.txt").read_text())
    end = time.monotonic() + 10
    while running(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_guest_that_does_not_power_off(impostor: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "POWER_OFF_DEADLINE", 0.5)
    with pytest.raises(GuestError, match="did not power off"):
        run(impostor, "echo 'RINGPLANE-GUEST-RESULT: 0'; sleep 1000")


def test_failing_script_in_qemu(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    with pytest.raises(GuestError, match="status 1, not 0") as told:
        qemu.run(backend(disk_image), FAILING)
    assert "s: before" in str(told.value)
    assert "s: after" not in str(told.value)


def test_failing_script_in_uml(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    with pytest.raises(GuestError, match="status 1, not 0") as told:
        uml.run(backend(disk_image, num_queues=1), FAILING)
    assert "s: before" in str(told.value)
    assert "s: after" not in str(told.value)


def test_back_end_that_dies_fails_the_test(backend: BackendFactory, disk_image: Path) -> None:
    disk = backend(disk_image)
    disk.process.kill()
    disk.process.wait()
    with pytest.raises(AssertionError, match="ended by itself with status -9"):
        disk.stop()


def test_back_end_that_dies_ends_the_wait_for_the_guest(
    backend: BackendFactory, uml: UmlGuest, disk_image: Path
) -> None:
    disk = backend(disk_image, num_queues=1)
    killer = threading.Timer(3.0, disk.process.kill)
    killer.start()
    with pytest.raises(GuestError, match=r"ended by itself with status -9(?s:.*)console ends with"):
        uml.run(disk, Workload(workloads.script("sleep 100\n")))
    disk.stopped = True


def test_damaged_image_is_noticed(disk_image: Path) -> None:
    with pytest.raises(AssertionError, match="e2fsck on the host"):
        host.check_filesystem(disk_image)


def test_archive_has_folders_before_files() -> None:
    packed = initramfs.archive([initramfs.text("/a/b/file", "content")])
    names = [b"a\0", b"a/b\0", b"a/b/file\0", b"TRAILER!!!\0"]
    places = [packed.index(name) for name in names]
    assert places == sorted(places)
    assert packed.count(b"070701") == 4
    assert len(packed) % 4 == 0


def test_module_order_follows_dependencies(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    for name, needed in (("virtio-blk", "virtio,virtio_ring"), ("virtio_ring", "virtio"), ("virtio", "")):
        (tmp_path / f"{name}.ko").write_bytes(b"\0depends=%s\0" % needed.encode())
    entries = initramfs.module_entries(tmp_path, ["virtio_blk", "ext4"])
    assert entries[-1].data.split() == [b"virtio.ko", b"virtio_ring.ko", b"virtio_blk.ko"]
    with pytest.raises(FileNotFoundError):
        initramfs.module_entries(tmp_path, ["virtio_pci"])
