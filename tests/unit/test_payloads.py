"""The payloads: decoding, encoding and errors."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.vhost_user import payloads as m

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
regions = st.builds(m.MemoryRegion, u64, u64, u64, u64)


def config(payload: bytes, offset: int, flags: int) -> m.Config:
    return m.Config(offset, len(payload), flags, payload)


PAYLOADS: dict[type[m.Payload], st.SearchStrategy[Any]] = {
    m.Empty: st.builds(m.Empty),
    m.Opaque: st.builds(m.Opaque, st.binary(max_size=4096)),
    m.U64: st.builds(m.U64, u64),
    m.VringState: st.builds(m.VringState, u32, u32),
    m.VringAddr: st.builds(m.VringAddr, u32, u32, u64, u64, u64, u64),
    m.VringFd: st.builds(m.VringFd, u8, st.booleans()),
    m.MemoryTable: st.builds(m.MemoryTable, st.lists(regions, max_size=8).map(tuple)),
    m.SingleMemoryRegion: st.builds(m.SingleMemoryRegion, regions),
    m.LogRegion: st.builds(m.LogRegion, u64, u64),
    m.Iotlb: st.builds(m.Iotlb, u64, u64, u64, u8, u8),
    m.Config: st.builds(config, st.binary(max_size=256), u32, u32),
    m.VringArea: st.builds(m.VringArea, u64, u64, u64),
    m.Inflight: st.builds(m.Inflight, u64, u64, u16, u16),
    m.DeviceState: st.builds(m.DeviceState, u32, u32),
}


def test_every_payload_type_has_a_strategy() -> None:
    # By name: a dataclass with slots is a new class; the original one is a subclass too until it is collected.
    assert {payload_type.__name__ for payload_type in PAYLOADS} == {sub.__name__ for sub in m.Payload.__subclasses__()}


@given(st.one_of(*PAYLOADS.values()))
def test_round_trip(payload: m.Payload) -> None:
    data = payload.encode()
    payload.check_size(len(data))
    assert type(payload).decode(data) == payload


@given(st.sampled_from(list(PAYLOADS)), st.binary(max_size=600))
def test_decoding_random_bytes_gives_a_payload_or_a_protocol_error(payload_type: type[m.Payload], data: bytes) -> None:
    try:
        payload = payload_type.decode(data)
    except m.ProtocolError:
        return
    assert payload_type.decode(payload.encode()) == payload


@pytest.mark.parametrize(
    ("payload", "data"),
    [
        (m.Empty(), ""),
        (m.U64(0x1122334455667788), "8877665544332211"),
        (m.VringState(1, 256), "01000000 00010000"),
        (
            m.VringAddr(1, 2, 3, 4, 5, 6),
            "01000000 02000000 0300000000000000 0400000000000000 0500000000000000 0600000000000000",
        ),
        (m.VringFd(3), "0300000000000000"),
        (m.VringFd(255, no_fd=True), "ff01000000000000"),
        (
            m.MemoryTable((m.MemoryRegion(1, 2, 3, 4),)),
            "01000000 00000000 0100000000000000 0200000000000000 0300000000000000 0400000000000000",
        ),
        (
            m.SingleMemoryRegion(m.MemoryRegion(1, 2, 3, 4)),
            "0000000000000000 0100000000000000 0200000000000000 0300000000000000 0400000000000000",
        ),
        (m.LogRegion(4096, 8), "0010000000000000 0800000000000000"),
        (m.Config(8, 2, 1, b"\xaa\xbb"), "08000000 02000000 01000000 aabb"),
        (m.Inflight(1, 2, 3, 4), "0100000000000000 0200000000000000 0300 0400 00000000"),
        (m.Iotlb(1, 2, 3, 3, 2), "0100000000000000 0200000000000000 0300000000000000 03 02 000000000000"),
        (m.DeviceState(1, 0), "01000000 00000000"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.skipif(struct.pack("=H", 1) != b"\1\0", reason="the bytes are written for a little-endian host")
def test_layout(payload: m.Payload, data: str) -> None:
    assert payload.encode() == bytes.fromhex(data)
    assert type(payload).decode(bytes.fromhex(data)) == payload


@pytest.mark.parametrize("payload", [m.Inflight(1, 2, 3, 4), m.Iotlb(1, 2, 3, 4, 5)])
def test_the_padding_of_a_c_struct_may_be_missing(payload: m.Payload) -> None:
    unpadded = payload.encode()[: payload.sizes[0]]
    assert len(unpadded) < len(payload.encode())
    assert type(payload).decode(unpadded) == payload


@pytest.mark.parametrize(
    ("payload_type", "data", "words"),
    [
        (m.Empty, b"x", "size is 1 bytes, must be 0"),
        (m.U64, bytes(7), "size is 7 bytes, must be 8"),
        (m.U64, bytes(9), "size is 9 bytes, must be 8"),
        (m.Inflight, bytes(22), "size is 22 bytes, must be 20 or 24"),
        (m.Opaque, bytes(4097), "must be from 0 to 4096"),
        (m.VringFd, struct.pack("=Q", 1 << 9), "only bits 0 to 8"),
        (m.MemoryTable, bytes(0), "must be from 8 to 264 in steps of 32"),
        (m.MemoryTable, struct.pack("=II", 2, 0) + bytes(32), "says 2 regions, but carries 1"),
        (m.MemoryTable, struct.pack("=II", 9, 0) + bytes(256), "says 9 regions, at most 8"),
        (m.MemoryTable, struct.pack("=II", 9, 0) + bytes(288), "must be from 8 to 264"),
        (m.Config, bytes(11), "must be from 12 to 268"),
        (m.Config, struct.pack("=III", 0, 8, 0) + bytes(7), "config size is 8 bytes, but it carries 7"),
        (m.Config, struct.pack("=III", 0, 257, 0) + bytes(257), "must be from 12 to 268"),
    ],
)
def test_decode_refuses(payload_type: type[m.Payload], data: bytes, words: str) -> None:
    with pytest.raises(m.ProtocolError, match=words):
        payload_type.decode(data)


@pytest.mark.parametrize(
    "payload",
    [
        m.U64(1 << 64),
        m.U64(-1),
        m.VringState(0, 1 << 32),
        m.VringFd(256),
        m.VringFd(-1),
        m.Opaque(bytes(4097)),
        m.MemoryTable((m.MemoryRegion(0, 0, 0, 0),) * 9),
        m.MemoryTable((m.MemoryRegion(0, -1, 0, 0),)),
        m.Config(0, 1, 0, b""),
        m.Config.asking_for(0, 257),
    ],
    ids=str,
)
def test_encode_refuses(payload: m.Payload) -> None:
    with pytest.raises(m.UsageError):
        payload.encode()


def test_a_memory_table_may_have_room_for_more_regions_than_it_has() -> None:
    table = m.MemoryTable((m.MemoryRegion(1, 2, 3, 4),))
    assert m.MemoryTable.decode(table.encode() + b"\xff" * 32) == table


def test_get_config_carries_as_many_bytes_as_it_asks_for() -> None:
    assert m.Config.asking_for(8, 3) == m.Config(8, 3, 0, bytes(3))
