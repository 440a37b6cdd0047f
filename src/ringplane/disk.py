"""A disk as drivers see it: an image, the features and configuration space it offers, and its queues on workers."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from ringplane.dataplane.queue import Device, Queue
from ringplane.dataplane.state import MAX_RANGE_SECTORS, MAX_RANGES
from ringplane.dataplane.worker import Worker
from ringplane.engines.choose import AUTO, choose_storage
from ringplane.engines.common import IN_MEMORY, NOWHERE, THROUGH_WORKER
from ringplane.image import Image, ImageError
from ringplane.limits import Limits, limits
from ringplane.virtio import blk, features

# Ours takes any size that a chain may have; the kernel transfers so many bytes at a time (read(2)).
SIZE_MAX = 0x7FFFF000

# What drivers from the time of cylinders believe in, as everybody answers them.
HEADS, SECTORS_PER_TRACK, MAX_CYLINDERS = 16, 63, 16383

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
        self._resizing = asyncio.Lock()
        name = image.path.name
        try:
            self.storage = choose_storage(engine, image.fd)
        except ValueError as error:
            raise ImageError(f"{image.path}: {error}") from None
        alignment = (image.alignment.memory, image.alignment.block)
        self.limits = Limits() if self.storage == NOWHERE else limits(image.fd, read_only=image.read_only)
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
                lifetime=_lifetime(self.limits),
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

    async def look_again(self) -> bool:
        """Serve the size that the image has now; whether it is another. Raises ImageError, OSError and WorkerEnded."""
        async with self._resizing:
            return await self._take_size()

    async def _take_size(self) -> bool:
        self.image.look_again()
        # Not with what was seen last time: that may not have been mapped.
        if self.image.size == self._device.size:
            return False
        # What is beyond a nearer end is an error at once.
        self._device.size = min(self._device.size, self.image.size)
        self._device.map(self.image.size)
        # Whoever sees the new size must not use an older mapping: each worker passes here in between.
        await asyncio.gather(*(asyncio.wrap_future(worker.call(_nothing)) for worker in set(self.workers)))
        self._device.size = self.image.size
        return True

    def sync(self) -> None:
        """fdatasync(2): what was answered is stable afterwards. Raises OSError, also where an earlier flush failed."""
        if self.storage == NOWHERE or self.image.read_only:
            return
        if self._device.flush_failed:
            raise OSError(errno.EIO, "a flush failed before")
        os.fdatasync(self.image.fd)

    def close(self) -> None:
        """Let go of the image; no queue may be running. A second call does nothing."""
        self._device.close()
        self.image.close()

    @property
    def features(self) -> int:
        """The device and ring feature bits that are offered."""
        offered = features.VIRTIO_F_VERSION_1 | features.VIRTIO_F_INDIRECT_DESC | features.VIRTIO_F_EVENT_IDX
        offered |= features.VIRTIO_F_RING_PACKED | features.VIRTIO_F_ORDER_PLATFORM
        offered |= blk.VIRTIO_BLK_F_SIZE_MAX | blk.VIRTIO_BLK_F_SEG_MAX | blk.VIRTIO_BLK_F_GEOMETRY
        offered |= blk.VIRTIO_BLK_F_BLK_SIZE | blk.VIRTIO_BLK_F_TOPOLOGY
        offered |= blk.VIRTIO_BLK_F_FLUSH | blk.VIRTIO_BLK_F_CONFIG_WCE
        for bit, offer in (
            (blk.VIRTIO_BLK_F_MQ, len(self.queues) > 1),
            (blk.VIRTIO_BLK_F_RO, self.image.read_only),
            (blk.VIRTIO_BLK_F_DISCARD, self.limits.discard),
            (blk.VIRTIO_BLK_F_WRITE_ZEROES, not self.image.read_only),
            (blk.VIRTIO_BLK_F_SECURE_ERASE, self.limits.secure_erase),
            (blk.VIRTIO_BLK_F_LIFETIME, self.limits.lifetime),
        ):
            offered |= bit if offer else 0
        return offered

    def config_space(self) -> bytes:
        """struct virtio_blk_config; but for `num_queues`, fields of features that are not offered are zero."""
        config = np.zeros(1, blk.CONFIG)[0]
        capacity = self._device.size // blk.SECTOR
        config["capacity"] = capacity
        config["size_max"], config["seg_max"] = SIZE_MAX, SEG_MAX
        config["cylinders"] = max(1, min(capacity // (HEADS * SECTORS_PER_TRACK), MAX_CYLINDERS))
        config["heads"], config["sectors"] = HEADS, SECTORS_PER_TRACK
        config["blk_size"] = self.block_size
        self._describe_topology(config)
        config["num_queues"] = len(self.queues)
        self._describe_ranges(config)
        return bytes(config.tobytes())

    def _describe_topology(self, config: np.void) -> None:
        """In blocks of the logical size; a physical block has a power of two of them."""
        limits = self.limits
        config["physical_block_exp"] = max(0, (limits.physical_block // self.block_size).bit_length() - 1)
        config["min_io_size"] = min(max(1, limits.minimum_io // self.block_size), 0xFFFF)
        config["opt_io_size"] = min(limits.optimal_io // self.block_size, 0xFFFF_FFFF)
        config["writeback"] = 1

    def _describe_ranges(self, config: np.void) -> None:
        """Discard, write zeroes and secure erase."""
        limits = self.limits
        for granularity, sectors, segments, alignment in (
            (limits.discard, "max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
            (
                limits.secure_erase,
                "max_secure_erase_sectors",
                "max_secure_erase_seg",
                "secure_erase_sector_alignment",
            ),
        ):
            if granularity:
                config[sectors], config[segments] = MAX_RANGE_SECTORS, MAX_RANGES
                config[alignment] = max(granularity, self.block_size) // blk.SECTOR
        if not self.image.read_only:
            config["max_write_zeroes_sectors"], config["max_write_zeroes_seg"] = MAX_RANGE_SECTORS, MAX_RANGES
            config["write_zeroes_may_unmap"] = limits.punches


def _nothing() -> None:
    """A worker that has called this has left compiled code and entered it again."""


def _lifetime(limits: Limits) -> bytes:
    """struct virtio_blk_lifetime, or nothing where the storage tells nothing."""
    return b"" if limits.lifetime is None else np.array([limits.lifetime], blk.LIFETIME).tobytes()


def default_serial(image: Image) -> str:
    """The same for the same path, so that /dev/disk/by-id in the guest is stable."""
    digest = hashlib.blake2b(str(image.path.resolve()).encode(), digest_size=5).hexdigest()
    return f"ringplane-{digest}"
