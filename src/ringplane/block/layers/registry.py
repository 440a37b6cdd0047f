"""The registry of layers; docs/hacking.md says how to add one."""

from __future__ import annotations

from ringplane.block.layers import delay, policy_layer, record, zoned
from ringplane.block.layers.layer import LayerModule

# The highest first. The time of `delay` is one of the storage, so what a zone refuses is refused at once. What policies
# do is done by the storage too, and `record` records what the storage is given.
LAYERS: tuple[LayerModule, ...] = (zoned, delay, policy_layer, record)
