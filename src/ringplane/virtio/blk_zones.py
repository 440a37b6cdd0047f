"""Zoned block devices in virtio-blk: request types, status values and layouts (virtio 1.3, section 5.2)."""

from __future__ import annotations

import numpy as np

# Request types, section 5.2.6
VIRTIO_BLK_T_ZONE_APPEND = 15
VIRTIO_BLK_T_ZONE_REPORT = 16
VIRTIO_BLK_T_ZONE_OPEN = 18
VIRTIO_BLK_T_ZONE_CLOSE = 20
VIRTIO_BLK_T_ZONE_FINISH = 22
VIRTIO_BLK_T_ZONE_RESET = 24
VIRTIO_BLK_T_ZONE_RESET_ALL = 26

# Status values, section 5.2.6
VIRTIO_BLK_S_ZONE_INVALID_CMD = 3
VIRTIO_BLK_S_ZONE_UNALIGNED_WP = 4
VIRTIO_BLK_S_ZONE_OPEN_RESOURCE = 5
VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE = 6

# The zoned model in the configuration space: host-managed, so zones must be written sequentially.
VIRTIO_BLK_Z_HM = 1

# Types of zones: conventional, and sequential write required
VIRTIO_BLK_ZT_CONV, VIRTIO_BLK_ZT_SWR = 1, 2

# States of zones: without a write pointer, empty, implicitly open, explicitly open, closed, full
VIRTIO_BLK_ZS_NOT_WP, VIRTIO_BLK_ZS_EMPTY, VIRTIO_BLK_ZS_IOPEN, VIRTIO_BLK_ZS_EOPEN, VIRTIO_BLK_ZS_CLOSED = range(5)
VIRTIO_BLK_ZS_FULL = 14

# struct virtio_blk_zone_report up to its zones, and struct virtio_blk_zone_descriptor
REPORT = np.dtype([("nr_zones", "<i8"), ("reserved", "u1", (56,))])
DESCRIPTOR = np.dtype(
    [
        ("z_cap", "<i8"),
        ("z_start", "<i8"),
        ("z_wp", "<i8"),
        ("z_type", "u1"),
        ("z_state", "u1"),
        ("reserved", "u1", (38,)),
    ]
)
REPORT_SIZE, DESCRIPTOR_SIZE = REPORT.itemsize, DESCRIPTOR.itemsize

# append_sector of struct virtio_blk_req_za, which the device writes in front of the status.
APPEND_SECTOR_SIZE = 8
