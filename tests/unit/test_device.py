"""The device as a driver sees it over the socket: ranges, write cache, and an image that changes its size."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.dataplane.queue import Queue
from ringplane.dataplane.ring_states import RingState
from ringplane.dataplane.served_rings import ServedRings
from ringplane.driver import Driver
from ringplane.driver.frontend import Refused
from ringplane.guest_memory.address_space import BadMemory
from ringplane.vhost_user.messages import HEADER, VERSION, BackendRequest, ProtocolFeature, Request
from ringplane.virtio.blk import CONFIG, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH

from .rig import PATIENCE, loop_device, pattern
from .waiting import wait_until

MIB = 1 << 20
SIZE = 4 * MIB
WRITEBACK: int = CONFIG.fields["writeback"][1]  # type: ignore[index]


@pytest.fixture(params=["/dev/shm", "/var/tmp"], ids=["memory", "kernel"])
def image(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An image for the engine `memory`, and one for io_uring or aio."""
    with tempfile.TemporaryDirectory(dir=request.param) as folder:
        path = Path(folder) / "disk.img"
        path.write_bytes(pattern(SIZE))
        yield path


@pytest.fixture
def export(image: Path, tmp_path: Path) -> Iterator[ringplane.Export]:
    with ringplane.serve(image, tmp_path / "socket", num_queues=2, io_threads=2) as running:
        yield running


def attach(export: ringplane.Export, **options: object) -> Driver:
    assert export.socket_path is not None
    return Driver(export.socket_path, queues=2, memory_size=64 * MIB, timeout=PATIENCE, **options)  # type: ignore[arg-type]


def test_ranges(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        driver.write_zeroes(4096, 8192)
        driver.discard(MIB, MIB)
        driver.write_zeroes(3 * MIB, MIB, unmap=True)
        zeros = {1: 1, 3: 1}
        expected = bytearray(pattern(SIZE))
        expected[4096:12288] = bytes(8192)
        for start, count in zeros.items():
            expected[start * MIB : (start + count) * MIB] = bytes(count * MIB)
        assert driver.read(0, SIZE) == expected
    assert image.read_bytes() == expected
    assert image.stat().st_blocks * 512 <= 2 * MIB


def test_limits_come_from_the_storage(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        config = driver.config
        assert config["discard_sector_alignment"] * 512 == image.stat().st_blksize
        assert config["max_discard_seg"] > 1
        assert config["physical_block_exp"] == 3


# The write cache


def layouts(export: ringplane.Export) -> list[bool]:
    """For each queue: whether its writes are stable when they are completed."""
    return [bool(queue.record["write_through"]) for queue in export.disk.queues]


def test_the_driver_may_choose_its_write_cache(export: ringplane.Export) -> None:
    with attach(export) as driver:
        assert (driver.config["writeback"], layouts(export)) == (1, [False, False])
        driver.write(0, bytes(4096))
        driver.set_write_back(False)
        assert (driver.config["writeback"], layouts(export)) == (0, [True, True])
        driver.write(4096, bytes(4096), queue=1)
        driver.set_write_back(True)
        assert (driver.config["writeback"], layouts(export)) == (1, [False, False])
        assert driver.read(0, 8192) == bytes(8192)


def test_the_next_driver_has_a_write_cache_again(export: ringplane.Export) -> None:
    with attach(export) as driver:
        driver.set_write_back(False)
    wait_until(lambda: export.state == "listening")
    with attach(export) as driver:
        assert driver.config["writeback"] == 1


def test_completed_writes_are_stable_after_the_switch(
    export: ringplane.Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), real(fd)))
    with attach(export) as driver:
        driver.set_write_back(True)
        assert synced == []
        driver.set_write_back(False)
        assert synced == [export.disk.source._image.fd]


def test_a_switch_that_cannot_be_made_stable_is_refused(
    export: ringplane.Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with attach(export) as driver:
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(Refused):
            driver.set_write_back(False)
        driver.read_config()
        assert (driver.config["writeback"], layouts(export)) == (1, [False, False])
        driver.write(0, bytes(512))


def test_a_ring_that_cannot_start_again_leaves_the_others_running(
    export: ringplane.Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All rings stop for a moment when the write cache is switched, and the first one cannot start again."""
    start, (first, second) = ServedRings.start, export.disk.queues

    def fail(rings: ServedRings, queue: Queue, *rest: Any) -> None:
        if queue is first:
            raise BadMemory("the ring is not in the shared memory")
        start(rings, queue, *rest)

    with attach(export) as driver:
        monkeypatch.setattr(ServedRings, "start", fail)
        driver.set_write_back(False)
        assert (first.state, second.state) == (RingState.STOPPED, RingState.RUNNING)
        driver.write(0, bytes(512), queue=1)
    assert "queue 0: cannot be started again: the ring is not in the shared memory" in caplog.text


def test_without_flush_there_is_no_write_cache(export: ringplane.Export) -> None:
    from ringplane.driver.driver import FEATURES

    with attach(export, feature_bits=FEATURES & ~VIRTIO_BLK_F_FLUSH):
        assert layouts(export) == [True, True]


@pytest.mark.parametrize(
    ("offset", "data"), [(WRITEBACK, b"\2"), (WRITEBACK, b"\0\0"), (0, b"\0" * 8), (WRITEBACK - 1, b"\0")]
)
def test_no_other_configuration_field_can_be_written(export: ringplane.Export, offset: int, data: bytes) -> None:
    with attach(export) as driver:
        before = driver.front_end.get_config(0, 60)
        with pytest.raises(Refused):
            driver.front_end.set_config(offset, data)
        assert driver.front_end.get_config(0, 60) == before


def test_the_write_cache_switch_needs_the_feature(export: ringplane.Export) -> None:
    from ringplane.driver.driver import FEATURES

    with attach(export, feature_bits=FEATURES & ~VIRTIO_BLK_F_CONFIG_WCE) as driver:
        with pytest.raises(Refused):
            driver.set_write_back(False)
        assert layouts(export) == [False, False]


# An image that changes its size


def capacity(driver: Driver) -> int:
    driver.read_config()
    return driver.capacity


def test_growing_an_image(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        os.truncate(image, 2 * SIZE)
        assert capacity(driver) == SIZE
        export.refresh_size()
        wait_until(lambda: capacity(driver) == 2 * SIZE)
        driver.write(2 * SIZE - MIB, pattern(MIB, 3))
        assert driver.read(SIZE - MIB, 2 * MIB) == pattern(SIZE)[-MIB:] + bytes(MIB)
        driver.discard(2 * SIZE - MIB, 4096)
        assert driver.read(2 * SIZE - MIB, MIB) == bytes(4096) + pattern(MIB, 3)[4096:]
    assert image.read_bytes()[-MIB + 4096 :] == pattern(MIB, 3)[4096:]


def test_shrinking_an_image(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        os.truncate(image, SIZE // 2)
        export.refresh_size()
        wait_until(lambda: capacity(driver) == SIZE // 2)
        assert driver.request(0, SIZE // 2 // 512, read=512).status == 1
        assert driver.request(0, SIZE // 2 // 512 - 1, read=1024).status == 1
        assert driver.read(0, SIZE // 2) == pattern(SIZE)[: SIZE // 2]
        os.truncate(image, SIZE)
        export.refresh_size()
        wait_until(lambda: capacity(driver) == SIZE)
        assert driver.read(0, SIZE) == pattern(SIZE)[: SIZE // 2] + bytes(SIZE // 2)
        driver.write(SIZE - 4096, pattern(4096, 9))
    assert image.read_bytes()[-4096:] == pattern(4096, 9)


def test_requests_beyond_a_truncated_image_fail_before_a_resize(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        os.truncate(image, SIZE // 2)
        assert driver.request(0, SIZE // 2 // 512 + 8, read=512).status == 1
        assert driver.read(0, SIZE // 2) == pattern(SIZE)[: SIZE // 2]
        export.refresh_size()
        wait_until(lambda: capacity(driver) == SIZE // 2)
        os.truncate(image, 3 * SIZE)
        export.refresh_size()
        wait_until(lambda: capacity(driver) == 3 * SIZE)
        driver.write(3 * SIZE - 4096, pattern(4096, 9))
        assert driver.read(SIZE, 2 * SIZE) == bytes(2 * SIZE - 4096) + pattern(4096, 9)


def test_a_part_of_a_block_does_not_count(export: ringplane.Export, image: Path) -> None:
    with attach(export) as driver:
        os.truncate(image, SIZE + 700)
        export.refresh_size()
        wait_until(lambda: capacity(driver) == SIZE + 512)


def test_the_next_front_end_sees_a_resize(export: ringplane.Export, image: Path) -> None:
    os.truncate(image, 2 * SIZE)
    export.refresh_size()
    wait_until(lambda: export.disk.device.size == 2 * SIZE)
    with attach(export) as driver:
        assert driver.capacity == 2 * SIZE


def test_the_front_end_is_notified_of_a_resize(export: ringplane.Export, image: Path) -> None:
    """A configuration change message is sent on the back-end channel, once per change."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with attach(export) as driver, ours:
        front_end = driver.front_end
        front_end.set_protocol_features(front_end.protocol_features | ProtocolFeature.BACKEND_REQ)
        front_end.transport.call(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()], need_reply=True)
        theirs.close()
        ours.settimeout(PATIENCE)
        export.refresh_size()
        os.truncate(image, 2 * SIZE)
        export.refresh_size()
        message = ours.recv(100)
        assert HEADER.unpack(message) == (BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0)
        assert capacity(driver) == 2 * SIZE


# A block device


def test_ranges_of_a_block_device(tmp_path: Path) -> None:
    """BLKDISCARD and zeros reach the storage: the file behind the device frees or keeps its space as requested."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as content:
        content.write(pattern(SIZE))
        content.flush()
        with loop_device(Path(content.name)) as device:
            check_ranges(device, Path(content.name), tmp_path / "socket")


def check_ranges(device: Path, file: Path, socket: Path) -> None:
    space = [file.stat().st_blocks]
    with ringplane.serve(device, socket, num_queues=2) as export, attach(export) as driver:
        assert driver.config["discard_sector_alignment"] > 0
        driver.discard(0, MIB)
        driver.flush()
        space.append(file.stat().st_blocks)
        driver.write_zeroes(MIB, MIB)
        driver.flush()
        space.append(file.stat().st_blocks)
        driver.write_zeroes(2 * MIB, MIB, unmap=True)
        driver.flush()
        space.append(file.stat().st_blocks)
        assert driver.read(0, SIZE) == bytes(3 * MIB) + pattern(SIZE)[3 * MIB :]
    assert [before - after for before, after in itertools.pairwise(space)] == [2048, 0, 2048]
