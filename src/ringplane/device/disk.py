"""A disk as drivers see it: a source, the features and configuration space it offers, and its queues on workers."""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringplane.block.image import ImageError
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.policy_layer import PolicyLayer, PolicyList, PolicyPart
from ringplane.block.sources.source import Source
from ringplane.block.stack import LayerPart, Stack
from ringplane.block.storage_limits import Limits
from ringplane.dataplane.queue import Device, Queue
from ringplane.dataplane.request_types import request_types_of
from ringplane.dataplane.state import MAX_RANGE_SECTORS, MAX_RANGES
from ringplane.dataplane.worker import Worker
from ringplane.limits.member import Member
from ringplane.log.event_bus import Emit, no_events
from ringplane.options.disk_config import DiskOptions
from ringplane.options.feature_switches import OFF_BY_DEFAULT
from ringplane.options.name_options import default_name
from ringplane.system.aside import aside
from ringplane.virtio import blk, features

if TYPE_CHECKING:
    from ringplane.limits.limiter import Limiter
    from ringplane.policies.running import RunningPolicy

log = logging.getLogger(__name__)

# The data plane accepts segments of any size; the kernel transfers at most this many bytes at a time (read(2)).
SIZE_MAX = 0x7FFFF000

# The geometry for drivers that still use cylinders; other devices report the same.
HEADS, SECTORS_PER_TRACK, MAX_CYLINDERS = 16, 63, 16383

# The segments that fit into a ring of 128, the smallest that front ends use by default, without indirect descriptors:
# Linux never gets a longer request through such a ring. Longer chains are served as well.
SEG_MAX = 126


# Seconds after which it is tried again to remove a layer.
REMOVE_INTERVAL = 0.01

# The bits of the features that users can switch; the protocol determines the others.
BITS = {
    "indirect-desc": features.VIRTIO_F_INDIRECT_DESC,
    "event-idx": features.VIRTIO_F_EVENT_IDX,
    "packed": features.VIRTIO_F_RING_PACKED,
    "in-order": features.VIRTIO_F_IN_ORDER,
    "order-platform": features.VIRTIO_F_ORDER_PLATFORM,
    "notification-data": features.VIRTIO_F_NOTIFICATION_DATA,
    "ring-reset": features.VIRTIO_F_RING_RESET,
    "size-max": blk.VIRTIO_BLK_F_SIZE_MAX,
    "seg-max": blk.VIRTIO_BLK_F_SEG_MAX,
    "geometry": blk.VIRTIO_BLK_F_GEOMETRY,
    "topology": blk.VIRTIO_BLK_F_TOPOLOGY,
    "flush": blk.VIRTIO_BLK_F_FLUSH,
    "config-wce": blk.VIRTIO_BLK_F_CONFIG_WCE,
    "discard": blk.VIRTIO_BLK_F_DISCARD,
    "write-zeroes": blk.VIRTIO_BLK_F_WRITE_ZEROES,
    "secure-erase": blk.VIRTIO_BLK_F_SECURE_ERASE,
    "lifetime": blk.VIRTIO_BLK_F_LIFETIME,
}


class Disk:
    """One virtio-blk device; queue `i` is served by worker `i` modulo their number."""

    def __init__(
        self,
        source: Source,
        workers: Sequence[Worker],
        options: DiskOptions,
        layers: Sequence[Layer] = (),
        emit: Emit = no_events,
    ) -> None:
        """Prepare the source. `layers`: the highest first; `emit` reports what happens to the disk.

        Raises ImageError if it cannot be served so.
        """
        self.source = source.prepare([worker.engine for worker in workers])
        # In log lines, and for whoever asks.
        self.name = options.name or default_name(Path(source.title))
        self.block_size = options.block_size
        self.serial = options.serial if options.serial is not None else self.source.serial
        self.layers = tuple(layers)
        self._resizing = asyncio.Lock()
        self._policy_parts: dict[Worker, PolicyPart] = {}
        # While it is, its rings do not run (session/vring.py).
        self.paused = False
        # Whether its policies were changed at run time.
        self.policies_changed = False
        found = self.source.limits()
        self.limits = found.for_blocks(self.block_size, options.physical_block_size)
        self.device = Device(
            self.source.size,
            read_only=self.source.read_only,
            block_size=self.block_size,
            serial=self.serial,
            name=self.name,
            lifetime=_lifetime(found),
            request_types=request_types_of(layers),
            emit=emit,
        )
        if self.source.one_thread or any(layer.one_thread for layer in layers):
            workers = workers[:1]
        self.workers = [workers[number % len(workers)] for number in range(options.num_queues)]
        self._stacks = {worker: self._stack(worker) for worker in dict.fromkeys(self.workers)}
        self.queues = [Queue(self.device, number, self._stacks[worker]) for number, worker in enumerate(self.workers)]
        self._switches = options.features
        check_switches(self._switches, self.limits, self.source, self._impossible)
        for worker in set(self.workers):
            worker.add_disk()
        self.member = Member()
        self._on_workers = True
        self._emit = emit

    def start_threads(self) -> None:
        """Start those of source and layers. Raises NoThread."""
        self.source.start_threads()
        for layer in self.layers:
            layer.start_threads(self._emit)

    def _stack(self, worker: Worker) -> Stack:
        """The disk as one worker sees it."""
        slots = worker.state.slots.count
        source = self.source.part(slots)
        parts = [layer.part(source.backing, slots) for layer in self.layers]
        self._policy_parts.update((worker, part) for part in parts if isinstance(part, PolicyPart))
        return Stack(source, parts)

    async def add_lowest(self, layer: Layer) -> None:
        """Put a layer below all others, while no I/O is in progress. Raises OSError and WorkerEnded."""
        try:
            for worker, stack in self._stacks.items():
                part = layer.part(stack.source.backing, worker.state.slots.count)
                await asyncio.wrap_future(worker.call(partial(_add_lowest, worker, stack, part)))
        except BaseException:
            await self._until_removed(len(self.layers))
            raise
        self.layers = *self.layers, layer

    async def remove_lowest(self) -> None:
        """Remove the lowest layer while nothing is fetched; I/Os in progress do not pass it any more.

        It waits until the layer allows it. If that was cancelled it may be called again. Raises WorkerEnded.
        """
        await self._until_removed(len(self.layers) - 1)
        self.layers = self.layers[:-1]

    async def _until_removed(self, left: int) -> None:
        while not all(await asyncio.gather(*map(asyncio.wrap_future, self.leave_lowest(left)))):
            await asyncio.sleep(REMOVE_INTERVAL)

    def leave_lowest(self, left: int) -> list[Future[bool]]:
        """Have each I/O thread leave only the first so many layers; the results are whether it has done that."""
        return [worker.call(partial(_leave_lowest, worker, stack, left)) for worker, stack in self._stacks.items()]

    @property
    def _impossible(self) -> frozenset[str]:
        return impossible_with(self.layers)

    @property
    def started(self) -> Sequence[Queue]:
        """The queues that front ends have ever started."""
        return self.device.started

    @property
    def how(self) -> str:
        """How I/O is done, for users."""
        return self.source.how("/".join(sorted({worker.engine.name for worker in self.workers})))

    @property
    def size(self) -> int:
        """The bytes that the guest sees."""
        return self.device.size

    def grow_source(self, size: int) -> None:
        """Make the source this long, which `refresh_size` picks up. Raises ImageError and OSError; may block."""
        self._check_size_is_free()
        self.source.grow(size)

    def _check_size_is_free(self) -> None:
        for layer in self.layers:
            if layer.fixed_size:
                raise ImageError(f"{self.source.title}: {layer.fixed_size}")

    async def refresh_size(self) -> bool:
        """Pick up the source's current size; returns whether it changed. Raises ImageError, OSError and WorkerEnded."""
        self._check_size_is_free()
        async with self._resizing:
            return await self._take_size()

    async def _take_size(self) -> bool:
        await aside(self.source.refresh_size)
        size = self.source.size
        # Compared with the size in use; the source may not have been prepared for a size that was found earlier.
        if size == self.device.size:
            return False
        # If the source shrank, requests beyond its new end fail at once.
        self.device.size = min(self.device.size, size)
        self.source.resize(size)
        for layer in self.layers:
            layer.resize(size)
        # A worker that sees the new size must not use an older mapping, so each worker runs a call in between.
        await asyncio.gather(*(asyncio.wrap_future(worker.call(_nothing)) for worker in set(self.workers)))
        self.device.size = size
        return True

    def prepare_limits(self) -> None:
        """Load what limits need; when the process is confined it cannot."""
        for queue in self.queues:
            queue.make_gate(self.member)

    def limit(self, limiter: Limiter | None) -> list[Future[None]]:
        """Have the I/O threads obey these limits, after `prepare_limits`; the futures are done when they do."""
        queues: dict[Worker, list[Queue]] = {}
        for queue, worker in zip(self.queues, self.workers, strict=True):
            queues.setdefault(worker, []).append(queue)
        return [worker.limit(some, limiter) for worker, some in queues.items()]

    @property
    def policies(self) -> PolicyLayer | None:
        """The layer of its policies; None: it has never had one."""
        return next((layer for layer in self.layers if isinstance(layer, PolicyLayer)), None)

    @property
    def running_policies(self) -> Sequence[RunningPolicy]:
        """Those that it has now, in order; any thread may ask."""
        layer = self.policies
        return () if layer is None else layer.policies

    def use_policies(self, policies: Sequence[RunningPolicy]) -> list[Future[None]]:
        """Have the I/O threads ask these, whose code is loaded; the futures are done when they do."""
        place = sum(not layer.below_policies for layer in self.layers)
        layer = self.policies
        if layer is None:
            layer = PolicyLayer(self.size, self.block_size)
            self._policy_parts = {worker: layer.part(0, worker.state.slots.count) for worker in self._stacks}
            self.layers = (*self.layers[:place], layer, *self.layers[place:])
        layer.policies = tuple(policies)
        listed = layer.listed()
        return [
            worker.call(partial(_swap, worker, stack, place, self._policy_parts[worker], listed))
            for worker, stack in self._stacks.items()
        ]

    def release_policy(self, policy: RunningPolicy) -> list[Future[None]]:
        """Have the I/Os continue that hang because of this policy; the futures are done when they do."""
        return [
            worker.call(partial(part.release, worker.state.channel.address, policy))
            for worker, part in self._policy_parts.items()
        ]

    @property
    def flush_failed(self) -> bool:
        """Whether a flush has failed; later ones cannot be guaranteed then (fsync(2))."""
        return self.source.flush_failed or any(layer.failed for layer in self.layers)

    def set_flush_failed(self) -> None:
        """Store that a flush has failed in the previous process."""
        self.source.set_flush_failed()

    def sync(self) -> None:
        """Make completed requests stable; this blocks. Raises OSError, also if an earlier flush failed."""
        if self.source.read_only:
            return
        if not any(layer.syncs_source for layer in self.layers):
            self.source.sync()
        for layer in self.layers:
            layer.sync()

    async def empty_cache(self) -> None:
        """Let other processes use the image, while no ring runs; see Source. Raises OSError."""
        if self.source.has_cache:
            await aside(self.source.empty_cache)

    def close(self) -> None:
        """Close layers and source, which may block; no queue may be running. A second call does nothing."""
        self.leave_workers()
        self.report_failures()
        for layer in self.layers:
            try:
                layer.close()
            except OSError as error:
                where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
                log.error("%s%s", where, error, extra={"disk": self.name})
        self.source.close()

    def leave_workers(self) -> None:
        """The workers serve a disk less. A second call does nothing."""
        if self._on_workers:
            self._on_workers = False
            for worker in set(self.workers):
                worker.remove_disk()

    def report_failures(self) -> None:
        """Log the number of failed requests since the last such log line."""
        self.device.failures.report_rest()

    @property
    def features(self) -> int:
        """The device and ring feature bits that are offered."""
        offered = features.VIRTIO_F_VERSION_1 | blk.VIRTIO_BLK_F_BLK_SIZE
        offered |= blk.VIRTIO_BLK_F_MQ if len(self.queues) > 1 else 0
        offered |= blk.VIRTIO_BLK_F_RO if self.source.read_only else 0
        offered |= self.needed_features
        for name, bit in BITS.items():
            possible = can_offer(name, self.limits, self.source, self._impossible)
            offered |= bit if possible and self.offers(name) else 0
        if not offered & blk.VIRTIO_BLK_F_FLUSH:
            # Section 5.2.5.2: a device that offers the switch of the cache must offer to flush it.
            offered &= ~blk.VIRTIO_BLK_F_CONFIG_WCE
        return offered

    @property
    def needed_features(self) -> int:
        """The features that a driver must accept: only drivers that support zones can use sequential ones."""
        return functools.reduce(operator.or_, (layer.needed_features for layer in self.layers), 0)

    def offers(self, name: str) -> bool:
        """Whether the user's switches, or else the defaults, offer the feature of this name."""
        return self._switches.get(name, name not in OFF_BY_DEFAULT)

    def config_space(self) -> bytes:
        """struct virtio_blk_config; fields of features that are not offered are zero, except `num_queues`."""
        config = np.zeros(1, blk.CONFIG)[0]
        capacity = self.device.size // blk.SECTOR
        config["capacity"] = capacity
        config["size_max"], config["seg_max"] = SIZE_MAX, SEG_MAX
        config["cylinders"] = max(1, min(capacity // (HEADS * SECTORS_PER_TRACK), MAX_CYLINDERS))
        config["heads"], config["sectors"] = HEADS, SECTORS_PER_TRACK
        config["blk_size"] = self.block_size
        self._describe_topology(config)
        config["num_queues"] = len(self.queues)
        self._describe_ranges(config)
        for layer in self.layers:
            layer.describe(config)
        offered = self.features
        for bit, names in blk.CONFIG_FIELDS.items():
            for name in () if offered & bit else names:
                config[name] = 0
        return bytes(config.tobytes())

    def _describe_topology(self, config: np.void) -> None:
        """Fill in the topology in logical blocks; a physical block has a power of two of them."""
        limits = self.limits
        config["physical_block_exp"] = (limits.physical_block // self.block_size).bit_length() - 1
        config["min_io_size"] = limits.minimum_io // self.block_size
        config["opt_io_size"] = limits.optimal_io // self.block_size
        config["writeback"] = 1

    def _describe_ranges(self, config: np.void) -> None:
        """Fill in the limits of discard, write zeroes and secure erase."""
        for name in ("discard", "write_zeroes", "secure_erase"):
            config[f"max_{name}_sectors"], config[f"max_{name}_seg"] = MAX_RANGE_SECTORS, MAX_RANGES
        config["discard_sector_alignment"] = max(self.limits.discard, self.block_size) // blk.SECTOR
        config["secure_erase_sector_alignment"] = max(self.limits.secure_erase, self.block_size) // blk.SECTOR
        config["write_zeroes_may_unmap"] = self.limits.punches


def impossible_with(layers: Iterable[Layer | type[Layer]]) -> frozenset[str]:
    """The names of the features that cannot be offered with these layers."""
    return frozenset().union(*(layer.impossible for layer in layers))


def can_offer(name: str, limits: Limits, source: Source, impossible: Collection[str]) -> bool:
    """Whether the storage supports the feature of this name, and no layer makes it `impossible`."""
    supported = {
        "discard": limits.discard > 0,
        "write-zeroes": not source.read_only,
        "secure-erase": limits.secure_erase > 0,
        "lifetime": limits.lifetime is not None,
    }.get(name, True)
    return supported and name not in impossible


def check_switches(switches: Mapping[str, bool], limits: Limits, source: Source, impossible: Collection[str]) -> None:
    """Raises ImageError for a switched-on feature that cannot be offered."""
    for name, on in switches.items():
        if on and not can_offer(name, limits, source, impossible):
            raise ImageError(f"{source.title}: {name} cannot be offered, because the storage does not support it")


def _swap(worker: Worker, stack: Stack, place: int, part: PolicyPart, policies: PolicyList) -> None:
    """On the thread of the worker: the first policies of a disk bring their layer with them."""
    channel = worker.state.channel
    if part not in stack.layers:
        stack.insert(place, part, channel.ios, worker.engine)
    part.swap(policies, channel.address)


def _add_lowest(worker: Worker, stack: Stack, part: LayerPart) -> None:
    """On the thread of the worker, which alone changes the layers of its stacks."""
    stack.insert(len(stack.layers), part, worker.state.channel.ios, worker.engine)


def _leave_lowest(worker: Worker, stack: Stack, left: int) -> bool:
    """On the thread of the worker: whether the stack has not more than so many layers now."""
    channel = worker.state.channel
    while len(stack.layers) > left and stack.layers[-1].leave(channel.address):
        stack.remove(stack.layers[-1], channel.ios, worker.engine)
    return len(stack.layers) <= left


def _nothing() -> None:
    """A call that makes a worker leave compiled code and enter it again."""


def _lifetime(limits: Limits) -> bytes:
    """struct virtio_blk_lifetime, or no bytes if the storage does not report it."""
    return b"" if limits.lifetime is None else np.array([limits.lifetime], blk.LIFETIME).tobytes()
