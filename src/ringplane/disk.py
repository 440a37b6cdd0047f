"""A disk as drivers see it: an image, the features and configuration space it offers, and its queues on workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ringplane.dataplane.queue import Device, Queue
from ringplane.dataplane.worker import Worker
from ringplane.engines.choose import AUTO, choose_storage
from ringplane.engines.common import IN_MEMORY, NOWHERE, THROUGH_WORKER
from ringplane.image import Image, ImageError
from ringplane.virtio import blk, features

# What a driver without indirect descriptors can fit into a ring of 128, the smallest that front ends use by default:
# Linux never gets a longer request through such a ring. Chains that are longer are served all the same.
SEG_MAX = 126


class Disk:
    """One virtio-blk device; queue `i` is served by worker `i` modulo their number."""

    def __init__(
        self,
        image: Image,
        workers: Sequence[Worker],
        *,
        num_queues: int,
        block_size: int,
        serial: str | None = None,
        engine: str = AUTO,
    ) -> None:
        """`serial` is at most 20 bytes; without one it is derived from the image's path.

        `engine` is one of ENGINES; of those that a worker has, the workers' own is used. Raises ImageError where the
        image cannot be served with it.
        """
        self.image = image
        self.block_size = block_size
        self.serial = serial if serial is not None else default_serial(image)
        name = image.path.name
        try:
            self.storage = choose_storage(engine, image.fd)
        except ValueError as error:
            raise ImageError(f"{image.path}: {error}") from None
        alignment = (image.alignment.memory, image.alignment.block)
        try:
            self._device = Device(
                image.fd,
                image.size,
                read_only=image.read_only,
                block_size=block_size,
                alignment=alignment,
                serial=self.serial,
                name=name,
                storage=self.storage,
            )
        except OSError as error:
            raise ImageError(f"{image.path}: cannot be mapped: {error.strerror} (huge pages are reserved)") from None
        self.queues = [Queue(self._device, number, f"{name} queue {number}") for number in range(num_queues)]
        self.workers = [workers[number % len(workers)] for number in range(num_queues)]

    @property
    def through_page_cache(self) -> bool:
        """Whether I/O goes through the page cache, as `direct` was not asked for or not possible."""
        return self.storage == THROUGH_WORKER and not self.image.direct

    @property
    def how(self) -> str:
        """How I/O is done, for people."""
        if self.storage == IN_MEMORY:
            return "engine memory"
        if self.storage == NOWHERE:
            return "engine null: nothing is read or written"
        engines = "/".join(sorted({worker.engine.name for worker in self.workers}))
        return f"engine {engines}, {'O_DIRECT' if self.image.direct else 'buffered'}"

    def close(self) -> None:
        """Let go of the image; no queue may be running. A second call does nothing."""
        self._device.close()
        self.image.close()

    @property
    def features(self) -> int:
        """The device and ring feature bits that are offered."""
        offered = features.VIRTIO_F_VERSION_1 | features.VIRTIO_F_INDIRECT_DESC | features.VIRTIO_F_EVENT_IDX
        offered |= blk.VIRTIO_BLK_F_SEG_MAX | blk.VIRTIO_BLK_F_BLK_SIZE | blk.VIRTIO_BLK_F_FLUSH
        if len(self.queues) > 1:
            offered |= blk.VIRTIO_BLK_F_MQ
        if self.image.read_only:
            offered |= blk.VIRTIO_BLK_F_RO
        return offered

    def config_space(self) -> bytes:
        """struct virtio_blk_config; but for `num_queues`, fields of features that are not offered are zero."""
        config = np.zeros(1, blk.CONFIG)
        config["capacity"] = self.image.size // blk.SECTOR
        config["seg_max"] = SEG_MAX
        config["blk_size"] = self.block_size
        config["num_queues"] = len(self.queues)
        return config.tobytes()


def default_serial(image: Image) -> str:
    """The same for the same path, so that /dev/disk/by-id in the guest is stable."""
    digest = hashlib.blake2b(str(image.path.resolve()).encode(), digest_size=5).hexdigest()
    return f"ringplane-{digest}"
