"""What one front end and its driver have negotiated: features, protocol features, and the device status."""

from __future__ import annotations

from ringplane.device.disk import Disk
from ringplane.session.refusal import Refused
from ringplane.vhost_user.messages import VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, ProtocolFeature
from ringplane.virtio.features import VIRTIO_F_RING_PACKED

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
)

# Other features that in-band notifications require (section "In-band notifications").
INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK

# The device status, of virtio 1.2 section 2.1.
FEATURES_OK, DEVICE_NEEDS_RESET, STATUS_MASK = 8, 64, 0xFF


class Negotiation:
    """The features that a disk offers, and those that the other side has accepted so far."""

    def __init__(self, disk: Disk) -> None:
        self._needed = disk.needed_features
        self.offered = disk.features | VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL
        self.offered_protocol = _offered_protocol(disk)
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        # The last SET_FEATURES was rejected.
        self.features_refused = False
        self.status = 0

    def set_features(self, wanted: int) -> None:
        self.features_refused = True
        if wanted & ~self.offered:
            raise Refused(f"feature bits {wanted & ~self.offered:#x} were not offered")
        missing = self._needed & ~wanted
        if missing:
            raise Refused(f"the driver did not accept the feature bits {missing:#x}, so it does not know zoned disks")
        self.features_refused = False
        self.features = wanted

    def set_protocol_features(self, wanted: int) -> None:
        # Use integers: the complement of an IntFlag loses the bits that have no name.
        unknown = wanted & ~int(self.offered_protocol)
        if unknown:
            raise Refused(f"protocol feature bits {unknown:#x} were not offered")
        accepted = ProtocolFeature(wanted)
        if ProtocolFeature.INBAND_NOTIFICATIONS in accepted and INBAND_NEEDS not in accepted:
            raise Refused("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK too")
        self.protocol_features = accepted

    def set_status(self, status: int) -> None:
        """Section 3.1.1: a driver that reads it back without FEATURES_OK knows that its features were rejected."""
        self.status = status & ~(FEATURES_OK if self.features_refused else 0)

    def resume(self, features: int, protocol_features: int) -> None:
        """Take over what was negotiated with another process; raises Refused if this disk does not offer it."""
        if features & ~self.offered or protocol_features & ~int(self.offered_protocol):
            raise Refused("the front end uses features that this disk does not offer")
        self.features, self.protocol_features = features, ProtocolFeature(protocol_features)

    @property
    def packed(self) -> bool:
        return bool(self.features & VIRTIO_F_RING_PACKED)

    @property
    def logs(self) -> bool:
        """Whether written pages are logged, for a migration."""
        return bool(self.features & VHOST_F_LOG_ALL)

    @property
    def rings_start_enabled(self) -> bool:
        """Without protocol features there is no SET_VRING_ENABLE: rings are enabled from the start."""
        return not self.features & VHOST_USER_F_PROTOCOL_FEATURES

    @property
    def in_band(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self.protocol_features


def _offered_protocol(disk: Disk) -> ProtocolFeature:
    offered = PROTOCOL_FEATURES
    if not disk.offers("status"):
        offered &= ~ProtocolFeature.STATUS
    if disk.offers("inband-notifications"):
        offered |= ProtocolFeature.INBAND_NOTIFICATIONS
    return offered
