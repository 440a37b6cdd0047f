"""Every combination of ring format and features that matters to the data plane, as arguments of `Line.start`."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from ringplane.virtio.features import (
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_ORDER_PLATFORM,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)

from .packed_ring import PackedRing
from .rig import Ring

Combination = dict[str, Any]

FORMATS = {"split": Ring, "packed": PackedRing}
FEATURES = ("event_idx", "indirect", "in_order")

# Features that may be negotiated as well and make no difference here.
INDIFFERENT = (
    VIRTIO_F_VERSION_1,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_ORDER_PLATFORM,
    VIRTIO_F_RING_RESET,
)


def named(combination: Combination) -> Any:
    name = next(name for name, ring_class in FORMATS.items() if ring_class is combination["ring_class"])
    return pytest.param(combination, id="-".join([name, *(feature for feature in FEATURES if combination[feature])]))


EVERY: list[Combination] = [
    {"ring_class": ring_class, **dict(zip(FEATURES, negotiated, strict=True))}
    for ring_class in FORMATS.values()
    for negotiated in itertools.product([False, True], repeat=len(FEATURES))
]

# Parameters of tests and fixtures.
COMBINATIONS = [named(combination) for combination in EVERY]
WITH_INDIRECT = [named(combination) for combination in EVERY if combination["indirect"]]
WITHOUT_INDIRECT = [named(combination) for combination in EVERY if not combination["indirect"]]


def some_of(bits: tuple[int, ...], randomness: random.Random) -> int:
    return sum(bit for bit in bits if randomness.random() < 0.5)


def any_size(combination: Combination, randomness: random.Random) -> int:
    """The size of a split ring is a power of two (section 2.7), that of a packed ring is any number."""
    return 1 << randomness.randrange(1, 9) if combination["ring_class"] is Ring else randomness.randrange(2, 257)
