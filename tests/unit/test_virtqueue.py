"""The driver's end of the split ring against a device in plain Python, written from the specification."""

import ctypes
import random
import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.driver.virtqueue import NO_ROOM, BadUsed, Ring, peek, poke
from ringplane.virtio.split import DESC_SIZE, USED_ELEM_SIZE, USED_FLAGS, USED_IDX, USED_RING

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC = struct.Struct("<QIHH")


class Memory:
    """Guest memory: `size` bytes at `address`, which is guest-physical address 0."""

    def __init__(self, size=1 << 16):
        self._buffer = ctypes.create_string_buffer(size + 64)
        self.address = -(-ctypes.addressof(self._buffer) // 64) * 64


class Device:
    """The device's end, following virtio 1.2 section 2.7 step by step; all addresses are guest-physical."""

    def __init__(self, ring, base=0):
        self.ring = ring
        self.last_avail = self.used_index = base

    def u16(self, address):
        return struct.unpack("<H", peek(address, 2))[0]

    def take(self):
        """The next available chain: its head and (address, length, writable) for each buffer, or None."""
        if self.last_avail == self.u16(self.ring.avail + 2):
            return None
        head = self.u16(self.ring.avail + 4 + 2 * (self.last_avail % self.ring.size))
        self.last_avail = (self.last_avail + 1) % 65536
        return head, self.walk(self.ring.desc, head)

    def walk(self, table, index):
        buffers = []
        while True:
            addr, length, flags, following = DESC.unpack(peek(table + index * DESC_SIZE, DESC_SIZE))
            if flags & INDIRECT:
                assert flags == INDIRECT
                assert not buffers
                return self.walk(self.ring.memory + addr, 0)
            buffers.append((addr, length, bool(flags & WRITE)))
            if not flags & NEXT:
                return buffers
            index = following

    def want_kick(self, wanted, event_idx):
        if event_idx:
            event = self.last_avail if wanted else self.last_avail - 1
            self.ring.poke16(self.ring.used + USED_RING + USED_ELEM_SIZE * self.ring.size, event)
        else:
            self.ring.poke16(self.ring.used + USED_FLAGS, 0 if wanted else 1)

    def use(self, head, length):
        """Put one chain into the used ring; returns whether the driver wants a call."""
        element = self.ring.used + USED_RING + USED_ELEM_SIZE * (self.used_index % self.ring.size)
        poke(element, struct.pack("<II", head, length))
        old, self.used_index = self.used_index, (self.used_index + 1) % 65536
        self.ring.poke16(self.ring.used + USED_IDX, self.used_index)
        if self.ring.state["event_idx"]:
            event = self.u16(self.ring.avail + 4 + 2 * self.ring.size)
            return (self.used_index - event - 1) % 65536 < (self.used_index - old) % 65536
        return not self.u16(self.ring.avail) & 1


def make_ring(size=8, event_idx=True, base=0):
    memory = Memory()
    ring = Ring(memory.address, memory.address, size, event_idx)
    ring.reset(base)
    ring.keep = memory
    return ring, Device(ring, base)


def table_of(ring, token):
    return ring.memory + 32768 + (token % 64) * 16 * DESC_SIZE


SEGMENTS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=300)
@given(
    size=st.sampled_from([1, 2, 4, 8, 16]),
    event_idx=st.booleans(),
    base=st.sampled_from([0, 1, 32767, 65530, 65535]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), SEGMENTS, st.booleans()),
            st.tuples(st.just("publish"), st.booleans()),
            st.tuples(st.just("take")),
            st.tuples(st.just("use"), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False)),
            st.tuples(st.just("reap")),
        ),
        max_size=60,
    ),
)
def test_chains_go_to_the_device_and_come_back(size, event_idx, base, steps):
    ring, device = make_ring(size, event_idx, base)
    token, free = 0, size
    hidden, visible, taken, used = deque(), deque(), [], deque()
    for step, *args in steps:
        if step == "add":
            segments, indirect = args
            ours = [(ring.memory + address, length, writable) for address, length, writable in segments]
            head = ring.add(ours, token, table_of(ring, token) if indirect and token < 64 else 0)
            needed = 1 if indirect and token < 64 else len(segments)
            assert (head == NO_ROOM) == (needed > free)
            if head != NO_ROOM:
                free -= needed
                hidden.append((token, head, segments, needed))
                token += 1
        elif step == "publish":
            (wanted,) = args
            device.want_kick(wanted, event_idx)
            # With an event index the kick is requested for the chain after the last one taken.
            expected = wanted and (not event_idx or (bool(hidden) and not visible))
            assert ring.publish() == expected
            visible += hidden
            hidden.clear()
        elif step == "take":
            chain = device.take()
            if not visible:
                assert chain is None
                continue
            expected = visible.popleft()
            assert chain == (expected[1], expected[2])
            taken.append(expected)
        elif step == "use" and taken:
            length, chooser = args
            chain = taken.pop(chooser.randrange(len(taken)))
            device.use(chain[1], length)
            used.append((chain, length))
        elif step == "reap":
            reaped = ring.reap()
            if not used:
                assert reaped is None
                continue
            chain, length = used.popleft()
            assert reaped == (chain[0], length)
            free += chain[3]
    assert ring.state["free_count"] == free
    assert ring.in_flight == len(hidden) + len(visible) + len(taken) + len(used)


def test_more_chains_than_indices():
    ring, device = make_ring(size=4)
    for token in range(70_000):
        head = ring.add([(ring.memory + token % 4096, 512, False), (ring.memory, 1, True)], token)
        ring.publish()
        assert device.take() == (head, [(token % 4096, 512, False), (0, 1, True)])
        device.use(head, token)
        assert ring.reap() == (token, token)
        if token % 1000 == 0:
            assert ring.state["free_count"] == 4


def test_a_ring_filled_and_emptied_out_of_order_loses_no_descriptor():
    ring, device = make_ring(size=16)
    chooser = random.Random(1)
    for _ in range(200):
        heads = []
        while (head := ring.add([(ring.memory, 1, False)] * chooser.randint(1, 5), len(heads))) != NO_ROOM:
            heads.append(head)
        ring.publish()
        order = [device.take()[0] for _ in heads]
        assert order == heads
        chooser.shuffle(order)
        for head in order:
            device.use(head, 0)
        assert [ring.reap()[0] for _ in order] == [heads.index(head) for head in order]
        assert ring.state["free_count"] == 16


@pytest.mark.parametrize("event_idx", [False, True])
def test_calls_come_when_they_are_requested(event_idx):
    ring, device = make_ring(event_idx=event_idx)
    for token in range(4):
        ring.add([(ring.memory, 1, True)], token)
    ring.publish()
    heads = [device.take()[0] for _ in range(4)]
    assert ring.enable_notifications() == 0
    assert device.use(heads[0], 1)
    ring.disable_notifications()
    assert not device.use(heads[1], 1)
    assert ring.reap() == (0, 1)
    assert ring.enable_notifications() == 1, "one was used while calls were off: the driver must not wait"
    assert ring.reap() == (1, 1)
    assert ring.enable_notifications() == 0
    assert device.use(heads[2], 1)


def test_a_kick_is_wanted_exactly_when_the_event_index_is_passed():
    ring, device = make_ring(size=8, base=65534)
    device.want_kick(True, True)
    for _ in range(3):
        ring.add([(ring.memory, 1, True)], 0)
    assert ring.publish()
    ring.add([(ring.memory, 1, True)], 0)
    assert not ring.publish(), "the event index lies behind"
    for _ in range(4):
        device.take()
    device.want_kick(True, True)
    assert not ring.publish(), "nothing is new"
    ring.add([(ring.memory, 1, True)], 0)
    assert ring.publish()


@pytest.mark.parametrize("head", [1, 3, 4, 8, 70_000, 2**32 - 1])
def test_a_used_chain_that_is_not_in_flight_is_refused(head):
    ring, device = make_ring(size=8)
    ring.add([(ring.memory, 1, False), (ring.memory, 1, True)], 7)
    ring.publish()
    device.use(head, 1)
    with pytest.raises(BadUsed, match=f"chain {head},"):
        ring.reap()


def test_a_chain_used_twice_is_refused():
    ring, device = make_ring(size=8)
    head = ring.add([(ring.memory, 1, True)], 7)
    ring.publish()
    device.use(head, 1)
    device.use(head, 1)
    assert ring.reap() == (7, 1)
    with pytest.raises(BadUsed, match="not in flight"):
        ring.reap()


@pytest.mark.parametrize("size", [0, 3, 100, 65536])
def test_invalid_ring_sizes(size):
    memory = Memory()
    with pytest.raises(ValueError, match="power of two"):
        Ring(memory.address, memory.address, size, True)
