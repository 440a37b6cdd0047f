"""Names that these tests share."""

from __future__ import annotations

from collections.abc import Callable

from ringplane.driver import Driver
from ringplane.virtio import blk

SIZE = 1 << 20
READ, WRITE = blk.VIRTIO_BLK_T_IN, blk.VIRTIO_BLK_T_OUT

# Serves the export with these options, and attaches a driver.
Served = Callable[..., Driver]
