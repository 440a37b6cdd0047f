"""The payloads of the vhost-user messages, as bytes and as values.

Source: QEMU's docs/interop/vhost-user.rst; each item names its section. All numbers are in the host's byte order and,
unless a docstring says otherwise, unsigned and without padding between fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError  # noqa: N812 (the standard library's name is in lower case)
from typing import Any, ClassVar, Self

from ringplane.vhost_user.messages import (
    MAX_CONFIG_SIZE,
    MAX_OPAQUE_SIZE,
    MAX_REGIONS,
    ProtocolError,
    UsageError,
)


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
