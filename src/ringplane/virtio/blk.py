"""virtio-blk: request types, status values, feature bits and the configuration space (virtio 1.2, section 5.2)."""

from __future__ import annotations

import numpy as np

SECTOR = 512

# Feature bits, section 5.2.3
VIRTIO_BLK_F_SIZE_MAX = 1 << 1
VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_GEOMETRY = 1 << 4
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE = 1 << 11
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14
VIRTIO_BLK_F_LIFETIME = 1 << 15
VIRTIO_BLK_F_SECURE_ERASE = 1 << 16
VIRTIO_BLK_F_ZONED = 1 << 17

# Request types, section 5.2.6
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_GET_LIFETIME = 10
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_T_SECURE_ERASE = 14
# Set by drivers that predate flush; ignored (legacy interface, section 5.2.6.3).
VIRTIO_BLK_T_BARRIER = 0x8000_0000

# Status values, section 5.2.6
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

# The reply to GET_ID is a string of this many bytes, padded with zeros; without a final zero if it fills them.
VIRTIO_BLK_ID_BYTES = 20

# struct virtio_blk_req up to its data. It is copied before use, because the driver may change it at any time.
HEADER = np.dtype([("type", "<u4"), ("reserved", "<u4"), ("sector", "<u8")])
HEADER_SIZE = HEADER.itemsize

# struct virtio_blk_discard_write_zeroes, section 5.2.6: one or more of them are the data of discard, write zeroes and
# secure erase.
SEGMENT = np.dtype([("sector", "<i8"), ("num_sectors", "<u4"), ("flags", "<u4")])
SEGMENT_SIZE = SEGMENT.itemsize
SEGMENT_F_UNMAP = 1

# struct virtio_blk_lifetime, section 5.2.6
LIFETIME = np.dtype(
    [("pre_eol_info", "<u2"), ("device_lifetime_est_typ_a", "<u2"), ("device_lifetime_est_typ_b", "<u2")]
)
LIFETIME_SIZE = LIFETIME.itemsize

# struct virtio_blk_config, section 5.2.4
CONFIG = np.dtype(
    [
        ("capacity", "<u8"),
        ("size_max", "<u4"),
        ("seg_max", "<u4"),
        ("cylinders", "<u2"),
        ("heads", "u1"),
        ("sectors", "u1"),
        ("blk_size", "<u4"),
        ("physical_block_exp", "u1"),
        ("alignment_offset", "u1"),
        ("min_io_size", "<u2"),
        ("opt_io_size", "<u4"),
        ("writeback", "u1"),
        ("unused0", "u1"),
        ("num_queues", "<u2"),
        ("max_discard_sectors", "<u4"),
        ("max_discard_seg", "<u4"),
        ("discard_sector_alignment", "<u4"),
        ("max_write_zeroes_sectors", "<u4"),
        ("max_write_zeroes_seg", "<u4"),
        ("write_zeroes_may_unmap", "u1"),
        ("unused1", "u1", (3,)),
        ("max_secure_erase_sectors", "<u4"),
        ("max_secure_erase_seg", "<u4"),
        ("secure_erase_sector_alignment", "<u4"),
        ("zone_sectors", "<u4"),
        ("max_open_zones", "<u4"),
        ("max_active_zones", "<u4"),
        ("max_append_sectors", "<u4"),
        ("write_granularity", "<u4"),
        ("model", "u1"),
        ("unused2", "u1", (3,)),
    ]
)

# The fields of the configuration space that are valid only with a feature; `num_queues` is read without it too.
CONFIG_FIELDS = {
    VIRTIO_BLK_F_SIZE_MAX: ("size_max",),
    VIRTIO_BLK_F_SEG_MAX: ("seg_max",),
    VIRTIO_BLK_F_GEOMETRY: ("cylinders", "heads", "sectors"),
    VIRTIO_BLK_F_BLK_SIZE: ("blk_size",),
    VIRTIO_BLK_F_TOPOLOGY: ("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size"),
    VIRTIO_BLK_F_CONFIG_WCE: ("writeback",),
    VIRTIO_BLK_F_DISCARD: ("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
    VIRTIO_BLK_F_WRITE_ZEROES: ("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"),
    VIRTIO_BLK_F_SECURE_ERASE: (
        *("max_secure_erase_sectors", "max_secure_erase_seg"),
        "secure_erase_sector_alignment",
    ),
    VIRTIO_BLK_F_ZONED: (
        *("zone_sectors", "max_open_zones", "max_active_zones"),
        *("max_append_sectors", "write_granularity", "model"),
    ),
}
