"""The metrics of disks, with node_exporter's suffixes for what it measures too. docs/metrics.md is made from this."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.block.sources.service import OPERATIONS, STATES
from ringplane.control.export import Export
from ringplane.dataplane.disk_figures import HIGHEST_POWER, LOWEST_POWER, read_figures
from ringplane.dataplane.io_time import TICK_NS
from ringplane.dataplane.ring_states import RingState
from ringplane.dataplane.state import KINDS
from ringplane.metrics.exposition import Distribution, Metric, Sample, histogram_text, labelled, text
from ringplane.metrics.histogram import below
from ringplane.virtio.blk import SECTOR

if TYPE_CHECKING:
    from ringplane.block.layers.recording_file import RecordingFile

SECOND_NS = 1e9

BOUNDS = tuple(2**power / SECOND_NS for power in range(LOWEST_POWER, HIGHEST_POWER + 1))

# The state of a ring in a word: that of a broken one is `broken`, whether it is draining or stopped.
RING_STATES = {state: state.value.split()[0] for state in RingState}


class Readings:
    """What a scrape has read of all disks, all of it from memory. Columns have a value for each of them."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self.exports = tuple(exports)
        self.labels = [labelled(("disk",), (each.name,)) for each in self.exports]
        self.figures = read_figures([each.disk.device for each in self.exports])
        self.operations = {kind: self.labelled("operation", kind) for kind in KINDS}
        # Of those that are on other machines.
        self.services = [
            (labels, service)
            for labels, each in zip(self.labels, self.exports, strict=True)
            if (service := each.disk.source.service) is not None
        ]

    def labelled(self, name: str, value: str) -> list[str]:
        """The labels of the disks and one more, whose value has no character that would be escaped."""
        more = f',{name}="{value}"'
        return [labels + more for labels in self.labels]

    def of(self, kind: str) -> npt.NDArray[np.void]:
        """The figures of a kind of requests."""
        figures: npt.NDArray[np.void] = self.figures["kinds"][:, KINDS.index(kind)]
        return figures

    def each(self, value: Callable[[Export], float]) -> list[float]:
        """A column of what is not among the figures."""
        return list(map(value, self.exports))


# The values for all disks.
Column = Callable[[Readings], Iterable[float]]


def _seconds(nanoseconds: npt.NDArray[np.int64]) -> list[float]:
    seconds: list[float] = (nanoseconds / SECOND_NS).tolist()
    return seconds


def _disk(type: str, suffix: str, help: str, column: Column) -> tuple[Metric, Column]:
    return Metric(f"ringplane_disk_{suffix}", type, ("disk",), help), column  # type: ignore[arg-type]


def _requests(kind: str, suffix: str, what: str) -> tuple[Metric, Column]:
    return _disk("counter", suffix, f"Completed {what}.", lambda disks: disks.of(kind)["requests"].tolist())


def _bytes(kind: str, suffix: str, help: str, unit: int = 1) -> tuple[Metric, Column]:
    return _disk("counter", suffix, help, lambda disks: (disks.of(kind)["bytes"] // unit).tolist())


def _time(kind: str, suffix: str, what: str) -> tuple[Metric, Column]:
    help = f"Time that all {what} took, from fetch to completion; requests at the same time count each."
    return _disk("counter", suffix, help, lambda disks: _seconds(disks.of(kind)["nanoseconds"]))


def _gauge(suffix: str, help: str, value: Callable[[Export], float]) -> tuple[Metric, Column]:
    # Truth values are numbers too.
    return _disk("gauge", suffix, help, lambda disks: disks.each(lambda export: +value(export)))


def _recording(suffix: str, help: str, value: Callable[[RecordingFile], float]) -> tuple[Metric, Column]:
    return _gauge(suffix, help, lambda export: value(layer.file) if (layer := export.operations.recording.layer) else 0)


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
    _disk(
        "gauge",
        "io_now",
        "Requests that were fetched and are not completed.",
        lambda disks: disks.figures["in_flight"].tolist(),
    ),
    _disk(
        "counter",
        "io_time_seconds_total",
        "Time in which requests were in flight, however many.",
        lambda disks: _seconds(disks.figures["busy_ticks"] * TICK_NS),
    ),
    _disk(
        "counter",
        "io_time_weighted_seconds_total",
        "Time that all requests took; its rate is the mean number of requests in flight.",
        lambda disks: _seconds(disks.figures["kinds"]["nanoseconds"].sum(axis=1)),
    ),
    _disk(
        "counter",
        "throttled_seconds_total",
        "Time in which requests waited in the rings because of a limit (docs/limits.md).",
        lambda disks: disks.each(lambda export: export.throttled),
    ),
    _gauge("capacity_bytes", "The size that the guest sees.", lambda export: export.disk.size),
    _gauge("attached", "1 while a front end is attached.", lambda export: export.state == "attached"),
    _gauge("paused", "1 while requests are left in the rings (docs/api.md).", lambda export: export.paused),
    _gauge(
        "flush_failed",
        "1 if a flush has failed: earlier writes may be lost, and each later flush fails.",
        lambda export: export.disk.flush_failed,
    ),
    _recording(
        "recording_entries",
        "Entries of the recording that is made of the disk (docs/recordings.md); 0: none is made.",
        lambda file: file.count,
    ),
    _recording(
        "recording_waiting_bytes",
        "Bytes of the recording that wait for its file; requests wait, too, when there is no more room for them.",
        lambda file: file.waiting,
    ),
    _recording(
        "recording_failed",
        "1 if the recording of the disk has ended because it could not be written.",
        lambda file: bool(file.failed),
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

SOURCE_STATE = Metric(
    "ringplane_disk_source_state",
    "gauge",
    ("disk", "state"),
    "Remote disks: 1 for the state of the server or cluster, 0 for the others; " + ", ".join(STATES) + ".",
)
SOURCE_RECONNECTS = Metric(
    "ringplane_disk_source_reconnects_total",
    "counter",
    ("disk",),
    "NBD disks: connections that were made in place of lost ones; each I/O thread has one.",
)
SOURCE_NOW = Metric(
    "ringplane_disk_source_io_now",
    "gauge",
    ("disk",),
    "Remote disks: requests that the server or cluster has not replied to.",
)
SOURCE_DURATION = Metric(
    "ringplane_disk_source_request_duration_seconds",
    "histogram",
    ("disk", "operation"),
    "Remote disks: how long the server or cluster takes; an operation appears with its first request.",
    BOUNDS,
)

POLICY_ENABLED = Metric(
    "ringplane_disk_policy_enabled",
    "gauge",
    ("disk", "policy"),
    "1 while requests of the disk pass this policy, 0 while it is switched off (docs/policies.md).",
)
POLICY_COUNTED = Metric(
    "ringplane_disk_policy_counted_total",
    "counter",
    ("disk", "policy", "counter"),
    "What a policy of the disk has counted: `requests` that it was asked about, and its own counters.",
)


def disk_metrics(exports: Iterable[Export]) -> Iterator[str]:
    """The text of all metrics of these disks."""
    disks = Readings(exports)
    yield text(DISK_INFO, map(_described, disks.exports))
    for metric, column in DISK_METRICS:
        yield text(metric, zip(disks.labels, column(disks), strict=True))
    yield text(IO_ERRORS, _errors(disks))
    yield text(RINGS, _rings(disks))
    yield from histogram_text(DURATION, _durations(disks))
    yield text(SOURCE_STATE, _source_states(disks))
    yield text(SOURCE_RECONNECTS, _reconnects(disks))
    yield text(SOURCE_NOW, [(labels, service.in_flight) for labels, service in disks.services])
    yield from histogram_text(SOURCE_DURATION, _source_durations(disks))
    yield text(POLICY_ENABLED, _policies(disks))
    yield text(POLICY_COUNTED, _policy_counters(disks))


def _described(export: Export) -> Sample:
    device, socket = export.disk, export.config.socket_path
    values: Sequence[object] = (
        *(export.name, device.source.title, socket or "", device.serial, device.how),
        *(str(device.source.read_only).lower(), device.block_size),
    )
    return labelled(DISK_INFO.labels, list(map(str, values))), 1


def _errors(disks: Readings) -> Iterator[Sample]:
    for kind, labels in disks.operations.items():
        yield from zip(labels, disks.of(kind)["errors"].tolist(), strict=True)


def _rings(disks: Readings) -> Iterator[Sample]:
    """Most disks have many queues that their front ends do not use; one may be started meanwhile."""
    used = [[RING_STATES[queue.state] for queue in tuple(export.disk.started)] for export in disks.exports]
    unused = [len(export.disk.queues) - len(states) for export, states in zip(disks.exports, used, strict=True)]
    for state in dict.fromkeys(RING_STATES.values()):
        counts = [states.count(state) for states in used]
        if state == RING_STATES[RingState.STOPPED]:
            counts = list(map(operator.add, counts, unused))
        yield from zip(disks.labelled("state", state), counts, strict=True)


def _durations(disks: Readings) -> Iterator[Distribution]:
    for kind, labels in disks.operations.items():
        figures = disks.of(kind)
        columns = zip(labels, figures["below"].tolist(), _seconds(figures["nanoseconds"]), strict=True)
        yield from (each for each in columns if each[1][-1])


def _source_states(disks: Readings) -> Iterator[Sample]:
    for labels, service in disks.services:
        present = service.state
        yield from ((f'{labels},state="{state}"', +(state == present)) for state in STATES)


def _reconnects(disks: Readings) -> Iterator[Sample]:
    for labels, service in disks.services:
        if (reconnects := service.reconnects) is not None:
            yield labels, reconnects


def _source_durations(disks: Readings) -> Iterator[Distribution]:
    for labels, service in disks.services:
        for operation, times in zip(OPERATIONS, service.times(), strict=True):
            counts = below(times["histogram"], LOWEST_POWER, len(BOUNDS)).tolist()
            if counts[-1]:
                yield f'{labels},operation="{operation}"', counts, float(times["nanoseconds"]) / SECOND_NS


def _policies(disks: Readings) -> Iterator[Sample]:
    for export in disks.exports:
        for policy in export.disk.running_policies:
            yield labelled(POLICY_ENABLED.labels, (export.name, policy.name)), +policy.enabled


def _policy_counters(disks: Readings) -> Iterator[Sample]:
    for export in disks.exports:
        for policy in export.disk.running_policies:
            for name, count in policy.counters.items():
                yield labelled(POLICY_COUNTED.labels, (export.name, policy.name, name)), count
