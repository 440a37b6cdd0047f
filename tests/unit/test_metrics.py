"""Metrics of a server: what a scrape says after known requests, and that counters never go back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ringplane
from ringplane.api.disk_metrics import _rings as ring_counts
from ringplane.api.http import HttpApi
from ringplane.api.metric_table import renew
from ringplane.api.scrape import all_metrics, scrape
from ringplane.control.counters import total
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.dataplane.ring_states import RingState
from ringplane.dataplane.state import WORKER
from ringplane.dataplane.thread_clock import ThreadClock, ThreadTimes
from ringplane.dataplane.worker import Worker
from ringplane.driver.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.options.api_options import ApiOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN

from .api_client import Api
from .rig import eventually

SIZE = 4 << 20
MEMORY_SIZE = 16 << 20
SOON = 120.0

ERRORS = "ringplane_disk_errors_total"


class Scraped:
    """The metrics of one scrape, by the names of their lines."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The value of the one line that has this name and these labels."""
        (value,) = [each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        return float(value)

    @property
    def rising(self) -> dict[tuple[str, ...], float]:
        """All that must not go back."""
        kinds = ("counter", "histogram")
        samples = [sample for family in self.families if family.type in kinds for sample in family.samples]
        return {(each.name, *each.labels.values()): each.value for each in samples}


class Served:
    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server

    def attach(self) -> Driver:
        return Driver(self.folder / "a.sock", queues=2, memory_size=MEMORY_SIZE, timeout=SOON)

    def scrape(self) -> Scraped:
        return Scraped("".join(scrape(self.server)))


def config(folder: Path, name: str) -> DiskConfig:
    return DiskConfig(
        folder / f"{name}.img", ("io0",), socket_path=folder / f"{name}.sock", create=SIZE, num_queues=2, serial="S"
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    disks = [config(tmp_path, name) for name in "ab"]
    interface = HttpApi(ApiOptions(tmp_path / "api.sock"))
    with serve_all(disks, [IoThread("io0"), IoThread("io1")], interface=interface) as server:
        yield Served(tmp_path, server)


def test_a_disk(served: Served) -> None:
    before = served.scrape()
    assert before.value("ringplane_disk_attached", disk="a") == 0
    assert before.value("ringplane_disk_rings", disk="a", state="stopped") == 2
    with served.attach() as driver:
        driver.write(0, b"a" * 4096)
        driver.read(0, 4096)
        driver.read(0, 8192)
        driver.flush()
        attached = served.scrape()
        assert attached.value("ringplane_disk_attached", disk="a") == 1
        assert attached.value("ringplane_disk_rings", disk="a", state="running") == 2
    assert eventually(lambda: served.server.exports[0].state == "listening")
    after = served.scrape()
    for name, expected in {
        "reads_completed_total": 2,
        "read_bytes_total": 12288,
        "writes_completed_total": 1,
        "written_bytes_total": 4096,
        "flush_requests_total": 1,
        "discards_completed_total": 0,
        "other_requests_total": 0,
        "io_now": 0,
        "capacity_bytes": SIZE,
        "paused": 0,
        "flush_failed": 0,
        "attached": 0,
    }.items():
        assert after.value(f"ringplane_disk_{name}", disk="a") == expected, name
    for name in ("reads_completed_total", "written_bytes_total", "flush_requests_time_seconds_total"):
        assert after.value(f"ringplane_disk_{name}", disk="b") == 0
    labels = {"image": str(served.folder / "a.img"), "socket": str(served.folder / "a.sock"), "serial": "S"}
    assert after.value("ringplane_disk_info", disk="a", read_only="false", block_size="512", **labels) == 1


def test_times_of_requests(served: Served) -> None:
    with served.attach() as driver:
        for _ in range(5):
            driver.read(0, 512)
    scraped = served.scrape()
    name, labels = "ringplane_disk_request_duration_seconds", {"disk": "a", "operation": "read"}
    assert scraped.value(f"{name}_count", **labels) == 5
    time = scraped.value(f"{name}_sum", **labels)
    assert 0 < time == scraped.value("ringplane_disk_read_time_seconds_total", disk="a")
    assert time == scraped.value("ringplane_disk_io_time_weighted_seconds_total", disk="a")
    buckets = [each.value for each in scraped.samples if each.name == f"{name}_bucket"]
    assert buckets == sorted(buckets)
    # The sum lies between the bounds of the buckets.
    bounds = [float(each.labels["le"]) for each in scraped.samples if each.name == f"{name}_bucket"]
    counts = [count - less for count, less in zip(buckets, [0, *buckets], strict=False)]
    upper = sum(count * bound for count, bound in zip(counts, bounds, strict=True) if count)
    assert upper / 2 <= time <= upper or counts[0] > 0
    assert not [each for each in scraped.samples if each.labels.get("operation") == "write" and each.name != ERRORS]


def test_errors(served: Served) -> None:
    with served.attach() as driver:
        assert driver.request(VIRTIO_BLK_T_IN, SIZE // SECTOR, read=512).status == VIRTIO_BLK_S_IOERR
    scraped = served.scrape()
    assert scraped.value(ERRORS, disk="a", operation="read") == 1
    assert scraped.value(ERRORS, disk="a", operation="write") == 0


def test_an_io_thread(served: Served) -> None:
    with served.attach() as driver:
        result = run_load(driver, Load(depth=8, requests=2000))
    scraped = served.scrape()

    def value(name: str, **labels: str) -> float:
        return scraped.value(f"ringplane_io_thread_{name}", **{"thread": "io0", **labels})

    assert value("requests_completed_total") == value("batch_requests_sum") >= result.requests
    assert 0 < value("batch_requests_count") <= value("batch_requests_sum")
    assert value("batch_requests_bucket", le="1024.0") == value("batch_requests_count")
    assert value("batch_requests_bucket", le="8.0") > 0
    assert value("busy_seconds_total") > 0
    assert value("asleep_seconds_total") > 0
    assert value("wakeups_total") > 0
    assert (value("io_now"), value("io_max")) == (0, 512)
    assert value("info", cpus="") == 1
    assert scraped.value("ringplane_build_info", version=ringplane.__version__) == 1
    assert scraped.value("process_cpu_seconds_total") > 0
    # No queue is on the other thread.
    assert scraped.value("ringplane_io_thread_requests_completed_total", thread="io1") == 0


def test_an_idle_thread_sleeps(served: Served) -> None:
    """The time goes on although the loop does not run."""
    name = "ringplane_io_thread_asleep_seconds_total"
    before = served.scrape().value(name, thread="io1")
    assert eventually(lambda: served.scrape().value(name, thread="io1") > before + 0.01)


def test_no_counter_goes_back(served: Served) -> None:
    """Under load, for scrapes from two threads."""
    ended = threading.Event()
    wrong: list[tuple[str, ...]] = []

    def look() -> None:
        before: dict[tuple[str, ...], float] = {}
        while not ended.is_set():
            now = served.scrape().rising
            wrong.extend(key for key, value in before.items() if now[key] < value)
            before = now

    threads = [threading.Thread(target=look) for _ in range(2)]
    with served.attach() as driver:
        for thread in threads:
            thread.start()
        run_load(driver, Load(read_percent=50, depth=16, seconds=1.0))
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_metric_is_in_a_scrape(served: Served) -> None:
    with served.attach() as driver:
        driver.read(0, 512)
    found = {family.name: (family.type, family.documentation) for family in served.scrape().families}
    assert found == {metric.name.removesuffix("_total"): (metric.type, metric.help) for metric in all_metrics()}


def test_metrics_of_the_api(served: Served) -> None:
    answer = Api(served.folder / "api.sock").request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert Scraped(answer.data.decode()).value("ringplane_disk_capacity_bytes", disk="b") == SIZE


def test_disks_that_come_and_go(served: Served) -> None:
    api = Api(served.folder / "api.sock")
    paths = {"image": str(served.folder / "c.img"), "socket-path": str(served.folder / "c.sock")}
    api.post("/v1/disks", {**paths, "create": "4M"}, status=201)
    assert served.scrape().value("ringplane_disk_capacity_bytes", disk="c") == SIZE
    api.delete("/v1/disks/c")
    assert not [each for each in served.scrape().samples if each.labels.get("disk") == "c"]


class Growing:
    """A disk whose next queue is started each time that somebody looks."""

    def __init__(self) -> None:
        self.queues = [SimpleNamespace(state=RingState.RUNNING) for _ in range(3)]
        self._count = 0

    @property
    def started(self) -> list[Any]:
        self._count += 1
        return self.queues[: self._count]


def test_a_queue_that_is_started_during_a_scrape_counts_once() -> None:
    disks: Any = SimpleNamespace(exports=[SimpleNamespace(disk=Growing())], labelled=lambda name, value: [value])
    assert sum(count for _, count in ring_counts(disks)) == 3


def test_counters_are_read_once(served: Served) -> None:
    """Whoever looks at them twice would find other numbers the second time."""
    with served.attach() as driver:
        driver.read(0, 512)
        (queue, *_) = served.server.exports[0].disk.started
        assert not np.shares_memory(total([queue]), queue.counters)


# The times of a thread


def test_a_thread_that_polls() -> None:
    worker = Worker("polling", poll_us=None)
    worker.load()
    assert worker.clock.read() == ThreadTimes()
    worker.start()
    try:
        assert eventually(lambda: worker.clock.read().polling > 1_000_000)
        times = worker.clock.read()
        assert times.polling > times.busy
    finally:
        worker.stop()
    # What was known when it ended.
    assert worker.clock.read().polling >= times.polling


def test_times_do_not_go_back() -> None:
    """CPU time, the time of polling, and the time are read one after the other."""
    record = np.zeros(1, WORKER)[0]
    clock = ThreadClock(record)
    record["polled"] = 50
    assert clock._advanced(used=40, lasted=100) == ThreadTimes(busy=0, polling=40, asleep=60)


def test_the_documentation_has_every_metric() -> None:
    """If it does not: python -m ringplane.api.metric_table docs/metrics.md."""
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    assert renew(page) == page
