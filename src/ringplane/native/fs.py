"""Requests to block devices with ioctl(2), and flags of pwritev2(2): the kernel's include/uapi/linux/fs.h."""

from __future__ import annotations

BLKROGET, BLKSSZGET, BLKPBSZGET = 0x125E, 0x1268, 0x127B
BLKIOMIN, BLKIOOPT = 0x1278, 0x1279
BLKGETSIZE64 = 0x80081272
BLKDISCARD, BLKSECDISCARD = 0x1277, 0x127D

RWF_DSYNC = 2
