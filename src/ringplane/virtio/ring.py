"""The device's end of a virtqueue of either format, split or packed: one well predicted branch per call."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.virtio import packed, split


@compiled
def available(queue):
    """How many chains are available, at least: 0 if there is none."""
    return packed.available(queue) if queue.packed else split.available(queue)


@compiled
def known(queue):
    """Like `available`, but without the chains that a split ring's driver has added since that was last called."""
    return packed.available(queue) if queue.packed else split.known(queue)


@compiled
def enable_kicks(queue):
    """See split.py and packed.py for this and the functions below."""
    if queue.packed:
        packed.enable_kicks(queue)
    else:
        split.enable_kicks(queue)


@compiled
def disable_kicks(queue):
    if queue.packed:
        packed.disable_kicks(queue)
    else:
        split.disable_kicks(queue)


@compiled
def put_used(queue, head, count, length):
    """`count`: how many descriptors the chain has; only packed rings need it."""
    if queue.packed:
        packed.put_used(queue, head, count, length)
    else:
        split.put_used(queue, head, length)


@compiled
def publish_used(queue):
    if queue.packed:
        packed.publish_used(queue)
    else:
        split.publish_used(queue)


@compiled
def wants_notification(queue):
    return packed.wants_notification(queue) if queue.packed else split.wants_notification(queue)
