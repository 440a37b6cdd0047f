"""Features that are switched on and off: which ones are offered then, and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ringplane.block.image import Image, ImageError
from ringplane.block.sources.file import FileSource
from ringplane.dataplane.worker import Worker
from ringplane.device.disk import BITS, Disk
from ringplane.options.disk_config import DiskOptions
from ringplane.options.feature_switches import FEATURES, OFF_BY_DEFAULT, parse_feature
from ringplane.vhost_user.messages import ProtocolFeature
from ringplane.virtio import blk, features

PROTOCOL = {"status": ProtocolFeature.STATUS, "inband-notifications": ProtocolFeature.INBAND_NOTIFICATIONS}


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("io", slots=1)
    yield worker
    worker.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def disk(path: Path, worker: Worker, switches: dict[str, bool], *, read_only: bool = False) -> Disk:
    options = DiskOptions(num_queues=1, read_only=read_only, features=switches)
    with contextlib.closing(FileSource(Image(path, options))) as source:
        return Disk(source, [worker], options)


def test_each_feature_has_a_bit_or_is_a_protocol_feature() -> None:
    assert set(BITS) | set(PROTOCOL) == set(FEATURES)
    assert set(OFF_BY_DEFAULT) <= set(FEATURES)


@pytest.mark.parametrize("name", sorted(set(BITS) - {"secure-erase", "lifetime"}))
def test_a_switched_feature(path: Path, worker: Worker, name: str) -> None:
    assert disk(path, worker, {name: True}).features & BITS[name]
    assert not disk(path, worker, {name: False}).features & BITS[name]
    usual = disk(path, worker, {}).features
    assert bool(usual & BITS[name]) == (name not in OFF_BY_DEFAULT)
    others = disk(path, worker, {name: name in OFF_BY_DEFAULT}).features ^ usual
    # A disk without flush cannot offer to switch off the write cache.
    assert others == BITS[name] | (BITS["config-wce"] if name == "flush" else 0)


@pytest.mark.parametrize("name", sorted(set(BITS)))
def test_configuration_fields_of_disabled_features_are_zero(path: Path, worker: Worker, name: str) -> None:
    config = np.frombuffer(disk(path, worker, {name: False}).config_space(), blk.CONFIG)[0]
    assert all(config[field] == 0 for field in blk.CONFIG_FIELDS.get(BITS[name], ()))
    assert config["capacity"] == 2048


@pytest.mark.parametrize("name", ["secure-erase", "lifetime"])
def test_features_that_the_storage_lacks_cannot_be_switched_on(path: Path, worker: Worker, name: str) -> None:
    with pytest.raises(ImageError, match=f"{name} cannot be offered"):
        disk(path, worker, {name: True})


def test_discard_cannot_be_switched_on_for_a_read_only_disk(path: Path, worker: Worker) -> None:
    with pytest.raises(ImageError, match="discard cannot be offered"):
        disk(path, worker, {"discard": True}, read_only=True)


def test_all_ring_features_are_offered_or_can_be_switched_on(path: Path, worker: Worker) -> None:
    rings = (
        features.VIRTIO_F_INDIRECT_DESC
        | features.VIRTIO_F_EVENT_IDX
        | features.VIRTIO_F_RING_PACKED
        | features.VIRTIO_F_IN_ORDER
        | features.VIRTIO_F_ORDER_PLATFORM
        | features.VIRTIO_F_NOTIFICATION_DATA
        | features.VIRTIO_F_RING_RESET
    )
    assert disk(path, worker, {"in-order": True}).features & rings == rings


def test_option_values_are_parsed() -> None:
    assert parse_feature("packed=off") == ("packed", False)
    assert parse_feature("in-order=on") == ("in-order", True)
    with pytest.raises(ValueError, match="did you mean in-order"):
        parse_feature("inorder=on")
    with pytest.raises(ValueError, match="the features are indirect-desc, event-idx"):
        parse_feature("xyz=on")
    with pytest.raises(ValueError, match="neither packed=on nor packed=off"):
        parse_feature("packed")
