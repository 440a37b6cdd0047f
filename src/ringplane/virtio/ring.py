"""The device's end of a virtqueue of either format: one branch a call, the same for all of a queue's."""

from __future__ import annotations

from ringplane.native.jit import compiled
from ringplane.virtio import packed, split


@compiled
def available(queue):
    """How many chains wait, at least: 0 if there is none."""
    return packed.available(queue) if queue.packed else split.available(queue)


@compiled
def known(queue):
    """As `available`, but what a split ring's driver has added since that was last called does not count."""
    return packed.available(queue) if queue.packed else split.known(queue)


@compiled
def enable_kicks(queue):
    """See split.py and packed.py for this and all others."""
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
    """`count`: how many descriptors the chain has, which matters to packed rings alone."""
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
