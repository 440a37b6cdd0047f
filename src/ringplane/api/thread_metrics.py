"""The metrics of I/O threads and of the process. docs/metrics.md is made from this."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from ringplane import __version__
from ringplane.api.disk_metrics import SECOND_NS
from ringplane.dataplane.worker import Worker
from ringplane.metrics.exposition import Metric, histogram_text, labelled, text
from ringplane.metrics.histogram import POWERS
from ringplane.options.cpus import format_cpus
from ringplane.options.thread_options import IoThread

STARTED = time.time()

# Of all threads, as most programs with metrics call them.
PROCESS_METRICS = (
    (
        Metric("process_cpu_seconds_total", "counter", (), "CPU time of the process, of all threads."),
        time.process_time,
    ),
    (
        Metric("process_start_time_seconds", "gauge", (), "When the process was started, in seconds since 1970."),
        lambda: STARTED,
    ),
)

BUILD_INFO = Metric("ringplane_build_info", "gauge", ("version",), "1; the version of ringplane.")


class ThreadReading:
    """What a scrape has read of an I/O thread, all of it from memory, and from a clock of the kernel."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.labels = labelled(("thread",), (worker.name,))
        self.counted = worker.counters.read()


# The value for a thread.
Value = Callable[[ThreadReading], float]


def _thread(type: str, suffix: str, help: str, value: Value) -> tuple[Metric, Value]:
    return Metric(f"ringplane_io_thread_{suffix}", type, ("thread",), help), value  # type: ignore[arg-type]


THREAD_METRICS = (
    _thread(
        "counter",
        "busy_seconds_total",
        "CPU time, without polling; in the kernel too.",
        lambda thread: thread.counted["busy"] / SECOND_NS,
    ),
    _thread(
        "counter",
        "polling_seconds_total",
        "CPU time in which it polled rings that had no requests.",
        lambda thread: thread.counted["polling"] / SECOND_NS,
    ),
    _thread(
        "counter",
        "asleep_seconds_total",
        "Time that was neither: it waited for requests, for storage, or for a CPU.",
        lambda thread: thread.counted["asleep"] / SECOND_NS,
    ),
    _thread("counter", "wakeups_total", "How often it has slept.", lambda thread: thread.counted["wakeups"]),
    _thread(
        "counter",
        "requests_completed_total",
        "Requests that it has completed, of all disks.",
        lambda thread: thread.counted["completed"],
    ),
    _thread(
        "gauge",
        "io_now",
        "Requests that were fetched and are not completed, of all disks.",
        lambda thread: thread.worker.state.record["in_flight"],
    ),
    _thread(
        "gauge", "io_max", "How many requests it can have in flight.", lambda thread: thread.worker.state.slots.count
    ),
)

THREAD_INFO = Metric(
    "ringplane_io_thread_info", "gauge", ("thread", "engine", "cpus"), "1; its labels describe the I/O thread."
)
BATCHES = Metric(
    "ringplane_io_thread_batch_requests",
    "histogram",
    ("thread",),
    "How many requests were fetched in a turn of its loop, of all disks; turns without any are not counted.",
    tuple(float(1 << power) for power in range(POWERS - 1)),
)


def thread_metrics(threads: Iterable[tuple[IoThread, Worker]]) -> Iterable[str]:
    """The text of all metrics of these I/O threads."""
    threads = list(threads)
    described = ((each.name, worker.engine.name, _cpus(each)) for each, worker in threads)
    yield text(THREAD_INFO, [(labelled(THREAD_INFO.labels, values), 1) for values in described])
    readings = [ThreadReading(worker) for _, worker in threads]
    for metric, value in THREAD_METRICS:
        yield text(metric, [(thread.labels, value(thread)) for thread in readings])
    yield from histogram_text(BATCHES, [(thread.labels, *_batches(thread)) for thread in readings])


def process_metrics() -> Iterable[str]:
    """The text of all metrics of the process."""
    yield text(BUILD_INFO, [(labelled(BUILD_INFO.labels, (__version__,)), 1)])
    for metric, value in PROCESS_METRICS:
        yield text(metric, [("", value())])


def _cpus(thread: IoThread) -> str:
    return "" if thread.cpus is None else format_cpus(thread.cpus)


def _batches(thread: ThreadReading) -> tuple[Sequence[int], float]:
    """The counts up to each bound and of all turns, and the number of requests."""
    return thread.counted["batches"].cumsum().tolist(), int(thread.counted["fetched"])
