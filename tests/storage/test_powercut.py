"""A short run of the power cuts; powercut.py runs them by hand for any length of time."""

from __future__ import annotations

import random

import pytest

from ringplane.virtio.blk import VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT

from .powercut import Asked, Cuts, Event, Write, record, run

REQUESTS = 1500


@pytest.mark.parametrize("write_through", [False, True], ids=["flushes", "write-through"])
@pytest.mark.parametrize("buffered", [False, True], ids=["direct", "buffered"])
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_power_is_cut_at_each_point(engine: str, buffered: bool, write_through: bool) -> None:
    tally = run(random.getrandbits(32), REQUESTS, engine=engine, buffered=buffered, write_through=write_through)
    # Otherwise it would prove nothing. (On slow machines the page cache joins more writes into one.)
    assert tally.cuts > 10, tally
    assert tally.contents > REQUESTS, tally
    assert tally.flushes > 50, tally
    print(tally)


def test_a_disk_that_never_syncs_is_detected() -> None:
    """The record of a correct disk is changed into that of one whose syncs cover nothing."""
    recorder, asked = record(1, 500, engine="io_uring", buffered=False, write_through=False)
    for event in recorder.events:
        event.covers = 0
    with pytest.raises(AssertionError, match="is promised"):
        Cuts(recorder.events, recorder.writes, asked, write_through=False).look()


@pytest.mark.parametrize("uncovered", [0, 1], ids=["all", "all but the last"])
def test_a_sync_that_covers_too_little_is_detected(uncovered: int) -> None:
    """The smallest possible record: two completed writes, and a flush whose sync started right after them."""
    writes = [Write(0, [1], stable=False), Write(8, [2], stable=False)]
    events = [
        Event("begin", 0),
        Event("begin", 1),
        Event("end", 0),
        Event("end", 1),
        Event("sync", covers=4 - uncovered),
    ]
    asked = [
        Asked(-1, 0, 0, 0, 0),
        Asked(VIRTIO_BLK_T_OUT, 0, 1, submitted=1, submit_clock=0, answered=3, answer_clock=4),
        Asked(VIRTIO_BLK_T_OUT, 8, 1, submitted=2, submit_clock=0, answered=3, answer_clock=4),
        Asked(VIRTIO_BLK_T_FLUSH, 0, 0, submitted=4, submit_clock=4, answered=5, answer_clock=5),
    ]
    cuts = Cuts(events, writes, asked, write_through=False)
    if not uncovered:
        assert cuts.look().flushes == 1
        return
    with pytest.raises(AssertionError, match="after event 5: sector 8 may hold what was there at first"):
        cuts.look()
