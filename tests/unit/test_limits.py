"""The leaky buckets against a model in exact numbers, and fair shares, on a clock that the tests drive."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.compiler.jit import compiled
from ringplane.limits.limiter import Limiter
from ringplane.limits.member import Member
from ringplane.limits.meters import READS, TICKS, WRITES, full_until
from ringplane.limits.shares import LIMITS, MEMBER, count_request, count_throttled, end_wait, may_begin_at
from ringplane.native.access import view
from ringplane.options.limit_options import check_limits, rates_of

from .on_structs import on_structs

SECOND = 1_000_000_000
START = 1000 * SECOND
MIB = 1 << 20


@compiled
def begin_at(limits, member, kind, now):
    return may_begin_at(view(limits, LIMITS), view(member, MEMBER), kind, now)


@compiled
def full_at(limits, kind):
    record = view(limits, LIMITS)
    return full_until(record.meters, record.meter_count, kind)


@compiled
def count_at(limits, member, kind, size, now):
    disk = view(member, MEMBER)
    end_wait(disk, disk.waits_until)
    count_request(view(limits, LIMITS), disk, kind, size, now)


class Bucketful:
    """A limiter with its disks, and a clock in nanoseconds."""

    def __init__(self, weights: tuple[int, ...] = (1,), **limits: int) -> None:
        self.limits = {name.replace("_", "-"): value for name, value in limits.items()}
        check_limits(self.limits)
        self.members = [Member() for _ in weights]
        for member, weight in zip(self.members, weights, strict=True):
            member.weight = weight
        self.now = START
        self.limiter = Limiter(rates_of(self.limits), self.members, now=self.now)

    def change(self, **limits: int) -> None:
        self.limits = {name.replace("_", "-"): value for name, value in limits.items()}
        self.limiter = Limiter(rates_of(self.limits), self.members, self.limiter, self.now)

    def ready_at(self, kind: int = READS, member: int = 0) -> int:
        """When the next request of this kind may begin, in nanoseconds."""
        until = begin_at(self.limiter.address, self.members[member].address, kind, self.now * TICKS)
        return -(-int(until) // TICKS)

    def limiter_ready(self) -> int:
        """When the limit alone would allow the next read."""
        return -(-int(full_at(self.limiter.address, READS)) // TICKS)

    def begin(self, size: int, kind: int = READS, member: int = 0) -> None:
        count_at(self.limiter.address, self.members[member].address, kind, size, self.now * TICKS)

    def run(self, seconds: float, size: int, kind: int = READS) -> int:
        """Begin requests whenever it is allowed; returns how many."""
        end, done = self.now + int(seconds * SECOND), 0
        while (ready := self.ready_at(kind)) < end:
            self.now = max(self.now, ready)
            self.begin(size, kind)
            done += 1
        self.now = end
        return done


@dataclass
class Model:
    """A bucket as QEMU's documentation describes it, in exact numbers: two levels that leak."""

    average: int
    highest: int = 0
    length: int = 1
    level: Fraction = Fraction(0)
    burst: Fraction = Fraction(0)
    at: int = field(default=START)

    def leak(self, now: int) -> None:
        passed = Fraction(now - self.at, SECOND)
        self.level = max(self.level - passed * self.average, Fraction(0))
        self.burst = max(self.burst - passed * self.highest, Fraction(0))
        self.at = now

    @property
    def size(self) -> Fraction:
        return Fraction(self.highest * self.length) if self.highest else Fraction(self.average, 10)

    def wait(self) -> Fraction:
        """Seconds."""
        wait = max(self.level - self.size, Fraction(0)) / self.average
        if self.length > 1:
            wait = max(wait, max(self.burst - Fraction(self.highest, 10), Fraction(0)) / self.highest)
        return wait

    def fill(self, units: Fraction) -> None:
        self.level += units
        if self.length > 1:
            self.burst += units

    def change(self, other: Model) -> Model:
        """The other one, as full as this one; a debt does not last longer than before."""
        at, level = self.at, _as_full(self.level, self.size, self.average, other.size, other.average)
        burst = Fraction(0)
        if min(self.length, other.length) > 1:
            sizes = Fraction(self.highest, 10), Fraction(other.highest, 10)
            burst = _as_full(self.burst, sizes[0], self.highest, sizes[1], other.highest)
        return replace(other, level=level, burst=burst, at=at)


def _as_full(level: Fraction, size: Fraction, rate: int, new_size: Fraction, new_rate: int) -> Fraction:
    debt = max(level - size, Fraction(0))
    return min(level, size) / size * new_size + min(debt, debt / rate * new_rate)


# Times between requests in nanoseconds, and their sizes.
STEPS = st.lists(
    st.tuples(st.integers(0, 2 * SECOND), st.integers(1, 256).map(lambda blocks: 512 * blocks)), min_size=1, max_size=30
)
LENGTHS = st.one_of(st.none(), st.tuples(st.integers(1, 100), st.integers(1, 60)))


@given(st.integers(1, 10**6), LENGTHS, st.sampled_from([0, 4096, 65536]), STEPS)
def test_requests_per_second_are_those_of_the_model(
    average: int, burst: tuple[int, int] | None, unit: int, steps: list[tuple[int, int]]
) -> None:
    """The error is a tick per request, of which 100 need a wait."""
    factor, length = burst or (0, 1)
    highest = average * factor
    more = {"total_iops_sec_max": highest, "total_iops_sec_max_length": length} if burst else {}
    bucket = Bucketful(total_iops_sec=average, size_iops_sec=unit, **more)
    model = Model(average, highest, length)
    for pause, size in steps:
        bucket.now += pause
        model.leak(bucket.now)
        assert max(bucket.ready_at() - bucket.now, 0) == pytest.approx(float(model.wait()) * SECOND, rel=1e-5, abs=100)
        bucket.begin(size)
        model.fill(max(Fraction(size, unit), Fraction(1)) if unit else Fraction(1))


@given(st.integers(1, 10**10), LENGTHS, STEPS)
def test_bytes_per_second_are_those_of_the_model(
    average: int, burst: tuple[int, int] | None, steps: list[tuple[int, int]]
) -> None:
    factor, length = burst or (0, 1)
    more = {"read_bytes_sec_max": average * factor, "read_bytes_sec_max_length": length} if burst else {}
    bucket = Bucketful(read_bytes_sec=average, **more)
    model = Model(average, average * factor, length)
    for pause, size in steps:
        bucket.now += pause
        model.leak(bucket.now)
        assert max(bucket.ready_at() - bucket.now, 0) == pytest.approx(float(model.wait()) * SECOND, rel=1e-5, abs=100)
        bucket.begin(size)
        model.fill(Fraction(size))


@pytest.mark.parametrize("iops", [100, 20_000, 333_333, 1_000_000])
def test_the_rate_of_requests_is_exact(iops: int) -> None:
    """Over as long as 5000 requests take, after the bucket is full."""
    bucket = Bucketful(total_iops_sec=iops, size_iops_sec=4096)
    bucket.begin(4096 * iops // 10)
    assert bucket.run(5000 / iops, 4096) == pytest.approx(5000, rel=1e-4, abs=1)


@pytest.mark.parametrize("size", [512, 4096, MIB])
@pytest.mark.parametrize("rate", [1_000_000, 123_456_789, 5_000_000_000])
def test_the_rate_of_bytes_is_exact(rate: int, size: int) -> None:
    """Over as long as 2000 requests take."""
    bucket = Bucketful(total_bytes_sec=rate)
    bucket.begin(rate // 10)
    seconds = 2000 * size / rate
    assert bucket.run(seconds, size) == pytest.approx(2000, rel=1e-3)


def test_a_burst_lasts_as_long_as_its_length_at_its_rate() -> None:
    """The documentation's example, with a tenth of the rates: 10, then 200 for 60 seconds and 3 more."""
    bucket = Bucketful(total_iops_sec=10, total_iops_sec_max=200, total_iops_sec_max_length=60)
    assert bucket.run(60, 4096) == pytest.approx(200 * 60, rel=0.01)
    assert bucket.run(3, 4096) == pytest.approx(200 * 3, rel=0.1)
    bucket.run(1, 4096)
    assert bucket.run(100, 4096) == pytest.approx(1000, rel=0.01)


def test_reads_do_not_use_up_the_limit_of_writes() -> None:
    bucket = Bucketful(read_iops_sec=10, write_iops_sec=20)
    bucket.run(1, 4096, READS)
    assert bucket.ready_at(WRITES) <= bucket.now
    assert bucket.run(10, 4096, READS) == pytest.approx(100, abs=1)
    bucket.run(1, 4096, WRITES)
    assert bucket.run(10, 4096, WRITES) == pytest.approx(200, abs=1)


def test_all_limits_hold_together() -> None:
    bucket = Bucketful(total_iops_sec=1000, read_bytes_sec=MIB)
    bucket.run(1, 4096)
    assert bucket.run(10, 4096) == pytest.approx(10 * MIB / 4096, abs=1)
    bucket.run(1, 512)
    assert bucket.run(10, 512) == pytest.approx(10_000, abs=1)


def test_a_request_that_is_larger_than_the_limit_is_a_debt() -> None:
    bucket = Bucketful(total_bytes_sec=MIB)
    bucket.begin(10 * MIB)
    assert bucket.ready_at() - bucket.now == pytest.approx(9.9 * SECOND, rel=1e-6)


def test_the_largest_request_at_the_lowest_limit_does_not_overflow() -> None:
    bucket = Bucketful(total_bytes_sec=1)
    for _ in range(64):
        bucket.begin(1 << 38, WRITES)
    assert bucket.ready_at(WRITES) > bucket.now + 64 * 50 * 24 * 3600 * SECOND


def test_what_nothing_limits_may_begin_at_once() -> None:
    assert Bucketful().ready_at() == 0
    assert Bucketful(read_iops_sec=1).ready_at(WRITES) == 0


# Rates of which each request costs a whole number of ticks; a burst's factor and length.
RATES = st.sampled_from([1, 5, 10, 100, 1000, 20_000, 100_000, 1_000_000])
BURSTS = st.sampled_from([(0, 1), (1, 1), (2, 1), (5, 3), (100, 60)])


def total_limits(average: int, factor: int, length: int) -> dict[str, int]:
    """None of a burst if the factor is 0."""
    limits = {"total_iops_sec": average}
    if factor:
        limits |= {"total_iops_sec_max": average * factor, "total_iops_sec_max_length": length}
    return limits


@given(
    st.tuples(RATES, BURSTS),
    st.lists(st.tuples(st.integers(0, 2 * SECOND), st.one_of(st.integers(1, 30), st.tuples(RATES, BURSTS)))),
)
def test_changes_are_those_of_the_model(
    first: tuple[int, tuple[int, int]], steps: list[tuple[int, int | tuple[int, tuple[int, int]]]]
) -> None:
    """Requests and changes in any order: the bucket stays as full as it was. Levels are rounded to ticks."""
    average, (factor, length) = first
    bucket, model = Bucketful(**total_limits(average, factor, length)), Model(average, average * factor, length)
    for pause, what in steps:
        bucket.now += pause
        model.leak(bucket.now)
        if isinstance(what, int):
            for _ in range(what):
                bucket.begin(4096)
                model.fill(Fraction(1))
        else:
            average, (factor, length) = what
            bucket.change(**total_limits(average, factor, length))
            model = model.change(Model(average, average * factor, length))
        error = 100 + 1e-6 * SECOND * float(model.size / model.average)
        assert max(bucket.ready_at() - bucket.now, 0) == pytest.approx(
            float(model.wait()) * SECOND, rel=1e-6, abs=error
        )


@given(st.lists(st.tuples(RATES, st.integers(0, SECOND // 20)), min_size=1))
def test_changes_are_no_way_to_get_more(steps: list[tuple[int, int]]) -> None:
    """Of requests that begin as soon as they may: what they cost is the time that has passed, and one bucket."""
    bucket, cost = Bucketful(total_iops_sec=1), Fraction(0)
    for rate, nanoseconds in steps:
        bucket.change(total_iops_sec=rate)
        # At the higher rates so many requests would take long here.
        seconds = min(Fraction(nanoseconds, SECOND), Fraction(200, rate))
        cost += Fraction(bucket.run(float(seconds), 4096), rate)
    passed = Fraction(bucket.now - START, SECOND)
    # A change to a higher limit makes the wait for the next request shorter.
    shortened = sum(Fraction(1, rate) for (rate, _), (later, _) in itertools.pairwise([(1, 0), *steps]) if later > rate)
    assert cost <= passed + Fraction(1, 10) + shortened + Fraction(1, min(rate for rate, _ in steps))


def test_the_same_limit_again_changes_nothing() -> None:
    """However often, and while a request that is larger than the limit is a debt."""
    bucket = Bucketful(total_bytes_sec=MIB)
    bucket.begin(10 * MIB)
    ready = bucket.ready_at()
    for _ in range(100):
        bucket.now += SECOND // 1000
        bucket.change(total_bytes_sec=MIB)
        assert bucket.ready_at() == ready


def test_a_debt_is_shorter_with_a_higher_limit_and_not_longer_with_a_lower_one() -> None:
    bucket = Bucketful(total_bytes_sec=MIB)
    bucket.begin(10 * MIB)
    bucket.change(total_bytes_sec=10 * MIB)
    assert bucket.ready_at() - bucket.now == pytest.approx(0.99 * SECOND, rel=1e-6)
    bucket.change(total_bytes_sec=MIB // 10)
    assert bucket.ready_at() - bucket.now == pytest.approx(0.99 * SECOND, rel=1e-6)


def test_what_begins_before_a_thread_knows_of_a_change_counts() -> None:
    bucket = Bucketful(total_iops_sec=1000)
    bucket.run(1, 4096)
    before = bucket.limiter
    bucket.change(total_iops_sec=1000)
    for _ in range(100):
        count_at(before.address, bucket.members[0].address, READS, 4096, bucket.now * TICKS)
    assert bucket.ready_at() - bucket.now == pytest.approx(0.1 * SECOND, abs=SECOND // 1000)


@given(
    st.tuples(RATES, BURSTS),
    st.tuples(RATES, BURSTS),
    st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(1, 30))),
    st.integers(0, SECOND),
)
def test_another_process_continues_as_after_a_change(
    first: tuple[int, tuple[int, int]],
    second: tuple[int, tuple[int, int]],
    steps: list[tuple[int, int]],
    pause: int,
) -> None:
    """With the same limits or others; in a group the levels may come once for each disk."""
    before, after = (total_limits(average, *burst) for average, burst in (first, second))
    bucket = Bucketful(**before)
    for length, requests in steps:
        bucket.now += length
        for _ in range(requests):
            bucket.begin(4096)
    saved = json.loads(json.dumps(bucket.limiter.snapshot()))
    bucket.now += pause
    other = Bucketful(**after)
    other.now = bucket.now
    for _ in range(2):
        other.limiter.resume_from(saved, bucket.now)
    if before != after:
        bucket.change(**after)
    for name, level in bucket.limiter.levels.items():
        if name in saved["empty_at"]:
            assert max(other.limiter.levels[name].empty_at, bucket.now * TICKS) == pytest.approx(
                max(level.empty_at, bucket.now * TICKS), abs=10 * TICKS, rel=1e-9
            )


def test_levels_of_a_release_with_other_limits() -> None:
    """What it does not know, or does not have any more, is left out."""
    bucket = Bucketful(total_iops_sec=10)
    bucket.limiter.resume_from({"rates": {"total-bytes-sec": 5, "later": 1}, "empty_at": {"total-bytes-sec": 1}})
    assert bucket.ready_at() < bucket.now


def test_a_new_limit_begins_empty() -> None:
    bucket = Bucketful(total_iops_sec=10)
    bucket.run(10, 4096)
    bucket.change(total_bytes_sec=MIB)
    assert bucket.ready_at() < bucket.now


class Contest:
    """Disks of a group, on threads that wake up after a delay of their own: the first one is always the luckiest."""

    def __init__(self, weights: tuple[int, ...], delays: tuple[int, ...], **limits: int) -> None:
        """`delays` in nanoseconds."""
        self.bucket = Bucketful(weights, **limits)
        self.delays = delays
        self.wakes = [START] * len(weights)
        self.done = [0] * len(weights)

    def run(self, seconds: float, size: int = 4096, active: range | None = None) -> None:
        end = self.bucket.now + int(seconds * SECOND)
        active = range(len(self.wakes)) if active is None else active
        for number in active:
            self.wakes[number] = max(self.wakes[number], self.bucket.now)
        while (number := min(active, key=self.wakes.__getitem__)) is not None and self.wakes[number] < end:
            self.bucket.now = self.wakes[number]
            self.turn(number, size)
        self.bucket.now = end

    def turn(self, number: int, size: int) -> None:
        """A disk begins all that it may, and then waits as dataplane/limit_gate.py does."""
        bucket = self.bucket
        for _ in range(64):
            ready = bucket.ready_at(member=number)
            if ready > bucket.now:
                bucket.members[number]._record["waits_until"] = (ready + 100_000_000) * TICKS
                self.wakes[number] = ready + self.delays[number]
                return
            bucket.begin(size, member=number)
            self.done[number] += 1
        self.wakes[number] = bucket.now + 10_000


@pytest.mark.parametrize("iops", [200, 20_000])
@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 4), (1,) * 8])
def test_shares_are_as_the_weights_whoever_is_first(weights: tuple[int, ...], iops: int) -> None:
    delays = tuple(1_000 + 50_000 * number for number in range(len(weights)))
    contest = Contest(weights, delays, total_iops_sec=iops)
    contest.run(1)
    contest.done = [0] * len(weights)
    seconds = max(2.0, 3000 / iops)
    contest.run(seconds)
    assert sum(contest.done) == pytest.approx(iops * seconds, rel=0.02)
    for done, weight in zip(contest.done, weights, strict=True):
        share = sum(contest.done) * weight / sum(weights)
        assert done == pytest.approx(share, rel=0.02, abs=0.002 * iops / sum(weights) * weight + 1)


def test_a_share_that_is_not_used_is_used_by_others() -> None:
    contest = Contest((1, 1), (1_000, 1_000), total_iops_sec=1000)
    contest.run(1)
    before = contest.done[0]
    contest.run(5, active=range(1))
    assert contest.done[0] - before == pytest.approx(5000, rel=0.03)


def test_who_returns_has_not_saved_up_what_he_did_not_use() -> None:
    contest = Contest((1, 1), (1_000, 1_000), total_iops_sec=1000)
    contest.run(5, active=range(1))
    before = list(contest.done)
    contest.run(5)
    assert contest.done[0] - before[0] == pytest.approx(2500, rel=0.03)
    assert contest.done[1] - before[1] == pytest.approx(2500, rel=0.03)


def test_nobody_waits_for_a_disk_that_does_not_use_its_share() -> None:
    bucket = Bucketful((1, 1), total_iops_sec=1000)
    bucket.run(1, 4096)
    bucket.members[1]._record["waits_until"] = (bucket.now + SECOND) * TICKS
    bucket.now = bucket.ready_at()
    for _ in range(3):
        bucket.now = max(bucket.now, bucket.limiter_ready())
        bucket.begin(4096)
    bucket.now = bucket.limiter_ready()
    assert bucket.ready_at(member=1) <= bucket.now < bucket.ready_at(member=0)
    bucket.now += SECOND // 200
    assert bucket.ready_at(member=0) <= bucket.now


def test_large_requests_of_one_disk_do_not_take_the_share_of_another() -> None:
    """Of a limit of bytes: each has half of them, not half of the requests."""
    contest, sizes = Contest((1, 1), (1_000, 1_000), total_bytes_sec=100 * MIB), (4096, MIB)

    def run(turns: int) -> list[int]:
        before = list(contest.done)
        for _ in range(turns):
            number = 0 if contest.wakes[0] <= contest.wakes[1] else 1
            contest.bucket.now = max(contest.bucket.now, contest.wakes[number])
            contest.turn(number, sizes[number])
        return [(now - then) * size for now, then, size in zip(contest.done, before, sizes, strict=True)]

    run(5_000)
    small, large = run(60_000)
    assert small == pytest.approx(large, rel=0.03, abs=2 * MIB)


@given(st.lists(st.integers(0, 1000)), st.lists(st.integers(0, 1000)))
def test_the_time_of_several_queues_is_counted_once(starts: list[int], lengths: list[int]) -> None:
    """Where no wait lies within another one; otherwise some of it may be missing."""
    member, covered, end = Member(), np.zeros(2001, bool), 0
    for start, length in zip(sorted(starts), lengths, strict=False):
        end = max(end, start + length)
        on_structs(count_throttled)(member._record[0], START + start, START + end)
        covered[start:end] = True
    assert round(member.throttled * 1e9) == covered.sum()


@compiled
def count_each(member, end):
    """Count the times from 0 on, one nanosecond after the other."""
    for time in range(end):
        count_throttled(view(member, MEMBER), time, time + 1)


def test_threads_that_count_the_same_time_at_once_count_it_once() -> None:
    member, end = Member(), 2_000_000
    threads = [threading.Thread(target=on_structs(count_each), args=[member.address, end]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert member.throttled_ns == end
