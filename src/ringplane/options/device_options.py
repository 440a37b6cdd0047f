"""The options of the virtio-blk device: what its driver sees."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ringplane.options.declare import WrongOptions, option
from ringplane.options.feature_switches import SWITCHES
from ringplane.options.image_options import ImageOptions
from ringplane.options.kinds import Kind, Whole, check_text, text_from_toml
from ringplane.options.sizes import SIZE

# Virtqueues of a disk. Front ends use as many of them as they want; QEMU wants one for each of its guest's CPUs, and
# refuses a disk with fewer.
MAX_QUEUES = 64

# VIRTIO_BLK_ID_BYTES, without importing NumPy: `ringplane --help` must be quick.
MAX_SERIAL = 20

# Of a physical block
MIN_BLOCK, MAX_BLOCK = 512, 64 << 10


def check_serial(serial: str) -> None:
    """Raises ValueError unless a disk can have this serial number."""
    check_text(serial)
    size = len(os.fsencode(serial))
    if size > MAX_SERIAL:
        raise ValueError(f"{serial!r} has {size} bytes; a serial number has at most {MAX_SERIAL}")
    if not serial.isprintable():
        raise ValueError(f"{serial!r} contains characters that cannot be printed")


def _parse_serial(text: str) -> str:
    check_serial(text)
    return text


SERIAL = Kind("TEXT", _parse_serial, lambda value: _parse_serial(text_from_toml(value)), check_serial)


class DeviceOptions(ImageOptions):
    """What the guest's driver sees of a disk."""

    num_queues: int = option(
        Whole(1, MAX_QUEUES),
        default=MAX_QUEUES,
        fixed=True,
        help="Number of virtqueues; unused ones cost nothing.",
        doc="virtqueues, 1 to 64: the maximum that a front end can use",
    )
    physical_block_size: int | None = option(
        SIZE,
        default=None,
        fixed=True,
        help="Physical block size for the guest, up to 64K [default: that of the storage].",
        doc='the physical block size that the guest sees: a power of two from 512 to `"64K"`, not less than '
        "`block-size`",
        doc_default="from the storage: [features.md](features.md#what-the-guest-sees-of-the-storage)",
    )
    features: Mapping[str, bool] = option(
        SWITCHES,
        default_factory=dict,
        fixed=True,
        flags=("--feature",),
        several=dict,
        help="Offer a feature or not, for example packed=off; docs/features.md lists the names.",
        doc="features to offer or not: `{ packed = false, in-order = true }`; "
        "[features.md](features.md#switching-features) lists their names",
        doc_default="",
    )
    serial: str | None = option(
        SERIAL,
        default=None,
        fixed=True,
        help="Serial number for the guest, up to 20 bytes [default: from the image path].",
        doc="the serial number that the guest sees, up to 20 bytes",
        doc_default="derived from the path of the image",
    )

    def check(self) -> None:
        size = self.physical_block_size
        if size is None:
            return
        wrong = "{physical_block_size}: a physical block size of {size}: "
        if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
            raise WrongOptions(f"{wrong}it must be a power of two from {MIN_BLOCK} to {MAX_BLOCK}", size=size)
        if size < self.block_size:
            raise WrongOptions(
                f"{wrong}it must not be less than the block size, {{logical}}", size=size, logical=self.block_size
            )
