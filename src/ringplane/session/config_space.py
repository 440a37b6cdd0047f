"""The configuration space as one front end sees it, with its one field that the driver writes: `writeback`."""

from __future__ import annotations

from ringplane.device.disk import Disk
from ringplane.session.refusal import Refused
from ringplane.vhost_user.messages import MAX_CONFIG_SIZE
from ringplane.vhost_user.payloads import Config
from ringplane.virtio.blk import CONFIG, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH

# Offset of the field in which the driver writes whether it flushes
WRITEBACK: int = CONFIG.fields["writeback"][1]  # type: ignore[index]


class ConfigSpace:
    """`write_back`: the driver has not announced that it does not flush."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.write_back = True

    def read(self, asked: Config) -> Config:
        if asked.offset + asked.size > MAX_CONFIG_SIZE:
            raise Refused(f"{asked.size} bytes at offset {asked.offset} are beyond the configuration space")
        space = bytearray(self._disk.config_space().ljust(MAX_CONFIG_SIZE, b"\0"))
        space[WRITEBACK] = self.write_back
        return Config(asked.offset, asked.size, 0, bytes(space[asked.offset : asked.offset + asked.size]))

    def check_write(self, asked: Config, features: int) -> bool:
        """Returns what is to become of `write_back` (section 5.2.5.2)."""
        if (asked.offset, asked.size) != (WRITEBACK, 1) or asked.payload not in (b"\0", b"\1"):
            raise Refused(f"only `writeback` of the configuration space can be written, the byte at {WRITEBACK}")
        if not features & VIRTIO_BLK_F_CONFIG_WCE:
            raise Refused("`writeback` is written although the driver did not accept CONFIG_WCE")
        return asked.payload == b"\1"

    def write_through(self, features: int) -> bool:
        """Whether writes must be stable when they complete: the driver cannot flush, or has announced not to flush."""
        # Sections 5.2.5.2 and 5.2.6.2
        chosen = bool(features & VIRTIO_BLK_F_CONFIG_WCE) and not self.write_back
        return chosen or not features & VIRTIO_BLK_F_FLUSH
