"""An RBD disk whose cluster answers whatever a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.block.sources import rbd_cluster
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.virtio.blk import (
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

from .fake_rbd_library import FakeLibrary
from .rig import PATIENCE

OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(rbd_cluster, "library", lambda: fake)
    return fake


@pytest.fixture
def driver(library: FakeLibrary, tmp_path: Path) -> Iterator[Driver]:
    path = tmp_path / "socket"
    with ringplane.serve("rbd:rbd/vm1", path, num_queues=1), Driver(path, timeout=PATIENCE) as made:
        yield made


@pytest.mark.parametrize("result", [0, 1, 511, 512, 5000, 8191])
def test_a_short_read(library: FakeLibrary, driver: Driver, result: int) -> None:
    """The rest is zeros, in each of the buffers."""
    library.result = result
    answer = driver.request(VIRTIO_BLK_T_IN, 8, read=8192, writable=[100, 5000, 3092, 1])
    assert (answer.status, answer.data) == (OK, b"d" * result + bytes(8192 - result))


@pytest.mark.parametrize("result", [8192, 8193, 1 << 31, (1 << 63) - 1])
def test_a_read_of_more_than_was_asked_for(library: FakeLibrary, driver: Driver, result: int) -> None:
    library.result = result
    answer = driver.request(VIRTIO_BLK_T_IN, 8, read=8192)
    assert (answer.status, answer.used, answer.data) == (OK, 8193, b"d" * 8192)


# -EPERM, -EINTR, the last errno, and numbers that mean something else in our data plane.
FAILURES = (-1, -4, -4095, -4096, -0x10000, -0x10000 - 3, -(1 << 31), -(1 << 63))


@pytest.mark.parametrize("result", FAILURES)
def test_numbers_that_are_not_an_errno(library: FakeLibrary, driver: Driver, result: int) -> None:
    """Each failure of the cluster is one for the guest."""
    library.result = result
    zeroes = segments((0, 8, 0))
    assert driver.request(VIRTIO_BLK_T_IN, 8, read=4096).status == IOERR
    assert driver.request(VIRTIO_BLK_T_OUT, 8, b"w" * 4096).status == IOERR
    assert driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, zeroes).status == IOERR
    assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
    library.result = None
    assert driver.read(4096, 4096) == b"d" * 4096
    assert driver.request(VIRTIO_BLK_T_OUT, 8, b"w" * 4096).status == OK
    assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR, "a flush has failed before"
