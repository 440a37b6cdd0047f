"""The metrics of disks, with node_exporter's suffixes for what it measures too. docs/metrics.md is made from this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ringplane.control.counters import FIRST_BUCKET, SCALARS, total
from ringplane.control.export import Export
from ringplane.dataplane.ring_states import RingState
from ringplane.dataplane.state import KINDS
from ringplane.metrics.exposition import Metric, Sample, histogram_text, labelled, text
from ringplane.metrics.histogram import below_powers
from ringplane.virtio.blk import SECTOR

SECOND_NS = 1e9

# The bounds of latencies are powers of two in nanoseconds: from 1.024 us to 17.2 s.
LOWEST_POWER, HIGHEST_POWER = 10, 34
BOUNDS = tuple(2**power / SECOND_NS for power in range(LOWEST_POWER, HIGHEST_POWER + 1))

# The states of rings: that of a broken one is `broken`, whether it is draining or stopped.
RING_STATES = tuple(dict.fromkeys(state.value.split()[0] for state in RingState))


class DiskReading:
    """What a scrape has read of a disk, all of it from memory. `kinds` has a row of SCALARS for each of KINDS."""

    def __init__(self, export: Export) -> None:
        self.name, self.export = export.name, export
        self.labels = labelled(("disk",), (self.name,))
        summed = total(export.disk.queues)
        self.kinds: dict[str, list[int]] = dict(zip(KINDS, summed[:, :FIRST_BUCKET].tolist(), strict=True))
        below = below_powers(summed[:, FIRST_BUCKET:], LOWEST_POWER)
        self.below: dict[str, list[int]] = dict(zip(KINDS, below[:, : len(BOUNDS)].tolist(), strict=True))
        self.counts: dict[str, int] = dict(zip(KINDS, below[:, -1].tolist(), strict=True))

    def labelled(self, name: str, value: str) -> str:
        """Its labels and one more, whose value has no character that would be escaped."""
        return f'{self.labels},{name}="{value}"'

    def seconds(self, kind: str) -> float:
        """How long requests took, in all."""
        return self.kinds[kind][NANOSECONDS] / SECOND_NS


REQUESTS, ERRORS, BYTES, NANOSECONDS = (SCALARS.index(name) for name in ("requests", "errors", "bytes", "nanoseconds"))

# The value for a disk.
Value = Callable[[DiskReading], float]


def _disk(type: str, suffix: str, help: str, value: Value) -> tuple[Metric, Value]:
    return Metric(f"ringplane_disk_{suffix}", type, ("disk",), help), value  # type: ignore[arg-type]


def _requests(kind: str, suffix: str, what: str) -> tuple[Metric, Value]:
    return _disk("counter", suffix, f"Completed {what}.", lambda disk: disk.kinds[kind][REQUESTS])


def _bytes(kind: str, suffix: str, help: str, unit: int = 1) -> tuple[Metric, Value]:
    return _disk("counter", suffix, help, lambda disk: disk.kinds[kind][BYTES] // unit)


def _time(kind: str, suffix: str, what: str) -> tuple[Metric, Value]:
    help = f"Time that all {what} took, from fetch to completion; requests at the same time count each."
    return _disk("counter", suffix, help, lambda disk: disk.seconds(kind))


DISK_METRICS = (
    _requests("read", "reads_completed_total", "reads"),
    _bytes("read", "read_bytes_total", "Bytes that were read."),
    _time("read", "read_time_seconds_total", "reads"),
    _requests("write", "writes_completed_total", "writes"),
    _bytes("write", "written_bytes_total", "Bytes that were written."),
    _time("write", "write_time_seconds_total", "writes"),
    _requests("flush", "flush_requests_total", "flushes"),
    _time("flush", "flush_requests_time_seconds_total", "flushes"),
    _requests("discard", "discards_completed_total", "discards"),
    _bytes("discard", "discarded_sectors_total", "Sectors of 512 bytes that were discarded.", SECTOR),
    _time("discard", "discard_time_seconds_total", "discards"),
    _requests("write_zeroes", "write_zeroes_completed_total", "requests to write zeroes or to erase"),
    _bytes("write_zeroes", "write_zeroes_bytes_total", "Bytes that were filled with zeroes or erased."),
    _time("write_zeroes", "write_zeroes_time_seconds_total", "requests to write zeroes or to erase"),
    _requests("other", "other_requests_total", "other requests, for example for the serial number"),
    _time("other", "other_requests_time_seconds_total", "other requests"),
    _disk("gauge", "io_now", "Requests that were fetched and are not completed.", lambda disk: disk.export.in_flight),
    _disk(
        "counter",
        "io_time_weighted_seconds_total",
        "Time that all requests took; its rate is the mean number of requests in flight.",
        lambda disk: sum(map(disk.seconds, KINDS)),
    ),
    _disk(
        "counter",
        "throttled_seconds_total",
        "Time in which requests waited in the rings because of a limit (docs/limits.md).",
        lambda disk: disk.export.throttled,
    ),
    _disk("gauge", "capacity_bytes", "The size that the guest sees.", lambda disk: disk.export.disk.size),
    _disk("gauge", "attached", "1 while a front end is attached.", lambda disk: disk.export.state == "attached"),
    _disk("gauge", "paused", "1 while requests are left in the rings (docs/api.md).", lambda disk: disk.export.paused),
    _disk(
        "gauge",
        "flush_failed",
        "1 if a flush has failed: earlier writes may be lost, and each later flush fails.",
        lambda disk: disk.export.disk.flush_failed,
    ),
)

DISK_INFO = Metric(
    "ringplane_disk_info",
    "gauge",
    ("disk", "image", "socket", "serial", "io", "read_only", "block_size"),
    "1; its labels describe the disk.",
)
IO_ERRORS = Metric(
    "ringplane_disk_errors_total",
    "counter",
    ("disk", "operation"),
    "Requests that were completed with a status other than OK: storage failed, or the request was invalid.",
)
RINGS = Metric("ringplane_disk_rings", "gauge", ("disk", "state"), "Virtqueues whose ring is in this state.")
DURATION = Metric(
    "ringplane_disk_request_duration_seconds",
    "histogram",
    ("disk", "operation"),
    "Time of requests from fetch to completion; an operation appears with its first request.",
    BOUNDS,
)


def disk_metrics(exports: Iterable[Export]) -> Iterable[str]:
    """The text of all metrics of these disks."""
    disks = [DiskReading(export) for export in exports]
    yield text(DISK_INFO, (_described(disk) for disk in disks))
    for metric, value in DISK_METRICS:
        # Truth values are numbers too.
        yield text(metric, [(disk.labels, +value(disk)) for disk in disks])
    yield text(IO_ERRORS, (sample for disk in disks for sample in _errors(disk)))
    yield text(RINGS, (sample for disk in disks for sample in _rings(disk)))
    yield from histogram_text(
        DURATION,
        (
            (disk.labelled("operation", kind), disk.below[kind], disk.counts[kind], disk.seconds(kind))
            for disk in disks
            for kind in KINDS
            if disk.counts[kind]
        ),
    )


def _described(disk: DiskReading) -> Sample:
    device, socket = disk.export.disk, disk.export.config.socket_path
    values: Sequence[object] = (
        *(disk.name, device.source.title, socket or "", device.serial, device.how),
        *(str(device.source.read_only).lower(), device.block_size),
    )
    return labelled(DISK_INFO.labels, list(map(str, values))), 1


def _errors(disk: DiskReading) -> list[Sample]:
    return [(disk.labelled("operation", kind), row[ERRORS]) for kind, row in disk.kinds.items()]


def _rings(disk: DiskReading) -> list[Sample]:
    states = [queue.ring_state.state for queue in disk.export.disk.queues]
    # Most disks have many queues that their front ends do not use.
    used = Counter([state.value.split()[0] for state in states if state is not RingState.STOPPED])
    used[RingState.STOPPED.value] = len(states) - used.total()
    return [(disk.labelled("state", state), used[state]) for state in RING_STATES]
