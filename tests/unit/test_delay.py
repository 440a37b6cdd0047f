"""The layer `delay`: what it delays, that it does not lose or mix anything, and that all else continues meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringplane
from ringplane.block.layers.delay import DelayPart
from ringplane.driver import Driver
from ringplane.options.delay_options import Delay, parse_delay
from ringplane.options.zone_options import ZoneModel

from .rig import (
    FLUSH,
    IN,
    OK,
    OUT,
    PATIENCE,
    Answer,
    Line,
    Pending,
    RigFactory,
    eventually,
    pattern,
    rig_factory,
)

SIZE = 1 << 20
DISK = pattern(SIZE)
MS, HOUR = 1_000_000, 3600 * 10**9


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


@pytest.mark.parametrize("delayed", ["read", "write", "flush"])
def test_only_the_chosen_requests_take_longer(make_rig: RigFactory, delayed: str) -> None:
    """Without an upper bound: a slow machine may take any time."""
    line = make_rig(layers=[DelayPart(**{delayed: 20 * MS})]).line().start()
    wanted = {"read": Answer(OK, 513, DISK[:512]), "write": Answer(OK, 1, b""), "flush": Answer(OK, 1, b"")}
    requests = {"read": (IN, 0, b"", 512), "write": (OUT, 8, bytes(512), 0), "flush": (FLUSH, 0, b"", 0)}
    for name, (kind, sector, data, room) in requests.items():
        start = time.monotonic_ns()
        assert line.do(kind, sector, data, room) == wanted[name]
        assert time.monotonic_ns() - start >= (20 * MS if name == delayed else 0)


def release(line: Line) -> None:
    """Let the time of all I/Os that wait be over."""
    ios = line.worker.state.channel.ios
    line.worker.call(lambda: ios["due"].fill(0)).result(PATIENCE)


def collect_until(line: Line, request: Pending) -> list[Pending]:
    """Poll the ring until this request is completed; returns all that are completed then."""
    done: list[Pending] = []

    def is_done() -> bool:
        done.extend(line.ring.collect())
        return request in done

    assert eventually(is_done)
    return done


@pytest.mark.parametrize("in_order", [False, True])
def test_requests_that_are_not_delayed_pass_those_that_are(make_rig: RigFactory, in_order: bool) -> None:
    """But not on a ring whose requests are used in order."""
    line = make_rig(layers=[DelayPart(read=HOUR)]).line().start(in_order=in_order)
    reads = [line.put(IN, number, room=512) for number in range(4)]
    write = line.put(OUT, 64, pattern(512, 7))
    line.kick()
    if not in_order:
        assert collect_until(line, write) == [write]
    assert eventually(lambda: line.rig.content()[64 * 512 :][:512] == pattern(512, 7))
    line.turn_is_over()
    assert line.queue.in_flight == len(reads) + in_order
    release(line)
    line.wait()
    for number, request in enumerate(reads):
        assert line.answer(request) == Answer(OK, 513, DISK[512 * number :][:512])


def test_a_drain_waits_for_what_is_delayed(make_rig: RigFactory) -> None:
    line = make_rig(layers=[DelayPart(flush=HOUR)]).line().start()
    flush = line.put(FLUSH)
    line.kick()
    assert eventually(lambda: line.queue.in_flight == 1)
    drained = line.worker.stop_queue(line.queue)
    line.turn_is_over()
    assert not drained.done()
    release(line)
    drained.result(PATIENCE)
    assert line.ring.collect() == [flush]


def test_layers_follow_each_other(make_rig: RigFactory) -> None:
    """Two delays on one disk add up, and so does one that comes on top of nothing else."""
    line = make_rig(layers=[DelayPart(read=10 * MS), DelayPart(read=15 * MS, write=1)]).line().start()
    start = time.monotonic_ns()
    assert line.do(IN, 1, room=1024) == Answer(OK, 1025, DISK[512:1536])
    assert time.monotonic_ns() - start >= 25 * MS


@settings(max_examples=20)
@given(
    times=st.lists(st.integers(0, 3 * MS), min_size=3, max_size=3),
    kinds=st.lists(st.sampled_from([IN, OUT, FLUSH]), min_size=1, max_size=60),
)
def test_any_mixture_is_served_like_without_a_delay(make_rig: RigFactory, times: list[int], kinds: list[int]) -> None:
    """Each request has a place of its own, so any order of completion is right."""
    read, write, flush = times
    line = make_rig(layers=[DelayPart(read=read, write=write, flush=flush)]).line().start()
    requests = []
    for place, kind in enumerate(kinds):
        data = pattern(1024, place) if kind == OUT else b""
        requests.append(line.put(kind, 2 * place, data, 1024 if kind == IN else 0))
        line.kick()
    line.wait()
    content = line.rig.content()
    for place, (kind, request) in enumerate(zip(kinds, requests, strict=True)):
        here = DISK[1024 * place :][:1024]
        assert line.answer(request) == (Answer(OK, 1025, here) if kind == IN else Answer(OK, 1, b""))
        if kind == OUT:
            assert content[1024 * place :][:1024] == pattern(1024, place)
    line.stop()


@pytest.mark.parametrize(
    ("text", "delay"),
    [
        ("5", Delay(5, 5, 5)),
        ("0.5", Delay(0.5, 0.5, 0.5)),
        ("read=5", Delay(read=5)),
        ("read=5, flush=20.5", Delay(read=5, flush=20.5)),
        ("3,write=0", Delay(3, 0, 3)),
    ],
)
def test_what_users_write(text: str, delay: Delay) -> None:
    assert parse_delay(text) == delay


@pytest.mark.parametrize("text", ["", "-1", "x", "read", "reed=5", "read=", "read=nan", "1,", "3600001"])
def test_what_users_should_not_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"milliseconds|read=MS"):
        parse_delay(text)


@pytest.mark.parametrize("zoned", [None, ZoneModel(1 << 20, 1 << 20)])
def test_a_served_disk_with_a_delay(tmp_path: Path, zoned: ZoneModel | None) -> None:
    """As a user makes it; with zones the delay lies below them."""
    options: dict[str, Any] = {"create": 4 << 20, "delay": Delay(write=30), "zoned": zoned}
    with (
        ringplane.serve(tmp_path / "disk.img", tmp_path / "socket", **options) as export,
        Driver(tmp_path / "socket") as driver,
    ):
        start = time.monotonic_ns()
        driver.write(0, pattern(4096))
        assert time.monotonic_ns() - start >= 30 * MS
        assert driver.read(0, 4096) == pattern(4096)
        driver.flush()
        assert export.counters["write"].requests == 1
