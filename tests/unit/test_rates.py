"""Rates from two answers of the API: known counters, counters that begin again, disks that come and go."""

from __future__ import annotations

import pytest

from ringplane.api.schemas import (
    DiskStatistics,
    IoThreadStatistics,
    OperationStatistics,
    PolicyStatistics,
    SourceOperation,
    SourceStatistics,
    Statistics,
)
from ringplane.cli.top.disk_columns import remark
from ringplane.cli.top.sampler import Sampler
from ringplane.client.rates import percentile_us, rates


def operation(
    requests: int, size: int = 0, seconds: float = 0.0, errors: int = 0, **latencies: int
) -> OperationStatistics:
    pairs = [(int(time.removeprefix("ns")), count) for time, count in latencies.items()]
    return OperationStatistics(requests, errors, size, seconds, pairs)


def source(state: str, reconnects: int, **operations: SourceOperation) -> SourceStatistics:
    return SourceStatistics(state, reconnects, 2, operations)  # type: ignore[arg-type]


def disk(name: str, throttled: float = 0.0, busy: float = 0.0, **operations: OperationStatistics) -> DiskStatistics:
    return DiskStatistics(name, "attached", False, False, 0, throttled, busy, operations)


def thread(busy: float, polling: float, asleep: float, wakeups: int) -> IoThreadStatistics:
    return IoThreadStatistics("io0", busy, polling, asleep, wakeups)


def test_known_counters() -> None:
    before = Statistics(10.0, [disk("a", 1.0, 5.0, read=operation(100, 1000, 1.0, ns1000=100))], [thread(1, 1, 1, 10)])
    reads = operation(300, 4000, 2.0, errors=3, ns1000=298, ns9000=2)
    after = Statistics(
        12.0, [disk("a", 2.0, 5.5, read=reads, write=operation(20, ns5000=20))], [thread(2, 1.5, 1.5, 30)]
    )
    found = rates(before, after)
    (of_disk,), (of_thread,) = found.disks, found.io_threads
    assert (found.seconds, of_disk.iops, of_disk.bytes_per_second, of_disk.depth) == (2.0, 110.0, 1500.0, 0.5)
    assert (of_disk.limited, of_disk.busy, of_disk.errors, of_disk.new_errors) == (0.5, 0.25, 3, 3)
    read, write = of_disk.of("read"), of_disk.of("write")
    assert (read.per_second, read.mean_us, read.p50_us, read.p99_us) == (100.0, 5000.0, 1.0, 1.0)
    assert (write.per_second, write.p50_us) == (10.0, 5.0)
    assert of_disk.of("flush").p50_us is None
    assert (of_thread.busy, of_thread.polling, of_thread.asleep, of_thread.wakeups_per_second) == (
        0.5,
        0.25,
        0.25,
        10.0,
    )


def test_the_server_of_a_remote_disk() -> None:
    """All its operations together; the disk had another server before, or none that is known."""
    before, after = disk("a"), disk("a")
    before.source = source("ok", 0, read=SourceOperation(100, 1.0, [(1000, 100)]))
    reads = SourceOperation(110, 1.1, [(1000, 109), (7000, 1)])
    after.source = source("reconnecting", 1, read=reads, write=SourceOperation(10, 0.3, [(3000, 10)]))
    (found,) = rates(Statistics(1.0, [before], []), Statistics(3.0, [after], [])).disks
    assert found.source is not None
    assert (found.source.state, found.source.reconnects, found.source.in_flight) == ("reconnecting", 1, 2)
    assert (found.source.per_second, found.source.p50_us, found.source.p99_us) == (10.0, 3.0, 7.0)
    assert found.source.mean_us == pytest.approx(20_000)
    assert remark(found) == "reconnecting"
    (found,) = rates(Statistics(1.0, [], []), Statistics(3.0, [after], [])).disks
    assert found.source is not None
    assert found.source.per_second == 60.0
    (found,) = rates(Statistics(1.0, [after], []), Statistics(3.0, [disk("a")], [])).disks
    assert found.source is None


def with_policies(*policies: PolicyStatistics) -> DiskStatistics:
    found = disk("a")
    found.policies = list(policies)
    return found


def test_the_counters_of_policies() -> None:
    """Of one that was replaced meanwhile, or is new, they have begun at 0."""
    before = with_policies(PolicyStatistics("error", True, {"requests": 10, "failed": 1}))
    error = PolicyStatistics("error", False, {"requests": 30, "failed": 2, "matched": 6})
    new = PolicyStatistics("slow", True, {"requests": 4})
    (found,) = rates(Statistics(1.0, [before], []), Statistics(3.0, [with_policies(new, error)], [])).disks
    assert [(each.name, each.enabled) for each in found.policies] == [("slow", True), ("error", False)]
    counted = [{key: (each.total, each.per_second) for key, each in one.counters.items()} for one in found.policies]
    assert counted == [{"requests": (4, 2.0)}, {"requests": (30, 10.0), "failed": (2, 0.5), "matched": (6, 3.0)}]
    replaced = with_policies(PolicyStatistics("error", True, {"requests": 6}))
    (found,) = rates(Statistics(1.0, [before], []), Statistics(3.0, [replaced], [])).disks
    assert found.policies[0].counters["requests"].per_second == 3.0
    (found,) = rates(Statistics(1.0, [], []), Statistics(3.0, [replaced], [])).disks
    assert found.policies[0].counters["requests"].per_second == 3.0


def test_an_operation_that_was_not_used_has_no_latency() -> None:
    same = disk("a", read=operation(5, ns1000=5))
    (found,) = rates(Statistics(1.0, [same], []), Statistics(2.0, [same], [])).disks
    assert (found.iops, found.of("read").per_second, found.of("read").p99_us) == (0.0, 0.0, None)


def test_counters_that_begin_again() -> None:
    """After a restart what was counted since then is what there is to see; nothing is negative."""
    before = Statistics(
        10.0, [disk("a", 50.0, read=operation(1000, 1 << 20, 9.0, errors=9, ns1000=1000))], [thread(90, 9, 900, 5000)]
    )
    after = Statistics(11.0, [disk("a", 0.25, read=operation(10, 4096, 0.5, ns2000=10))], [thread(0.5, 0, 0.5, 7)])
    found = rates(before, after)
    (of_disk,), (of_thread,) = found.disks, found.io_threads
    assert (of_disk.iops, of_disk.bytes_per_second, of_disk.depth, of_disk.limited) == (10.0, 4096.0, 0.5, 0.25)
    assert (of_disk.new_errors, of_disk.of("read").p50_us) == (0, 2.0)
    assert (of_thread.busy, of_thread.asleep, of_thread.wakeups_per_second) == (0.5, 0.5, 7.0)


def test_disks_that_come_and_go() -> None:
    before = Statistics(1.0, [disk("gone", read=operation(10))], [])
    after = Statistics(2.0, [disk("new", read=operation(10))], [])
    assert [(each.name, each.iops) for each in rates(before, after).disks] == [("new", 10.0)]


@pytest.mark.parametrize(("percent", "expected"), [(1, 1.0), (50, 1.0), (51, 2.0), (99, 2.0), (99.5, 3.0)])
def test_percentiles(percent: float, expected: float) -> None:
    assert percentile_us([(3000, 1), (1000, 50), (2000, 49)], percent) == expected


def test_no_percentile_without_requests() -> None:
    assert percentile_us([], 50) is None


def test_the_last_minute_is_remembered() -> None:
    sampler = Sampler()
    for second in range(200):
        sampler.add(Statistics(float(second), [disk("a", read=operation(10 * second)), disk("b")], []))
    assert [(end, value) for end, _, value in sampler.samples["a",]] == [(end, 10.0) for end in range(140, 200)]
    sampler.interrupt()
    assert sampler.add(Statistics(300.0, [disk("a", read=operation(0))], [])) is None
    assert sampler.rates is not None
    assert sampler.add(Statistics(301.0, [disk("a", read=operation(5))], [])) is not None
    assert sampler.samples.keys() == {("a",)}
    assert list(sampler.samples["a",]) == [(301.0, 1.0, 5.0)]


def test_the_last_minute_of_counters_is_remembered() -> None:
    sampler = Sampler()
    for second in range(100):
        sampler.add(Statistics(float(second), [with_policies(PolicyStatistics("p", True, {"n": 3 * second}))], []))
    assert list(sampler.samples["a", "p", "n"]) == [(float(end), 1.0, 3.0) for end in range(40, 100)]
    sampler.add(Statistics(100.0, [disk("a")], []))
    assert sampler.samples.keys() == {("a",)}
