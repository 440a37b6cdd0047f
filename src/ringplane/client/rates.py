"""What disks and I/O threads did between two answers of GET /v1/statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ringplane.api.schemas import (
    DiskStatistics,
    IoThreadStatistics,
    OperationStatistics,
    PolicyStatistics,
    SourceOperation,
    SourceStatistics,
    Statistics,
)

# Two answers are never closer together than that, in seconds.
SHORTEST = 1e-6

NOTHING = OperationStatistics(0, 0, 0, 0.0, [])


@dataclass(frozen=True, slots=True)
class OperationRates:
    """Reads, for example. Latencies are in microseconds; None: no request has completed."""

    per_second: float = 0.0
    bytes_per_second: float = 0.0
    mean_us: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None


@dataclass(frozen=True, slots=True)
class SourceRates:
    """The server or cluster of a remote disk, with all kinds of requests together. `reconnects` is since the start."""

    state: str
    reconnects: int | None
    in_flight: int
    per_second: float
    mean_us: float | None
    p50_us: float | None
    p99_us: float | None


@dataclass(frozen=True, slots=True)
class CounterRates:
    """A counter of a policy: all that it has counted, and what it counts now."""

    total: int
    per_second: float


@dataclass(frozen=True, slots=True)
class PolicyRates:
    """A policy of a disk."""

    name: str
    enabled: bool
    counters: dict[str, CounterRates]


@dataclass(frozen=True, slots=True)
class DiskRates:
    """A disk. `depth` is the mean number of requests in flight.

    Shares of the time, 0 to 1: in `busy` it had requests in flight, in `limited` it was at a limit.

    `errors` counts all since the disk was added, `new_errors` those between the two answers.
    """

    name: str
    state: str
    paused: bool
    flush_failed: bool
    in_flight: int
    iops: float
    bytes_per_second: float
    depth: float
    busy: float
    limited: float
    errors: int
    new_errors: int
    operations: dict[str, OperationRates]
    source: SourceRates | None = None
    policies: Sequence[PolicyRates] = ()

    def of(self, operation: str) -> OperationRates:
        """The rates of `read`, `write`, `flush` and so on."""
        return self.operations.get(operation, NO_RATES)


NO_RATES = OperationRates()


@dataclass(frozen=True, slots=True)
class IoThreadRates:
    """An I/O thread: shares of the time, which add up to 1, and how often it slept."""

    name: str
    busy: float
    polling: float
    asleep: float
    wakeups_per_second: float


@dataclass(frozen=True, slots=True)
class Rates:
    """All of them, over so many seconds."""

    seconds: float
    disks: Sequence[DiskRates]
    io_threads: Sequence[IoThreadRates]


def rates(before: Statistics, after: Statistics) -> Rates:
    """Counters that went back, because the process was restarted, have begun at 0 between the two."""
    seconds = max(after.time - before.time, SHORTEST)
    disks = {disk.name: disk for disk in before.disks}
    threads = {thread.name: thread for thread in before.io_threads}
    return Rates(
        seconds,
        [_of_disk(disks.get(disk.name), disk, seconds) for disk in after.disks],
        [_of_thread(threads.get(thread.name), thread, seconds) for thread in after.io_threads],
    )


def _of_disk(before: DiskStatistics | None, after: DiskStatistics, seconds: float) -> DiskRates:
    changes = {
        name: _change(before.operations.get(name, NOTHING) if before is not None else NOTHING, operation)
        for name, operation in after.operations.items()
    }
    throttled = _rise(before.throttled_seconds if before is not None else 0, after.throttled_seconds)
    io_time = _rise(before.io_seconds if before is not None else 0, after.io_seconds)
    return DiskRates(
        name=after.name,
        state=after.state,
        paused=after.paused,
        flush_failed=after.flush_failed,
        in_flight=after.in_flight,
        iops=sum(change.requests for change in changes.values()) / seconds,
        bytes_per_second=sum(change.bytes for change in changes.values()) / seconds,
        depth=sum(change.seconds for change in changes.values()) / seconds,
        busy=min(io_time / seconds, 1.0),
        limited=min(throttled / seconds, 1.0),
        errors=sum(operation.errors for operation in after.operations.values()),
        new_errors=sum(change.errors for change in changes.values()),
        operations={name: _of_operation(change, seconds) for name, change in changes.items()},
        source=_of_source(before.source if before is not None else None, after.source, seconds),
        policies=_of_policies(before.policies if before is not None else (), after.policies, seconds),
    )


def _of_policies(
    before: Iterable[PolicyStatistics], after: Iterable[PolicyStatistics], seconds: float
) -> list[PolicyRates]:
    counted = {policy.name: policy.counters for policy in before}
    return [
        PolicyRates(policy.name, policy.enabled, _of_counters(counted.get(policy.name, {}), policy.counters, seconds))
        for policy in after
    ]


def _of_counters(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, CounterRates]:
    return {key: CounterRates(total, _rise(before.get(key, 0), total) / seconds) for key, total in after.items()}


def _of_source(before: SourceStatistics | None, after: SourceStatistics | None, seconds: float) -> SourceRates | None:
    if after is None:
        return None
    counted = before.operations if before is not None else {}
    changes = [
        _change(_source_counters(counted.get(name)), _source_counters(now)) for name, now in after.operations.items()
    ]
    found = _of_operation(
        OperationStatistics(
            sum(change.requests for change in changes),
            *(0, 0),
            sum(change.seconds for change in changes),
            [pair for change in changes for pair in change.latencies],
        ),
        seconds,
    )
    return SourceRates(
        *(after.state, after.reconnects, after.in_flight, found.per_second, found.mean_us, found.p50_us, found.p99_us)
    )


def _source_counters(counted: SourceOperation | None) -> OperationStatistics:
    """As those of a disk's operation, without errors and bytes."""
    return (
        NOTHING if counted is None else OperationStatistics(counted.requests, 0, 0, counted.seconds, counted.latencies)
    )


def _change(before: OperationStatistics, after: OperationStatistics) -> OperationStatistics:
    if after.requests < before.requests:
        before = NOTHING
    counted = dict(before.latencies)
    latencies = ((time, count - counted.get(time, 0)) for time, count in after.latencies)
    return OperationStatistics(
        after.requests - before.requests,
        max(after.errors - before.errors, 0),
        max(after.bytes - before.bytes, 0),
        max(after.seconds - before.seconds, 0.0),
        [(time, count) for time, count in latencies if count > 0],
    )


def _of_operation(change: OperationStatistics, seconds: float) -> OperationRates:
    if not change.requests:
        return NO_RATES
    return OperationRates(
        per_second=change.requests / seconds,
        bytes_per_second=change.bytes / seconds,
        mean_us=change.seconds * 1e6 / change.requests,
        p50_us=percentile_us(change.latencies, 50),
        p99_us=percentile_us(change.latencies, 99),
    )


def percentile_us(latencies: Iterable[tuple[int, int]], percent: float) -> float | None:
    """The latency that `percent` of the requests did not exceed; `latencies` as in OperationStatistics."""
    ordered = sorted(latencies)
    needed = max(1.0, sum(count for _, count in ordered) * percent / 100)
    for nanoseconds, count in ordered:
        needed -= count
        if needed <= 0:
            return nanoseconds / 1000
    return None


def _of_thread(before: IoThreadStatistics | None, after: IoThreadStatistics, seconds: float) -> IoThreadRates:
    if before is None or after.wakeups < before.wakeups or after.asleep_seconds < before.asleep_seconds:
        before = IoThreadStatistics(after.name, 0.0, 0.0, 0.0, 0)
    busy = _rise(before.busy_seconds, after.busy_seconds)
    polling = _rise(before.polling_seconds, after.polling_seconds)
    asleep = _rise(before.asleep_seconds, after.asleep_seconds)
    whole = max(busy + polling + asleep, SHORTEST)
    wakeups = (after.wakeups - before.wakeups) / seconds
    return IoThreadRates(after.name, busy / whole, polling / whole, asleep / whole, wakeups)


def _rise(before: float, after: float) -> float:
    """How much a counter has counted, that may have begun at 0 again."""
    return after - before if after >= before else after
