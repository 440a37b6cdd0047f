"""The rules for each vhost-user message: its payload, its reply, its fds, and the feature that it needs.

Source: QEMU's docs/interop/vhost-user.rst; each item names its section. All numbers are in the host's byte order and,
unless a docstring says otherwise, unsigned and without padding between fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringplane.vhost_user.messages import (
    MAX_REGIONS,
    BackendRequest,
    ProtocolFeature,
    Request,
)
from ringplane.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogRegion,
    MemoryTable,
    Opaque,
    Payload,
    SingleMemoryRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """The format of one request and of its reply.

    `reply` is None for a request that is answered only if it has the NEED_REPLY flag, then by a U64 without fds.
    `min_fds` and `max_fds` bound the fds of the request (its payload may say more exactly: `Payload.fd_count`);
    `max_reply_fds` bounds those of the reply. With `may_reply_empty` a reply without payload is allowed too.
    `feature` must have been negotiated before the request is sent; the session checks that, not the connection.
    """

    payload: type[Payload]
    reply: type[Payload] | None = None
    min_fds: int = 0
    max_fds: int = 0
    feature: ProtocolFeature | None = None
    max_reply_fds: int = 0
    may_reply_empty: bool = False


_F = ProtocolFeature

#: Front end to back end, on the main channel.
RULES: dict[Request, Rule] = {
    Request.GET_FEATURES: Rule(Empty, U64),
    Request.SET_FEATURES: Rule(U64),
    Request.SET_OWNER: Rule(Empty),
    Request.RESET_OWNER: Rule(Empty),
    # The reply with a table, used in postcopy migration only, is not supported.
    Request.SET_MEM_TABLE: Rule(MemoryTable, None, 0, MAX_REGIONS),
    # Back ends reply without payload; with NEED_REPLY some front ends take nothing but a U64.
    Request.SET_LOG_BASE: Rule(LogRegion, U64, 1, 1, _F.LOG_SHMFD, may_reply_empty=True),
    Request.SET_LOG_FD: Rule(Empty, None, 1, 1),
    Request.SET_VRING_NUM: Rule(VringState),
    Request.SET_VRING_ADDR: Rule(VringAddr),
    Request.SET_VRING_BASE: Rule(VringState),
    Request.GET_VRING_BASE: Rule(VringState, VringState),
    Request.SET_VRING_KICK: Rule(VringFd, None, 0, 1),
    Request.SET_VRING_CALL: Rule(VringFd, None, 0, 1),
    Request.SET_VRING_ERR: Rule(VringFd, None, 0, 1),
    # The next two and SET_VRING_ENABLE need VHOST_USER_F_PROTOCOL_FEATURES, which is not a protocol feature itself.
    Request.GET_PROTOCOL_FEATURES: Rule(Empty, U64),
    Request.SET_PROTOCOL_FEATURES: Rule(U64),
    Request.GET_QUEUE_NUM: Rule(Empty, U64, feature=_F.MQ),
    Request.SET_VRING_ENABLE: Rule(VringState),
    Request.SEND_RARP: Rule(U64, feature=_F.RARP),
    Request.NET_SET_MTU: Rule(U64, feature=_F.MTU),
    Request.SET_BACKEND_REQ_FD: Rule(Empty, None, 1, 1, _F.BACKEND_REQ),
    # Needs the device feature VIRTIO_F_ACCESS_PLATFORM.
    Request.IOTLB_MSG: Rule(Iotlb, U64),
    Request.SET_VRING_ENDIAN: Rule(VringState, feature=_F.CROSS_ENDIAN),
    # A reply without payload says that it failed.
    Request.GET_CONFIG: Rule(Config, Config, feature=_F.CONFIG, may_reply_empty=True),
    Request.SET_CONFIG: Rule(Config, feature=_F.CONFIG),
    Request.CREATE_CRYPTO_SESSION: Rule(Opaque, Opaque, feature=_F.CRYPTO_SESSION),
    Request.CLOSE_CRYPTO_SESSION: Rule(U64, feature=_F.CRYPTO_SESSION),
    Request.POSTCOPY_ADVISE: Rule(Empty, Empty, feature=_F.PAGEFAULT, max_reply_fds=1),
    Request.POSTCOPY_LISTEN: Rule(Empty, feature=_F.PAGEFAULT),
    Request.POSTCOPY_END: Rule(Empty, U64, feature=_F.PAGEFAULT),
    # A reply with mmap_size 0 has no fd.
    Request.GET_INFLIGHT_FD: Rule(Inflight, Inflight, feature=_F.INFLIGHT_SHMFD, max_reply_fds=1),
    Request.SET_INFLIGHT_FD: Rule(Inflight, None, 1, 1, _F.INFLIGHT_SHMFD),
    Request.GPU_SET_SOCKET: Rule(Empty, None, 1, 1),
    Request.RESET_DEVICE: Rule(Empty, feature=_F.RESET_DEVICE),
    Request.VRING_KICK: Rule(VringState, feature=_F.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Rule(Empty, U64, feature=_F.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(SingleMemoryRegion, None, 1, 1, _F.CONFIGURE_MEM_SLOTS),
    # No fd belongs here, but libblkio sends one; the receiver closes it unused.
    Request.REM_MEM_REG: Rule(SingleMemoryRegion, None, 0, 1, _F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(U64, feature=_F.STATUS),
    Request.GET_STATUS: Rule(Empty, U64, feature=_F.STATUS),
    Request.GET_SHARED_OBJECT: Rule(Opaque, Opaque, feature=_F.SHARED_OBJECT, max_reply_fds=1),
    Request.SET_DEVICE_STATE_FD: Rule(DeviceState, U64, 1, 1, _F.DEVICE_STATE, max_reply_fds=1),
    Request.CHECK_DEVICE_STATE: Rule(Empty, U64, feature=_F.DEVICE_STATE),
}

#: Back end to front end, on the channel that SET_BACKEND_REQ_FD set up (so all of them need BACKEND_REQ too).
BACKEND_RULES: dict[BackendRequest, Rule] = {
    BackendRequest.IOTLB_MSG: Rule(Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Rule(Empty, feature=_F.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Rule(VringArea, None, 0, 1, _F.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Rule(VringState, feature=_F.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Rule(VringState, feature=_F.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Rule(Opaque, feature=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Rule(Opaque, feature=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: Rule(Opaque, U64, feature=_F.SHARED_OBJECT, max_reply_fds=1),
}
