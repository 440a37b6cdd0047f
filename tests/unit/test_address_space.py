"""The quotas for mappings of front ends: guaranteed shares, the common rest, and that everything is returned."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

import pytest

from ringplane.guest_memory import address_space
from ringplane.guest_memory.address_space import AddressSpace, BadMemory, Pool, Share
from ringplane.guest_memory.regions import Mapping, Region

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def shares(total: int, count: int) -> list[Share]:
    pool = Pool(total)
    return [pool.share() for _ in range(count)]


def test_one_user_may_take_all_but_the_guaranteed_shares_of_others() -> None:
    first, second, third = shares(120, 3)
    assert first.take(81) == 80
    assert first.take(80) is None
    assert [share.take(21) for share in (second, third)] == [20, 20]
    assert [share.take(20) for share in (second, third)] == [None, None]
    assert first.take(1) == 80


def test_returned_amounts_can_be_taken_again() -> None:
    first, second = shares(80, 2)
    assert first.take(60) is None
    assert second.take(30) == 20
    first.give_back(25)
    assert second.take(30) is None
    assert first.take(25) is not None


def test_a_single_user_may_take_everything() -> None:
    (share,) = shares(100, 1)
    assert share.take(100) is None
    assert share.take(1) == 100


def test_shares_of_users_who_come_and_go() -> None:
    pool = Pool(120)
    first = pool.share()
    assert first.take(120) is None
    # Its guaranteed half is a quarter now, and everything beyond is lent; the other one still gets its own quarter.
    second = pool.share()
    assert second.take(31) == 30
    assert second.take(30) is None
    first.give_back(60)
    assert second.take(31) == 60
    assert second.take(30) is None
    first.give_back(60)
    first.end()
    assert second.take(60) is None
    assert second.take(1) == 120


def test_guaranteed_shares_are_always_available() -> None:
    """Random use: the total is never exceeded, and each can take its guaranteed share."""
    draw = random.Random(1)
    all_shares = shares(1000, 7)
    held: dict[Share, list[int]] = {share: [] for share in all_shares}
    for _ in range(20_000):
        share, amount = draw.choice(all_shares), draw.randrange(1, 200)
        if held[share] and draw.random() < 0.5:
            share.give_back(held[share].pop(draw.randrange(len(held[share]))))
            continue
        used = sum(held[share])
        limit = share.take(amount)
        if limit is None:
            held[share].append(amount)
        else:
            assert used + amount > limit >= share.pool.guaranteed
        assert sum(map(sum, held.values())) <= 1000


@pytest.mark.parametrize(("stack", "limit", "usable"), [(0x7FFD_0000_1000, -1, 1 << 46), (0x7F_FFFF_F000, -1, 1 << 38)])
def test_half_of_the_address_space_is_usable(
    monkeypatch: pytest.MonkeyPatch, stack: int, limit: int, usable: int
) -> None:
    monkeypatch.setattr("ringplane.system.libc.stack_address", lambda: stack)
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert address_space.usable_bytes() == usable


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1000, 1000))
    assert address_space.usable_bytes() == 500
    assert address_space.usable_mappings() == 500


def test_a_mapping_takes_whole_pages_until_it_is_unmapped(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_space, "usable_bytes", lambda: 4 * PAGE)
    quota = AddressSpace().quota()
    mappings = [Mapping(fd, PAGE + 1, 0, quota=quota), Mapping(fd, 2 * PAGE, 0, quota=quota)]
    with pytest.raises(BadMemory, match=r"^4 KiB beside the 16 KiB that are mapped exceed .*, which is 16 KiB"):
        Mapping(fd, 1, 0, quota=quota)
    mappings.pop()
    gc.collect()
    mappings.append(Mapping(fd, PAGE, PAGE, quota=quota))
    with pytest.raises(BadMemory):
        Mapping(fd, 2 * PAGE, 0, quota=quota)


def test_failed_mappings_take_nothing_from_the_quota(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_space, "usable_bytes", lambda: 4 * PAGE)
    monkeypatch.setattr(address_space, "usable_mappings", lambda: 1)
    quota = AddressSpace().quota()
    eventfd = os.eventfd(0)
    for _ in range(3):
        with pytest.raises(OSError, match="No such device"):
            Mapping(eventfd, 4 * PAGE, 0, quota=quota)
        with pytest.raises(BadMemory):
            Region.map(0, 0, 5 * PAGE, 0, fd, quota=quota)
    os.close(eventfd)
    assert Region.map(0, 0, 4 * PAGE, 0, fd, quota=quota)


def test_mappings_are_counted_too(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_space, "usable_mappings", lambda: 8)
    space = AddressSpace()
    greedy, modest = space.quota(), space.quota()
    mappings = [Mapping(fd, PAGE, 0, quota=greedy) for _ in range(6)]
    with pytest.raises(BadMemory, match=r"one more mapping exceeds the limit of this disk's front end, which is 6"):
        Mapping(fd, PAGE, 0, quota=greedy)
    mappings += [Mapping(fd, PAGE, 0, quota=modest) for _ in range(2)]
