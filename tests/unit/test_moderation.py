"""Replies that are taken together: how long a source has its I/O thread sleep, and when the thread does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.block.io import CHANNEL
from ringplane.block.sources.moderation import BUFFERED, LONGEST, MODERATION, moderate
from ringplane.dataplane.loop import doze, find_timeout
from ringplane.dataplane.state import COALESCE, POLL, SLEEP, WORKER
from ringplane.engines.common import ENGINE
from ringplane.native.structs import new

from .on_structs import on_structs

BLOCK = 4096


class Server:
    """Replies every `gap` nanoseconds while it has requests, of which it gets another one for each."""

    def __init__(self, gap: int) -> None:
        self.channel, self.moderation = new(CHANNEL)[0], new(MODERATION)[0]
        self.now, self.gap = 1_000_000_000, gap

    def reply(self, count: int, waiting: int, size: int = BLOCK) -> int:
        """How long the thread may sleep after so many replies."""
        self.now += count * self.gap
        on_structs(moderate)(self.channel, self.moderation, self.now, count, waiting, size)
        return int(self.channel["pause"])


@pytest.mark.parametrize(("waiting", "size"), [(0, BLOCK), (1, BLOCK), (7, BLOCK), (128, BUFFERED)])
def test_few_or_large_replies_are_taken_at_once(waiting: int, size: int) -> None:
    server = Server(gap=20_000)
    assert not any(server.reply(1, waiting, size) for _ in range(50))


def test_a_quarter_of_many_replies_is_taken_together() -> None:
    server = Server(gap=10_000)
    for _ in range(50):
        pause = server.reply(8, 32)
    assert 70_000 <= pause <= 80_000


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 1 << 20)), max_size=30), st.integers(0)
)
def test_a_pause_is_never_long(replies: list[tuple[int, int, int]], gap: int) -> None:
    server = Server(gap=gap % 10**12)
    for count, waiting, size in replies:
        assert 0 <= server.reply(count, waiting, size) <= LONGEST


@pytest.fixture
def worker() -> Any:
    made = new(WORKER)[0]
    made["free"] = -1
    return made


@pytest.fixture
def channel() -> Any:
    made = new(CHANNEL)[0]
    made["pause"] = 1000
    return made


@pytest.mark.parametrize("policy", [SLEEP, COALESCE, POLL])
@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("asked", [0, 1000])
def test_only_a_thread_of_one_disk_that_does_not_poll_pauses(
    worker: Any, channel: Any, policy: int, disks: int, asked: int
) -> None:
    """The tuner compares it with a policy that does not; other disks do not wait for it."""
    worker["policy"], channel["pause"] = policy, asked
    worker["signaller"] = 0 if disks == 1 else 1 << 12
    worker["in_flight"] = 1
    expected = policy == SLEEP and disks == 1 and asked > 0
    assert on_structs(find_timeout)(worker, channel, new(ENGINE)[0]) == (asked if expected else -1)
    assert worker["pausing"] == expected


def test_what_can_be_fetched_comes_before_a_pause(worker: Any, channel: Any) -> None:
    """Kicks are off meanwhile, and the pause is still to come."""
    worker["ready"], worker["free"] = 1 << 12, 0
    assert (on_structs(doze)(worker, channel), worker["pausing"], channel["pause"]) == (0, 0, 1000)
    worker["ready"] = 0
    assert (on_structs(doze)(worker, channel), worker["pausing"]) == (1000, 1)


def test_a_pause_that_was_not_slept_is_over(worker: Any, channel: Any) -> None:
    """Something was due at once. A sleep without limit must not wait for as many events as a pause does."""
    worker["pausing"], worker["policy"] = 1, COALESCE
    assert on_structs(find_timeout)(worker, channel, new(ENGINE)[0]) == -1
    assert worker["pausing"] == 0
