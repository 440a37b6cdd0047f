"""The policies that ship: each is asked about I/Os, without a disk, and compared with a model in plain Python."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import pytest

from ringplane.block.layers.policy_layer import PolicyLayer, run_policy
from ringplane.dataplane.worker import SLOTS
from ringplane.engines.common import DISCARD, FLUSH, READ, WRITE, ZERO
from ringplane.options.policy_options import named_policies, parse_policy
from ringplane.policies.fixed_point import exp2, log2, square_root
from ringplane.policies.loading import shipped

from .asked_policy import DISK_SIZE, PASS, SECOND, Answer, Asked, kinds
from .rig import FLUSH as FLUSH_REQUEST
from .rig import IN, OK, OUT, PATIENCE, Pending, RigFactory, eventually, rig_factory
from .rig import Answer as RigAnswer

US, MIB = 1000, 1 << 20
OPERATIONS = {"read": READ, "write": WRITE, "flush": FLUSH, "discard": DISCARD, "write-zeroes": ZERO}
FAIL: Answer = ("fail", EIO)

# The policies that answer to some of the requests, what they answer then, and the counter of that.
SELECTING = {"error": ("fail", "failed"), "delay": ("delay", "delayed"), "hang": ("hang", "hung")}
SELECTING_WRITES = {
    "lost_writes": ("drop", "lost"),
    "torn_writes": ("tear", "torn"),
    "misdirected_writes": ("redirect", "misdirected"),
}


def requests(seed: int, count: int = 300) -> list[tuple[int, int, int]]:
    """Operations, offsets and lengths, in the first 64 KiB."""
    randomness = random.Random(seed)

    def request() -> tuple[int, int, int]:
        operation = randomness.choice(list(OPERATIONS.values()))
        length = 512 * randomness.randrange(2, 17)
        return (operation, 0, 0) if operation == FLUSH else (operation, 512 * randomness.randrange(128), length)

    return [request() for _ in range(count)]


# Which requests.


@pytest.mark.parametrize("name", [*SELECTING, *SELECTING_WRITES])
@pytest.mark.parametrize("seed", range(3))
def test_which_requests(name: str, seed: int) -> None:
    """By operation, range, number; with a probability of 1."""
    randomness = random.Random(seed)
    answer, counter = {**SELECTING, **SELECTING_WRITES}[name]
    given: dict[str, Any] = {}
    operation = "write"
    if name in SELECTING:
        given["operation"] = operation = randomness.choice(["any", *OPERATIONS])
    first, end = sorted(randomness.sample(range(0, 1 << 16, 512), 2)) if seed else (0, 1 << 60)
    if seed:
        given["where"] = f"{first}-{end}"
    skip, every, times = randomness.randrange(5), randomness.randrange(1, 4), randomness.randrange(20)
    policy = Asked(name, skip=skip, every=every, times=times, **given)
    matched = done = 0
    for number, (kind, offset, length) in enumerate(requests(seed)):
        fits = operation == "any" or OPERATIONS[operation] == kind
        fits = fits and (offset < end and offset + length > first if length else seed == 0)
        matched += fits
        selected = fits and matched > skip and (matched - skip) % every == 0 and (times == 0 or done < times)
        done += selected
        assert policy.ask(kind, offset, length)[0] == (answer if selected else "pass"), number
    assert policy.counters["matched"] == matched
    assert policy.counters[counter] == done


@pytest.mark.parametrize("name", [*SELECTING, *SELECTING_WRITES, "corrupt", "lying_flush"])
def test_the_same_seed_gives_the_same_faults(name: str) -> None:
    def answers(seed: int) -> list[Any]:
        policy = Asked(name, probability=0.3, seed=seed)
        if name == "corrupt":
            return [policy.write(512 * number, bytes(1024)) for number in range(200)]
        return [policy.ask(FLUSH if name == "lying_flush" else WRITE, 8192 * number, 8192) for number in range(200)]

    first = answers(1)
    assert answers(1) == first
    assert answers(2) != first
    unchanged = PASS if name != "corrupt" else bytes(1024)
    assert 30 <= sum(answer != unchanged for answer in first) <= 90


def test_error_has_any_errno() -> None:
    assert Asked("error", errno=ENOSPC, operation="write").ask(WRITE) == ("fail", ENOSPC)


# delay


def times(**parameters: Any) -> list[int]:
    """Sorted, in microseconds."""
    policy = Asked("delay", **parameters)
    found = sorted(policy.ask()[1] for _ in range(40_000))
    assert policy.counters["delays"] == sum(found)
    return found


@pytest.mark.parametrize("distribution", ["uniform", "normal", "long-tail"])
@pytest.mark.parametrize(("median", "p99"), [(1000, 3000), (200, 20_000)])
def test_random_times_have_their_median_and_p99(distribution: str, median: int, p99: int) -> None:
    found = times(distribution=distribution, time=f"{median}us", p99=f"{p99}us")
    assert found[len(found) // 2] == pytest.approx(median, rel=0.1, abs=0.02 * (p99 - median))
    assert found[len(found) * 99 // 100] == pytest.approx(p99, rel=0.1)


def test_shapes_of_the_distributions() -> None:
    assert set(times(time="7ms")) == {7000}
    uniform = times(distribution="uniform", time="1ms", p99="1490us")
    assert (uniform[0], uniform[-1]) == pytest.approx((500, 1500), abs=2)
    assert uniform[len(uniform) // 4] == pytest.approx(750, abs=15)
    normal = times(distribution="normal", time="10ms", p99="12326us")
    assert normal[round(len(normal) * 0.8413)] == pytest.approx(11_010, abs=30)
    # (p99 / median) ^ (log 500 / log 50), and 5000.
    tail = times(distribution="long-tail", time="100us", p99="1ms")
    for part in (0.9, 0.999):
        wanted = 100 * 10 ** (math.log(0.5 / (1 - part)) / math.log(50))
        assert tail[round(len(tail) * part)] == pytest.approx(wanted, rel=0.15)


def test_no_random_time_is_longer_than_the_longest() -> None:
    found = times(distribution="long-tail", time="100us", p99="10ms", longest="20ms")
    assert found[-1] == 20_000
    assert max(times(distribution="long-tail", time="10us", p99="1h", longest="1h")) == 3_600_000_000
    assert max(times(distribution="long-tail", time="10us", p99="1h")) == 30_000_000
    assert set(times(time="60s", longest="2s")) == {60_000_000}


def test_fixed_point() -> None:
    for number in (1, 2, 3, 1000, 12_345_678_901, 1 << 62):
        assert log2(number) / 65536 == pytest.approx(math.log2(number), abs=5e-5)
        assert square_root(number * number % (1 << 62)) == math.isqrt(number * number % (1 << 62))
    for exponent in (-20.3, -1, 0, 0.25, 0.5, 0.75, 1, 3.7, 20, 44.9):
        assert exp2(int(exponent * 65536)) == pytest.approx(2**exponent * 65536, rel=3e-5, abs=1)
    assert [square_root(number) for number in (0, 1, 3, 4, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_a_p99_that_is_not_given_is_twice_the_median() -> None:
    assert times(distribution="uniform", time="1ms", seed=3) == times(
        distribution="uniform", time="1ms", p99="2ms", seed=3
    )


# Data.


def test_bits_are_flipped() -> None:
    policy = Asked("corrupt", bits=3)
    for number in range(50):
        data = random.Random(number).randbytes(8192)
        for changed in (policy.write(0, data), policy.read(0, data)):
            flipped = sum((one ^ other).bit_count() for one, other in zip(data, changed, strict=True))
            # Two may hit the same bit.
            assert flipped in (1, 3)


def test_a_sector_becomes_zeros() -> None:
    policy, data = Asked("corrupt", kind="zeros"), bytes([7]) * 4096
    places = set()
    for _ in range(100):
        changed = policy.read(0, data)
        place = changed.index(0)
        assert place % 512 == 0
        assert changed == data[:place] + bytes(512) + data[place + 512 :]
        places.add(place)
    assert places == set(range(0, 4096, 512))


@pytest.mark.parametrize("value", [0, 1])
def test_a_bit_is_stuck(value: int) -> None:
    policy = Asked("corrupt", kind="stuck", bit=8 * 100 + 3, stuck_at=value, operation="read")
    data = random.Random(1).randbytes(4096)
    assert policy.write(0, data) == data
    wanted = bytearray(data)
    for place in range(100, 4096, 512):
        wanted[place] = wanted[place] | 8 if value else wanted[place] & ~8
    assert policy.read(0, data) == bytes(wanted)


@pytest.mark.parametrize("kind", ["bits", "zeros", "stuck"])
def test_only_data_of_the_range_is_corrupted(kind: str) -> None:
    policy, data = Asked("corrupt", kind=kind, where="5120-6144", bits=100), bytes([255]) * 4096
    policy.policy.change({"stuck_at": 0})
    for offset in (2048, 4096, 5632):
        for _ in range(20):
            changed = policy.write(offset, data)
            inside = slice(max(5120 - offset, 0), min(6144 - offset, 4096))
            assert changed[inside] != data[inside]
            assert changed[: inside.start] + changed[inside.stop :] == data[: inside.start] + data[inside.stop :]
    assert policy.write(0, data) == data


def test_a_failed_read_is_not_corrupted() -> None:
    policy = Asked("corrupt")
    assert policy.end(READ, result=-EIO) == PASS
    assert policy.counters["corrupted"] == 0


def test_old_data() -> None:
    """The first data of each sector that was written again; sectors 64 apart share a place."""
    policy = Asked("old_data", where="0-1M")
    first, second, third = (bytes([number]) * 1024 for number in (1, 2, 3))
    assert policy.write(0, first) == first
    assert policy.read(0, first) == first
    assert policy.write(512, second) == second
    assert policy.write(64 * 512, third) == third
    in_storage = first[:512] + second + third
    assert policy.read(0, in_storage) == first + second[512:] + third
    assert policy.read(64 * 512, second) == second
    assert policy.counters == {"requests": 6, "sectors": 3, "read": 1}


# Writes.


def test_a_torn_write_has_some_whole_units() -> None:
    policy = Asked("torn_writes", unit=4096)
    assert policy.ask(WRITE, 0, 4096) == PASS
    sizes = {policy.ask(WRITE, 0, 16384) for _ in range(100)}
    assert sizes == {("tear", 4096), ("tear", 8192), ("tear", 12288)}
    assert policy.ask(WRITE, 0, 4608) == ("tear", 4096)
    assert policy.counters["torn"] == policy.counters["matched"] == 101


def test_a_misdirected_write_goes_elsewhere_on_the_disk() -> None:
    policy = Asked("misdirected_writes")
    places = [policy.ask(WRITE, 0, 8192) for _ in range(200)]
    assert set(kinds(places)) == {"redirect"}
    assert all(place % 4096 == 0 and place + 8192 <= DISK_SIZE for _, place in places)
    assert max(place for _, place in places) > DISK_SIZE // 2
    distance = Asked("misdirected_writes", distance="1M")
    assert distance.ask(WRITE, 512, 4096) == ("redirect", MIB + 512)
    assert distance.ask(WRITE, DISK_SIZE - MIB, 4096) == PASS
    assert distance.counters["misdirected"] == 1


def test_a_flush_lies() -> None:
    policy = Asked("lying_flush")
    assert policy.ask(FLUSH, 0, 0) == ("drop", 0)
    assert policy.ask(WRITE) == PASS
    assert policy.counters == {"requests": 2, "flushes": 1, "ignored": 1}


# Disks that are worn or full.


def test_read_only_after_some_errors() -> None:
    policy = Asked("read_only_after", errors=2)
    for result in (0, -EIO, 0, -ENOSPC):
        assert policy.ask(WRITE) == PASS
        assert policy.end(WRITE, result=result) == PASS
    assert [policy.ask(operation) for operation in (READ, FLUSH)] == [PASS, PASS]
    assert [policy.ask(operation) for operation in (WRITE, DISCARD, ZERO)] == [FAIL] * 3
    assert policy.counters["failures"] == 2
    # More of them are allowed.
    policy.policy.change({"errors": 3})
    assert policy.ask(WRITE) == PASS
    assert Asked("read_only_after", errors=0).ask(WRITE) == FAIL


@pytest.mark.parametrize("seed", range(5))
def test_bad_blocks_heal_when_they_are_written_whole(seed: int) -> None:
    """Against a set of bad blocks; only successful writes heal."""
    policy = Asked("bad_blocks", where="8K-40K", block=4096)
    randomness = random.Random(seed)
    bad, failed, healed = set(range(2, 10)), 0, 0
    for _ in range(300):
        operation, result = randomness.choice([READ, READ, WRITE]), randomness.choice([0, 0, -EIO])
        offset, length = 512 * randomness.randrange(100), 512 * randomness.randrange(1, 33)
        touched = set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
        fails = operation == READ and bool(bad & touched)
        assert policy.ask(operation, offset, length) == (FAIL if fails else PASS)
        failed += fails
        policy.end(operation, offset, length, result)
        if operation == WRITE and result == 0:
            whole = {block for block in touched if offset <= 4096 * block and 4096 * (block + 1) <= offset + length}
            healed += len(bad & whole)
            bad -= whole
    assert policy.counters["failed"] == failed
    assert policy.counters["healed"] == healed


def test_bad_blocks_anywhere_on_the_disk_heal() -> None:
    policy = Asked("bad_blocks", where="512G-513G")
    assert policy.ask(READ, 512 << 30) == FAIL
    policy.ask(WRITE, 512 << 30)
    policy.end(WRITE, 512 << 30)
    assert policy.ask(READ, 512 << 30) == PASS
    assert policy.ask(READ, (512 << 30) + 4096) == FAIL


def test_random_bad_blocks_follow_from_the_seed() -> None:
    def bad(seed: int, density: float = 0.1) -> list[int]:
        policy = Asked("bad_blocks", density=density, seed=seed)
        return [block for block in range(5000) if policy.ask(READ, 4096 * block) == FAIL]

    assert bad(1) == bad(1)
    assert bad(1) != bad(2)
    assert 400 <= len(bad(1)) <= 600
    # What is bad is bad at a higher density too.
    assert set(bad(1, 0.01)) < set(bad(1))
    assert bad(1, 0) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_space(seed: int) -> None:
    """Against a set of chunks."""
    policy, randomness, used = Asked("no_space", space="40K", chunk=4096), random.Random(seed), set[int]()
    given = taken = failed = 0
    for _ in range(500):
        offset, length = 512 * randomness.randrange(200), 512 * randomness.randrange(1, 33)
        touched = set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
        operation = randomness.choice([READ, WRITE, WRITE, DISCARD])
        fails = operation == WRITE and len(used | touched) > 10 and not touched <= used
        assert policy.ask(operation, offset, length) == (("fail", ENOSPC) if fails else PASS)
        failed += fails
        if operation == WRITE and not fails:
            given += len(touched - used)
            used |= touched
        if operation == DISCARD:
            whole = {chunk for chunk in touched if offset <= 4096 * chunk and 4096 * (chunk + 1) <= offset + length}
            taken += len(used & whole)
            used -= whole
    counted = policy.counters
    assert (counted["allocated"], counted["freed"]) == (4096 * given, 4096 * taken)
    assert counted["failed"] == failed > 0


def test_no_space_does_not_guess_where_several_ranges_are() -> None:
    policy = Asked("no_space", space="8K", chunk=4096)
    assert policy.ask(WRITE, 0, 8192) == PASS
    assert policy.ask(DISCARD, 0, 8192, ranges=2) == PASS
    assert policy.counters["freed"] == 0
    assert policy.ask(WRITE, 8192) == ("fail", ENOSPC)


def test_what_has_space_can_be_written_though_there_is_too_little() -> None:
    policy = Asked("no_space", space="1M", chunk=4096)
    assert policy.ask(WRITE, 0, 8192) == PASS
    policy.policy.change({"space": "4K"})
    assert policy.ask(WRITE, 0, 8192) == PASS
    assert policy.ask(WRITE, 8192) == ("fail", ENOSPC)


def test_chunks_that_are_not_known_need_space_each_time() -> None:
    policy = Asked("no_space", space=0, chunk=512)
    assert policy.ask(WRITE, DISK_SIZE - 4096, 4096) == ("fail", ENOSPC)
    policy.policy.change({"space": "1M"})
    assert policy.ask(WRITE, DISK_SIZE - 4096, 4096) == PASS
    assert policy.ask(DISCARD, 0, DISK_SIZE) == PASS


# Models of drives: a load of `depth` requests in flight, and how much of it a drive does in a second.

Load = Callable[[int], tuple[int, int, int]]


def rate(policy: Asked, load: Load, depth: int, count: int = 2000) -> float:
    """Requests per second."""
    began, ready = policy.now, [policy.now] * depth
    for number in range(count):
        policy.now = heapq.heappop(ready)
        name, us = policy.ask(*load(number))
        assert name in ("delay", "pass")
        heapq.heappush(ready, policy.now + us * US)
    return count * SECOND / (max(ready) - began)


def randomly(operation: int, length: int = 4096, size: int = DISK_SIZE) -> Load:
    randomness = random.Random(1)
    return lambda number: (operation, randomness.randrange(size // length) * length, length)


def in_sequence(operation: int, length: int) -> Load:
    return lambda number: (operation, number * length, length)


def test_a_spinning_disk_seeks_and_turns() -> None:
    """One request at a time: with the formula in floats."""
    policy = Asked("spinning_disk", rpm=6000, mb_per_s=100, track_seek="2ms", full_seek="20ms", cache=0)
    revolution, track, head = 10_000_000, 1_000_000, 0
    randomness = random.Random(3)
    for _ in range(500):
        policy.now += randomness.randrange(1, 50_000_000)
        offset, length = 512 * randomness.randrange(DISK_SIZE // 512), 512 * randomness.randrange(1, 200)
        if randomness.random() < 0.3:
            # On the same track, or nearly.
            offset = head + 512 * randomness.randrange(1, 2100)
        operation = randomness.choice([READ, WRITE])
        distance = abs(offset - head)
        seek = 2e6 + 18e6 * math.sqrt(distance / DISK_SIZE) if distance >= track else 0
        wait = (offset % track / track * revolution - policy.now - seek) % revolution
        name, us = policy.ask(operation, offset, length)
        exact = (seek + wait + length * 10) / 1000
        # A place that is just there may be just missed, and the other way round.
        is_close = min(wait, revolution - wait) < 5000
        assert abs(us - exact) < 5 or (is_close and abs(abs(us - exact) - 10_000) < 5), (offset, name)
        policy.now += us * US
        head = offset + length
    assert policy.counters["seeks"] == 500


def test_a_spinning_disk_is_as_fast_as_its_platters_in_sequence() -> None:
    for operation in (READ, WRITE):
        policy = Asked("spinning_disk", mb_per_s=150, cache=0)
        assert rate(policy, in_sequence(operation, MIB), 4) * MIB == pytest.approx(150e6, rel=0.02)


def test_a_spinning_disk_has_read_ahead() -> None:
    policy = Asked("spinning_disk", mb_per_s=128)
    policy.ask(READ, MIB, MIB)
    policy.now += SECOND + 1_234_567
    assert policy.ask(READ, 2 * MIB, MIB) == ("delay", 8192)
    assert policy.counters["seeks"] == 1


def test_a_spinning_disk_orders_its_queue() -> None:
    """32 requests at once are 2.67 times as fast as one; one takes a seek and half a revolution."""
    one, many = (rate(Asked("spinning_disk"), randomly(READ), depth) for depth in (1, 64))
    assert 60 < one < 90
    assert many / one == pytest.approx(8 / 3, rel=0.05)
    alone = rate(Asked("spinning_disk", queue=1), randomly(READ), 64)
    assert alone == pytest.approx(one, rel=0.05)


def test_the_cache_of_a_spinning_disk() -> None:
    policy = Asked("spinning_disk", cache="1M")
    load = randomly(WRITE)
    # 256 of them fit; the drive has written none of them yet.
    assert [policy.ask(*load(number)) for number in range(256)] == [("delay", 100)] * 256
    assert policy.ask(*load(256))[1] > 1000
    # More than 250 seeks.
    name, us = policy.ask(FLUSH, 0, 0)
    assert name == "delay"
    assert 500_000 < us < 3_000_000
    # A read waits for no cached write, but those wait for it.
    assert policy.ask(READ, DISK_SIZE // 3)[1] < 40_000
    assert policy.ask(FLUSH, 0, 0)[1] > us
    policy.now += 10 * SECOND
    assert policy.ask(FLUSH, 0, 0) == PASS
    assert policy.ask(WRITE, 0) == ("delay", 100)
    # FUA: written, not only cached.
    assert policy.ask(WRITE, DISK_SIZE // 2, fua=True)[1] > 1000


def test_a_full_cache_is_as_fast_as_the_drive() -> None:
    cached = rate(Asked("spinning_disk", cache="1M"), randomly(WRITE), 4, 5000)
    many = rate(Asked("spinning_disk"), randomly(READ), 64)
    assert cached == pytest.approx(many, rel=0.15)


def test_an_ssd_reads_on_all_chips() -> None:
    assert rate(Asked("ssd"), randomly(READ), 1) == pytest.approx(SECOND / (62 * US), rel=0.02)
    # On one chip one after the other, whatever the depth.
    assert rate(Asked("ssd", chips=1), randomly(READ), 32) == pytest.approx(SECOND / (60 * US), rel=0.02)
    assert 250_000 < rate(Asked("ssd"), randomly(READ), 32, 10_000) < 32 * SECOND / (60 * US)
    # Between disk and host.
    assert rate(Asked("ssd"), in_sequence(READ, MIB), 8) * MIB == pytest.approx(3e9, rel=0.02)


def test_an_ssd_programs_pages_when_its_buffer_is_full() -> None:
    policy = Asked("ssd", chips=4, page="16K", program="1ms", buffer="1M", collect_every="1T")
    assert policy.ask(WRITE, 0, 4096) == ("delay", 16)
    assert policy.ask(WRITE, 0, 65536)[1] < 50
    # 4 pages per millisecond.
    wanted = 4 * 16384 * 1000
    assert rate(policy, randomly(WRITE, 4096), 16, 20_000) * 4096 == pytest.approx(wanted, rel=0.05)
    assert rate(policy, in_sequence(WRITE, MIB), 4, 200) * MIB == pytest.approx(wanted, rel=0.05)


def test_reads_of_an_ssd_wait_for_one_page_that_is_programmed() -> None:
    policy = Asked("ssd", chips=2, program="1ms", read="100us")
    policy.ask(WRITE, 0, 4 * 16384)
    policy.now += 200 * US
    assert policy.ask(READ, 0, 512) == ("delay", 1100)
    policy.now += 1500 * US
    assert policy.ask(READ, 16384, 512) == ("delay", 400)
    policy.now += 1500 * US
    assert policy.ask(READ, 0, 512) == ("delay", 100)


def test_the_flush_of_an_ssd() -> None:
    for protected in (False, True):
        policy = Asked("ssd", chips=4, program="1ms", protected=protected)
        policy.ask(WRITE, 0, 8 * 16384)
        assert policy.ask(FLUSH, 0, 0) == (PASS if protected else ("delay", 2000))
        policy.now += 2000 * US
        assert policy.ask(FLUSH, 0, 0) == PASS


def test_an_ssd_pauses_to_collect_garbage() -> None:
    """Reads of one chip have to wait."""
    policy = Asked("ssd", chips=4, collect_every="1M", collect="50ms", program=0)
    policy.ask(WRITE, 0, MIB)
    policy.now += 10_000 * US
    slow = [policy.ask(READ, 16384 * page, 4096)[1] > 30_000 for page in range(4)]
    assert sum(slow) == 1
    assert policy.counters["collections"] == 1


def test_a_cloud_volume_has_bursts() -> None:
    policy = Asked("cloud_volume", iops=100, burst_iops=1000, io_credits=900, latency=0)
    # 900 credits last a second, because 100 are earned meanwhile.
    assert rate(policy, randomly(READ), 8, 1000) == pytest.approx(1000, rel=0.02)
    assert rate(policy, randomly(READ), 8, 1000) == pytest.approx(100, rel=0.02)
    assert policy.counters["without_io_credits"] == pytest.approx(1000, abs=10)
    # Three seconds later there are 300.
    policy.now += 3 * SECOND + 100 * 1_000_000
    assert rate(policy, randomly(READ), 1, 300) == pytest.approx(1000, rel=0.05)
    assert rate(policy, randomly(READ), 1, 300) == pytest.approx(110, rel=0.1)


@pytest.mark.parametrize("latency", [0, 500, 10_000])
@pytest.mark.parametrize("depth", [1, 4, 32])
def test_a_cloud_volume_without_credits_has_its_lasting_rate(latency: int, depth: int) -> None:
    """Also if there are pauses between its I/Os: what a pause earns is not enough for a burst."""
    policy = Asked("cloud_volume", iops=300, burst_iops=3000, io_credits=600, latency=latency)
    reachable = depth * 1e6 / latency if latency else math.inf
    # Of 3000 I/Os 600 are paid with the credits.
    assert rate(policy, randomly(READ), depth, 3000) == pytest.approx(min(reachable, 300 * 3000 / 2400), rel=0.05)
    assert rate(policy, randomly(READ), depth, 3000) == pytest.approx(min(reachable, 300), rel=0.05)


def test_a_cloud_volume_limits_bytes_too() -> None:
    parameters = {"iops": 100_000, "burst_iops": 100_000, "mb_per_s": 50, "burst_mb_per_s": 200, "latency": 0}
    policy = Asked("cloud_volume", mb_credits=150, **parameters)
    assert rate(policy, in_sequence(WRITE, MIB), 8, 190) * MIB == pytest.approx(200e6, rel=0.02)
    assert rate(policy, in_sequence(WRITE, MIB), 8, 200) * MIB == pytest.approx(50e6, rel=0.1)


def test_a_large_io_of_a_cloud_volume_counts_as_several() -> None:
    policy = Asked("cloud_volume", iops=1000, burst_iops=1000, burst_mb_per_s=100_000, mb_per_s=100_000, latency=0)
    assert rate(policy, in_sequence(READ, MIB), 8) == pytest.approx(250, rel=0.02)
    assert Asked("cloud_volume").ask() == ("delay", 500)
    assert Asked("cloud_volume").ask(FLUSH, 0, 0) == ("delay", 500)
    assert Asked("cloud_volume").ask(DISCARD) == PASS


def test_all_of_them_are_tested_and_described() -> None:
    tests, page = (
        Path(__file__).parents[2] / path for path in ("tests/unit/test_shipped_policies.py", "docs/policies.md")
    )
    for name in shipped():
        assert f'"{name}"' in tests.read_text()
        assert f"\n### {name}\n" in page.read_text()


# On a disk.

CONTENT = random.Random(9).randbytes(MIB)


class Disk:
    """A disk with policies, and a driver of it."""

    def __init__(self, make_rig: RigFactory, *policies: str) -> None:
        uses = named_policies([parse_policy(text) for text in policies])
        self.policies = [run_policy(use) for use in uses]
        self.part = PolicyLayer(MIB, 512, self.policies).part(0, SLOTS)
        self.rig = make_rig(CONTENT, layers=[self.part])
        self.line = self.rig.line().start()
        self._done: list[Pending] = []

    def begin(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> Pending:
        request = self.line.put(kind, sector, data, room)
        self.line.kick()
        return request

    def finish(self, request: Pending) -> RigAnswer:
        """Wait for this request; others may hang."""

        def is_done() -> bool:
            self._done.extend(self.line.ring.collect())
            return request in self._done

        assert eventually(is_done)
        return self.line.answer(request)

    def read(self, sector: int, size: int = 4096) -> bytes | None:
        """The data; None: it failed."""
        answer = self.finish(self.begin(IN, sector, room=size))
        return answer.data if answer.status == OK else None

    def write(self, sector: int, data: bytes) -> bool:
        return self.finish(self.begin(OUT, sector, data)).status == OK

    @property
    def content(self) -> bytes:
        return self.rig.content()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    with rig_factory(tmp_path, engine="memory") as make_rig:
        yield lambda *policies: Disk(make_rig, *policies)


NEW = bytes(range(256)) * 32


def test_a_disk_fails(disk: Callable[..., Disk]) -> None:
    it = disk("read_only_after,errors=2", "error,operation=write,where=4K-8K")
    assert it.write(0, NEW[:4096])
    assert not it.write(0, NEW)
    assert not it.write(8, NEW)
    assert not it.write(0, NEW[:4096])
    assert it.read(8) == CONTENT[4096:8192]
    assert it.content == NEW[:4096] + CONTENT[4096:]
    assert [policy.counters["requests"] for policy in it.policies] == [5, 4]


def test_a_disk_loses_and_tears_and_misdirects(disk: Callable[..., Disk]) -> None:
    it = disk(
        "lost_writes,where=0-8K", "torn_writes,where=16K-24K,unit=4096", "misdirected_writes,where=32K-,distance=64K"
    )
    for sector in (0, 32, 64):
        assert it.write(sector, NEW)
    wanted = bytearray(CONTENT)
    wanted[16 << 10 : 20 << 10] = NEW[:4096]
    wanted[96 << 10 : 104 << 10] = NEW
    assert it.content == bytes(wanted)


def test_a_disk_corrupts(disk: Callable[..., Disk]) -> None:
    it = disk("corrupt,operation=write,where=0-8K,kind=zeros", "corrupt,operation=read,where=64K-,kind=stuck,bit=7")
    request = it.begin(OUT, 0, NEW)
    assert it.finish(request).status == OK
    assert b"".join(it.rig.guest.read(piece.offset, piece.size) for piece in request.pieces)[16:-1] == NEW
    zeros = it.content.find(bytes(512))
    assert it.content == NEW[:zeros] + bytes(512) + NEW[zeros + 512 :] + CONTENT[8192:]
    wanted = bytearray(CONTENT[64 << 10 :][:4096])
    for place in range(0, 4096, 512):
        wanted[place] |= 128
    assert it.read(128) == wanted


def test_a_disk_returns_old_data(disk: Callable[..., Disk]) -> None:
    it = disk("old_data")
    assert it.write(0, NEW[:512])
    assert it.read(0, 512) == NEW[:512]
    assert it.write(0, bytes(512))
    assert it.content[:512] == bytes(512)
    assert it.read(0, 512) == NEW[:512]


def test_blocks_of_a_disk_heal(disk: Callable[..., Disk]) -> None:
    it = disk("bad_blocks,where=4K-12K")
    assert it.read(8) is None
    assert it.write(8, NEW[:512])
    assert it.read(8) is None
    assert it.write(8, NEW[:4096])
    assert it.read(8) == NEW[:4096]
    assert it.read(16) is None


def test_a_disk_is_full(disk: Callable[..., Disk]) -> None:
    it = disk("no_space,space=8K,chunk=4K")
    assert [it.write(sector, NEW[:4096]) for sector in (0, 64, 128, 64)] == [True, True, False, True]


def test_a_disk_hangs_until_it_is_released(disk: Callable[..., Disk]) -> None:
    it = disk("hang,operation=write", "lying_flush")
    hanging = it.begin(OUT, 0, NEW)
    assert it.read(0) == CONTENT[:4096]
    assert it.finish(it.begin(FLUSH_REQUEST)).status == OK
    it.line.turn_is_over()
    assert it.line.queue.in_flight == 1
    channel = it.line.worker.state.channel.address
    it.line.worker.call(lambda: it.part.release(channel)).result(PATIENCE)
    assert it.finish(hanging) == RigAnswer(OK, 1, b"")
    assert it.content == NEW + CONTENT[8192:]


@pytest.mark.parametrize(
    "slow",
    [
        "delay,time=20ms",
        "spinning_disk,track_seek=20ms,full_seek=20ms,size=1M,mb_per_s=1",
        "ssd,read=20ms",
        "cloud_volume,latency=20ms",
    ],
)
def test_a_disk_is_slow(disk: Callable[..., Disk], slow: str) -> None:
    it = disk(slow)
    start = time.monotonic_ns()
    assert it.read(1024) == CONTENT[512 << 10 :][:4096]
    assert time.monotonic_ns() - start >= 20_000_000
