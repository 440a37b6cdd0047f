"""The vhost-user messages: their numbers, their payloads as bytes, and the rules for each of them.

Source: QEMU's docs/interop/vhost-user.rst; each item names its section. All numbers are in the host's byte order and,
unless a docstring says otherwise, unsigned and without padding between fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from struct import error as StructError  # noqa: N812 (the standard library's name is in lower case)
from typing import Any, ClassVar, Self

# Section "Header": request, flags and payload size, 32 bits each.
HEADER = Struct("=III")
HEADER_SIZE = HEADER.size
VERSION = 0x1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8

# Bits of the feature mask that belong to vhost-user rather than to the device (sections "Communication", "Migration").
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
# The device marks what it writes in the dirty log (section "Migration").
VHOST_F_LOG_ALL = 1 << 26
# Bit of VringAddr.flags: writes to the used ring are logged (section "Migration").
VHOST_VRING_F_LOG = 1 << 0

MAX_REGIONS = 8
MAX_FDS = 8
MAX_CONFIG_SIZE = 256
# The longest payload read for a request whose layout is not known here; the specification has no such limit.
MAX_OPAQUE_SIZE = 4096


class ProtocolError(Exception):
    """The peer broke a rule of the protocol; the text says which one, in words."""


class UsageError(Exception):
    """Our own code asked for something that the protocol does not allow; nothing was sent."""


class Request(IntEnum):
    """Requests that the front end sends (section "Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Requests that the back end sends on its own channel (section "Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES (section "Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    SHMEM = 1 << 20


class Payload(ABC):
    """What follows the header. Each subclass is one layout of the section "Payload"."""

    __slots__ = ()
    #: The sizes in bytes that this layout can have.
    sizes: ClassVar[Sequence[int]]

    @abstractmethod
    def encode(self) -> bytes:
        """The payload's bytes; UsageError if a value does not fit its field."""

    @classmethod
    @abstractmethod
    def decode(cls, data: bytes) -> Self:
        """The payload in `data`; ProtocolError if size or contents break the layout."""

    @property
    def fd_count(self) -> int | None:
        """How many fds must come with a request that has this payload, or None if only its `Rule` says it."""
        return None

    @classmethod
    def check_size(cls, size: int) -> None:
        """Raise ProtocolError unless a payload of this type can have `size` bytes."""
        if size not in cls.sizes:
            raise ProtocolError(f"its payload's size is {size} bytes, must be {_in_words(cls.sizes)}")


def _in_words(sizes: Sequence[int]) -> str:
    if not isinstance(sizes, range):
        return " or ".join(map(str, sizes))
    steps = f" in steps of {sizes.step}" if sizes.step > 1 else ""
    return f"from {sizes[0]} to {sizes[-1]}{steps}"


def _pack(layout: Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except StructError as error:
        raise UsageError(f"a value does not fit its field: {error}") from error


def _unpack(payload_type: type[Payload], layout: Struct, data: bytes) -> tuple[Any, ...]:
    """The fields in `data`, which may lack the padding that C puts at the end of a struct."""
    payload_type.check_size(len(data))
    return layout.unpack(data.ljust(layout.size, b"\0"))


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload: zero bytes."""

    sizes = (0,)

    def encode(self) -> bytes:
        return b""

    @classmethod
    def decode(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        return cls()


@dataclass(frozen=True, slots=True)
class Opaque(Payload):
    """Bytes whose layout is not of interest here, at most MAX_OPAQUE_SIZE of them."""

    sizes = range(MAX_OPAQUE_SIZE + 1)
    data: bytes = b""

    def encode(self) -> bytes:
        if len(self.data) > MAX_OPAQUE_SIZE:
            raise UsageError(f"a payload has {len(self.data)} bytes, must be {_in_words(self.sizes)}")
        return self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        return cls(bytes(data))


_U64 = Struct("=Q")


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """Section "A single 64-bit integer". As an acknowledgement, 0 is success and anything else failure."""

    sizes = (_U64.size,)
    value: int

    def encode(self) -> bytes:
        return _pack(_U64, self.value)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _U64, data))


_VRING_STATE = Struct("=II")


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """Section "A vring state description": index u32, num u32.

    It is also the layout of "A vring descriptor index for split virtqueues" and of "Vring descriptor indices for packed
    virtqueues", where `num` holds the index or indices.
    """

    sizes = (_VRING_STATE.size,)
    index: int
    num: int

    def encode(self) -> bytes:
        return _pack(_VRING_STATE, self.index, self.num)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _VRING_STATE, data))


_VRING_ADDR = Struct("=IIQQQQ")


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Section "A vring address description": index u32, flags u32, then four u64.

    `descriptor`, `used` and `available` are user addresses (IOVAs if VIRTIO_F_ACCESS_PLATFORM was negotiated); `log` is
    a guest address and means something only if `flags` has VHOST_VRING_F_LOG.
    """

    sizes = (_VRING_ADDR.size,)
    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    def encode(self) -> bytes:
        return _pack(_VRING_ADDR, self.index, self.flags, self.descriptor, self.used, self.available, self.log)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _VRING_ADDR, data))


@dataclass(frozen=True, slots=True)
class VringFd(Payload):
    """Payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: a u64 with the index in bits 0 to 7.

    Bit 8 (`no_fd`) says that no fd comes with the message. The bits above have no meaning and must be zero: a front end
    that put a larger index there would otherwise change the wrong ring.
    """

    INDEX_MASK = 0xFF
    NO_FD = 0x100

    sizes = (_U64.size,)
    index: int
    no_fd: bool = False

    @property
    def fd_count(self) -> int:
        return 0 if self.no_fd else 1

    def encode(self) -> bytes:
        if not 0 <= self.index <= self.INDEX_MASK:
            raise UsageError(f"vring index {self.index} does not fit in 8 bits")
        return _pack(_U64, self.index | (self.NO_FD if self.no_fd else 0))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        (value,) = _unpack(cls, _U64, data)
        if value > cls.INDEX_MASK | cls.NO_FD:
            raise ProtocolError(f"its payload is {value:#x}, but only bits 0 to 8 may be set")
        return cls(value & cls.INDEX_MASK, bool(value & cls.NO_FD))


_REGION = Struct("=QQQQ")


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Section "Memory region description": four u64, in bytes; never sent alone.

    The region covers `size` bytes from `guest_address` in the guest and from `user_address` in the front end, and
    begins `mmap_offset` bytes into the fd that comes with it. Sums may exceed 64 bits; the mapping code checks that.
    """

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    def encode(self) -> bytes:
        """The region's 32 bytes; UsageError if a value does not fit."""
        return _pack(_REGION, self.guest_address, self.size, self.user_address, self.mmap_offset)


_COUNT_AND_PADDING = Struct("=I4x")


@dataclass(frozen=True, slots=True)
class MemoryTable(Payload):
    """Section "Multiple Memory regions description": count u32, padding u32, then the regions, at most MAX_REGIONS.

    One fd comes with each region, in the same order.
    """

    sizes = range(_COUNT_AND_PADDING.size, _COUNT_AND_PADDING.size + MAX_REGIONS * _REGION.size + 1, _REGION.size)
    regions: tuple[MemoryRegion, ...] = ()

    @property
    def fd_count(self) -> int:
        return len(self.regions)

    def encode(self) -> bytes:
        if len(self.regions) > MAX_REGIONS:
            raise UsageError(f"a memory table has {len(self.regions)} regions, at most {MAX_REGIONS} are allowed")
        return _pack(_COUNT_AND_PADDING, len(self.regions)) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        (count,) = _COUNT_AND_PADDING.unpack_from(data)
        if count > MAX_REGIONS:
            raise ProtocolError(f"it says {count} regions, at most {MAX_REGIONS} are allowed")
        regions = data[_COUNT_AND_PADDING.size :]
        # More room than regions is not an error: user-mode Linux always sends room for two.
        if len(regions) < count * _REGION.size:
            raise ProtocolError(f"it says {count} regions, but carries {len(regions) // _REGION.size}")
        regions = regions[: count * _REGION.size]
        return cls(tuple(MemoryRegion(*fields) for fields in _REGION.iter_unpack(regions)))


_SINGLE_REGION = Struct("=8xQQQQ")


@dataclass(frozen=True, slots=True)
class SingleMemoryRegion(Payload):
    """Section "Single memory region description": padding u64, then the region."""

    sizes = (_SINGLE_REGION.size,)
    region: MemoryRegion

    def encode(self) -> bytes:
        return bytes(_SINGLE_REGION.size - _REGION.size) + self.region.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(MemoryRegion(*_unpack(cls, _SINGLE_REGION, data)))


_LOG_REGION = Struct("=QQ")


@dataclass(frozen=True, slots=True)
class LogRegion(Payload):
    """Section "Log description": size u64 and offset u64, in bytes, of the dirty log in the fd."""

    sizes = (_LOG_REGION.size,)
    size: int
    offset: int

    def encode(self) -> bytes:
        return _pack(_LOG_REGION, self.size, self.offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _LOG_REGION, data))


_IOTLB = Struct("=QQQBB6x")


@dataclass(frozen=True, slots=True)
class Iotlb(Payload):
    """Section "An IOTLB message": iova, size and user address u64, permissions u8, type u8.

    The specification shows 26 bytes; implementations send a C struct, padded to 32. Both are read, 32 are sent.
    """

    sizes = (_IOTLB.size - 6, _IOTLB.size)
    iova: int
    size: int
    user_address: int
    permissions: int
    type: int

    def encode(self) -> bytes:
        return _pack(_IOTLB, self.iova, self.size, self.user_address, self.permissions, self.type)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _IOTLB, data))


_CONFIG_HEAD = Struct("=III")


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """Section "Virtio device config space": offset, size and flags u32, then `size` bytes of the config space.

    A GET_CONFIG request carries as many (meaningless) bytes as it requests: see `asking_for`. Some back ends report
    failure by a reply with an empty `payload`, others by `Empty`.
    """

    #: Values of `flags`, used by SET_CONFIG.
    WRITABLE = 0
    LIVE_MIGRATION = 1

    sizes = range(_CONFIG_HEAD.size, _CONFIG_HEAD.size + MAX_CONFIG_SIZE + 1)
    offset: int
    size: int
    flags: int
    payload: bytes

    @classmethod
    def asking_for(cls, offset: int, size: int) -> Self:
        """The payload of a GET_CONFIG request for `size` bytes from `offset`."""
        return cls(offset, size, 0, bytes(size))

    def encode(self) -> bytes:
        if self.size != len(self.payload) or self.size > MAX_CONFIG_SIZE:
            raise UsageError(
                f"config size is {self.size} with {len(self.payload)} bytes of payload, "
                f"must be equal and at most {MAX_CONFIG_SIZE}"
            )
        return _pack(_CONFIG_HEAD, self.offset, self.size, self.flags) + self.payload

    @classmethod
    def decode(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        offset, size, flags = _CONFIG_HEAD.unpack_from(data)
        payload = bytes(data[_CONFIG_HEAD.size :])
        if size != len(payload):
            raise ProtocolError(f"its config size is {size} bytes, but it carries {len(payload)}")
        return cls(offset, size, flags, payload)


_VRING_AREA = Struct("=QQQ")


@dataclass(frozen=True, slots=True)
class VringArea(Payload):
    """Section "Vring area description": vring index and flags u64, size u64, offset u64 of an area in the fd."""

    sizes = (_VRING_AREA.size,)
    index_and_flags: int
    size: int
    offset: int

    def encode(self) -> bytes:
        return _pack(_VRING_AREA, self.index_and_flags, self.size, self.offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _VRING_AREA, data))


_INFLIGHT = Struct("=QQHH4x")


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """Section "Inflight description": mmap size u64, mmap offset u64 (bytes), number of queues u16, queue size u16.

    The specification shows 20 bytes; implementations send a C struct, padded to 24, and QEMU takes a reply of no other
    size. Both are read, 24 are sent.
    """

    sizes = (_INFLIGHT.size - 4, _INFLIGHT.size)
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def encode(self) -> bytes:
        return _pack(_INFLIGHT, self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _INFLIGHT, data))


_DEVICE_STATE = Struct("=II")


@dataclass(frozen=True, slots=True)
class DeviceState(Payload):
    """Section "Device state transfer parameters": direction u32 (0 save, 1 load), phase u32 (0 stopped)."""

    sizes = (_DEVICE_STATE.size,)
    direction: int
    phase: int

    def encode(self) -> bytes:
        return _pack(_DEVICE_STATE, self.direction, self.phase)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*_unpack(cls, _DEVICE_STATE, data))


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
