"""Power cuts for a few seconds; by hand it runs as long as one likes (powercut.py)."""

from __future__ import annotations

import random

import pytest

from .powercut import Cuts, record, run

REQUESTS = 1500


@pytest.mark.parametrize("write_through", [False, True], ids=["flushes", "write-through"])
@pytest.mark.parametrize("buffered", [False, True], ids=["direct", "buffered"])
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_power_is_cut_at_each_point(engine: str, buffered: bool, write_through: bool) -> None:
    tally = run(random.getrandbits(32), REQUESTS, engine=engine, buffered=buffered, write_through=write_through)
    # Else it would be a proof about nothing.
    assert tally.cuts > REQUESTS
    assert tally.flushes > 50, tally
    print(tally)


@pytest.mark.parametrize("broken", ["nothing is synced", "a sync covers too little"])
def test_a_broken_promise_is_found(broken: str) -> None:
    """The record of a disk that keeps its promises, made into one of a disk that does not."""
    recorder, asked = record(1, 500, engine="io_uring", buffered=False, write_through=False)
    for event in recorder.events:
        if event.what == "sync":
            event.covers = 0 if broken == "nothing is synced" else event.covers - 40
    with pytest.raises(AssertionError, match="is promised"):
        Cuts(recorder, asked, write_through=False).look()
