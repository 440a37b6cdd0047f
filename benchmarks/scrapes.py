"""What scrapes cost: the latency of busy disks while they are scraped, and one scrape of very many disks.

    python benchmarks/scrapes.py busy
    python benchmarks/scrapes.py many

`busy`: one process, one I/O thread, 64 disks. In each round it is not scraped, scraped every 15 seconds, every second,
and ten times a second, in turn, under two loads: a fixed rate of requests, which leaves CPU time, and as many as are
possible, which does not. The driver has a CPU of its own, polls the rings, and never sleeps; ringplane and the client
that scrapes have the other CPUs. A latency is from submission to when the driver sees the used chain. "x" compares the
p99 with that of the same round without scrapes: the median of all rounds, and the spread.

The rows "another's" are a control: at the same times a second process of ringplane is scraped, on the same CPUs, which
has as many disks of its own with nothing to do. What that changes too is for want of CPU time; only what the scrapes of
the process itself change beyond it comes from what its API thread and its I/O thread share.

`many`: one process with 1000 disks of engine `null`, each of which has had requests of all kinds.
"""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np
import numpy.typing as npt
from scale import MIB, START_DEADLINE, Setup, drain, loading, serving, write_config
from trees import table

from ringplane.bench import backends
from ringplane.bench.errors import BenchError
from ringplane.compiler.jit import compiled
from ringplane.driver.driver import Driver, Unsupported
from ringplane.driver.generator import BROKEN, DONE, FOREVER, RUN, drive
from ringplane.driver.load import Load
from ringplane.driver.process import cpu_ns
from ringplane.metrics import histogram
from ringplane.native.access import load64, store64, view
from ringplane.native.syscalls import monotonic_ns

# What happens beside the load, and every how many seconds. Debian's Prometheus scrapes every 15 s.
NOTHING, OWN, OTHERS = "nothing", "scrape", "another's"
BESIDE = ((NOTHING, 0.0), *((whose, every) for every in (15.0, 1.0, 0.1) for whose in (OWN, OTHERS)))
# At a fixed rate more than one is in flight only while ringplane is late.
DEPTH = 8
SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Latencies are in microseconds, the times of what happens beside it in milliseconds."""

    load: str
    beside: str
    every: float
    round: int
    kiops: float
    p50: float
    p99: float
    p999: float
    beside_ms: tuple[float, ...]


@compiled
def drive_paced(addresses, dues, count, period, until):
    """Visit the loads whose addresses are in an array, in turn, until the time `until`.

    With a `period` each one may submit one more request at its time in `dues`, and again after each period.
    """
    now = monotonic_ns()
    while now < until:
        for index in range(count):
            address, due = load64(addresses + 8 * index), load64(dues + 8 * index)
            if period and now >= due:
                view(address, RUN).budget += 1
                store64(dues + 8 * index, due + period)
            # It returns after one visit, because this time has always passed.
            if drive(address, 0) == BROKEN:
                return BROKEN
        now = monotonic_ns()
    return DONE


class Paced:
    """A load on these disks: `rate` requests per second on each, or as many as are possible."""

    def __init__(self, disks: Sequence[Driver], rate: int) -> None:
        self._disks = disks
        self.period = SECOND_NS // rate if rate else 0

    def measure(self, seconds: float, warm_up: float) -> tuple[float, npt.NDArray[np.int64]]:
        """How many requests per second completed, and the histogram of their latencies."""
        with loading(self._disks, Load(depth=DEPTH, busy_poll=True, seconds=seconds)) as workers:
            addresses = np.array([worker.address for worker in workers], np.int64)
            # Evenly spread.
            dues = time.monotonic_ns() + np.arange(len(workers), dtype=np.int64) * self.period // len(workers)
            for worker in workers:
                worker.run["measure_from"], worker.run["deadline"] = 0, FOREVER
                worker.run["budget"] = 0 if self.period else FOREVER
            self._drive(addresses, dues, warm_up)
            for worker in workers:
                worker.run["requests"], worker.run["histogram"] = 0, 0
            began = time.monotonic_ns()
            self._drive(addresses, dues, seconds)
            lasted = time.monotonic_ns() - began
            requests = sum(int(worker.run["requests"]) for worker in workers)
            counts = np.sum([worker.run["histogram"] for worker in workers], axis=0)
            drain(workers)
        return requests * SECOND_NS / lasted, counts

    def _drive(self, addresses: npt.NDArray[np.int64], dues: npt.NDArray[np.int64], seconds: float) -> None:
        until = time.monotonic_ns() + int(seconds * SECOND_NS)
        if drive_paced(addresses.ctypes.data, dues.ctypes.data, len(addresses), self.period, until) == BROKEN:
            raise BenchError("the daemon used a chain that is not in flight")


def quantile_us(counts: npt.NDArray[np.int64], share: float) -> float:
    """The latency that this share of the requests did not exceed, interpolated within its bucket."""
    below = np.concatenate([[0], counts.cumsum()])
    return float(np.interp(share * below[-1], below[:-1], histogram.lower_bounds())) / 1000


# Scrapes


class Scraper:
    """A client of `/metrics` that keeps its connection."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._client = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        self._path = address.path

    def scrape(self) -> bytes:
        self._client.request("GET", self._path)
        return self._client.getresponse().read()

    def time_ms(self) -> float:
        """How long a scrape takes."""
        began = time.perf_counter()
        self.scrape()
        return (time.perf_counter() - began) * 1000


def scrape_often(url: str, every: float, cpus: set[int], connection: Connection) -> None:
    """Until something arrives; then send the time of each scrape."""
    os.sched_setaffinity(0, cpus)
    scraper, times = Scraper(url), []
    pause = every / 2
    while not connection.poll(pause):
        times.append(scraper.time_ms())
        pause = every
    connection.send(times)


@contextlib.contextmanager
def scraping(url: str, every: float, cpus: set[int]) -> Iterator[list[float]]:
    """In a process of its own; at the end the list has the time of each scrape."""
    times: list[float] = []
    if not every:
        yield times
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=scrape_often, args=(url, every, cpus, theirs))
    process.start()
    try:
        yield times
        ours.send(None)
        times += ours.recv()
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def serving_metrics(config: Path, setup: Setup, cpus: set[int]) -> Iterator[tuple[int, str]]:
    """A daemon that serves the configuration and metrics: its pid, and the URL of the metrics."""
    config.write_text(config.read_text() + '[metrics]\nlisten = "127.0.0.1:0"\n')
    with serving(config, setup, cpus) as pid:
        deadline = time.monotonic() + START_DEADLINE
        # The sockets exist a moment before it is ready.
        while not (found := re.search("^metrics on (.+)", config.with_suffix(".log").read_text(), re.MULTILINE)):
            if time.monotonic() > deadline:
                raise BenchError("ringplane does not serve metrics")
            time.sleep(0.02)
        yield pid, found[1]


# Busy disks


def measure_round(
    number: int, loads: dict[str, Paced], urls: dict[str, str], cpus: set[int], seconds: float, warm_up: float
) -> Iterator[Row]:
    """Each load with each thing beside it, in an order that changes from round to round."""
    for name, load in loads.items():
        for beside, every in BESIDE if number % 2 == 0 else BESIDE[::-1]:
            with scraping(urls.get(beside, ""), every, cpus) as times:
                rate, counts = load.measure(max(seconds, every), warm_up)
            p50, p99, p999 = (quantile_us(counts, share) for share in (0.5, 0.99, 0.999))
            yield Row(name, beside, every, number, rate / 1000, p50, p99, p999, tuple(times))


def described(rows: Sequence[Row]) -> str:
    """Medians of all rounds."""
    heading = ["load", "beside", "every s", "k IOPS", "p50 us", "p99 us", "x", "spread", "p99.9 us", "in all", "ms"]
    lines = []
    for load, beside, every in dict.fromkeys((row.load, row.beside, row.every) for row in rows):
        found = [row for row in rows if (row.load, row.beside, row.every) == (load, beside, every)]
        without = {row.round: row.p99 for row in rows if (row.load, row.beside) == (load, NOTHING)}
        ratios = [row.p99 / without[row.round] for row in found]
        times = [time for row in found for time in row.beside_ms]

        def median(value: Callable[[Row], float], found: Sequence[Row] = found) -> str:
            return f"{statistics.median(map(value, found)):.1f}"

        lines.append(
            [
                *(
                    load,
                    beside,
                    f"{every:g}" if every else "",
                    median(lambda row: row.kiops),
                    median(lambda row: row.p50),
                ),
                *(median(lambda row: row.p99), f"{statistics.median(ratios):.3f}"),
                *(f"{min(ratios):.2f}-{max(ratios):.2f}", median(lambda row: row.p999)),
                *(str(len(times)), f"{statistics.median(times):.1f}" if times else ""),
            ]
        )
    return table(heading, lines)


@click.group(help=__doc__.replace("\n\n    python", "\n\n\b\n    python"))
def main() -> None:
    pass


@main.command()
@click.option("--disks", "count", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rate", type=click.IntRange(1), default=500, show_default=True, help="Requests per second and disk.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each measurement.")
@click.option("--warm-up", type=click.FloatRange(0), default=0.5, show_default=True)
@click.option("--place", type=Path, default=Path("/dev/shm"), show_default=True, help="A folder for the images.")
@click.option("--engine", default="auto", show_default=True)
def busy(count: int, rate: int, rounds: int, seconds: float, warm_up: float, place: Path, engine: str) -> None:
    """The latency of busy disks with and without scrapes. With the defaults it takes 6 minutes."""
    driver_cpu, *others = sorted(os.sched_getaffinity(0))
    cpus = set(others or [driver_cpu])
    setup = Setup(count, 1, count)
    rows: list[Row] = []
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringplane-scrapes-", dir=place))
            urls, disks = {}, {}
            for whose in (OWN, OTHERS):
                home = Path(folder, whose)
                home.mkdir()
                config = write_config(home, setup, 256 * MIB, engine)
                _, urls[whose] = stack.enter_context(serving_metrics(config, setup, cpus))
                sockets = [config.with_name(f"{number}.sock") for number in range(count)]
                disks[whose] = [stack.enter_context(Driver(socket, memory_size=8 * MIB)) for socket in sockets]
                # Loads `drive_paced`, and both have the same metrics.
                Paced(disks[whose], 0).measure(0.1, 0)
            loads = {
                f"{rate} per disk and second": Paced(disks[OWN], rate),
                "as many as possible": Paced(disks[OWN], 0),
            }
            stack.enter_context(backends.pinned({driver_cpu}))
            for number in range(rounds):
                rows += measure_round(number, loads, urls, cpus, seconds, warm_up)
    except (BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{count} disks, engine {engine}, 4 KiB random reads, one I/O thread; {rounds} rounds of {seconds:g} s")
    click.echo(described(rows))


# Many disks


def request_each_kind(path: Path) -> None:
    """Each kind of request has a histogram then."""
    with Driver(path, memory_size=8 * MIB) as driver:
        driver.write(0, bytes(4096))
        driver.read(0, 4096)
        driver.flush()
        driver.serial()
        for request in (driver.discard, driver.write_zeroes):
            # Counted too.
            with contextlib.suppress(Unsupported):
                request(0, 4096)


def pss_mb(pid: int) -> float:
    """The proportional set size of a process, in 10^6 bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:"))


@main.command()
@click.option("--disks", "count", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--scrapes", type=click.IntRange(1), default=20, show_default=True)
def many(count: int, scrapes: int) -> None:
    """One scrape of very many disks: time, CPU time, memory."""
    setup = Setup(count, 1, count)
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringplane-scrapes-", dir="/dev/shm")))
            config = folder / "ringplane.toml"
            disks = '[[disk]]\nimage = "{0}.img"\ncreate = "1M"\nsocket-path = "{0}.sock"\nengine = "null"\n'
            config.write_text("".join(map(disks.format, range(count))))
            pid, url = stack.enter_context(serving_metrics(config, setup, os.sched_getaffinity(0)))
            before = pss_mb(pid)
            for number in range(count):
                request_each_kind(folder / f"{number}.sock")
            used, scraper = pss_mb(pid), Scraper(url)
            text = scraper.scrape()
            cpu = cpu_ns(pid)
            times = [scraper.time_ms() for _ in range(scrapes)]
            cpu = cpu_ns(pid) - cpu
            after = pss_mb(pid)
    except (BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    lines = text.count(b"\n")
    click.echo(f"{count} disks: {lines} lines, {len(text) / 1e6:.1f} MB; {scrapes} scrapes after the first one")
    click.echo(f"ms: median {statistics.median(times):.1f}, {min(times):.1f} to {max(times):.1f}")
    click.echo(f"CPU ms of ringplane per scrape, with what else it did meanwhile: {cpu / 1e6 / scrapes:.1f}")
    click.echo(f"PSS in MB: {before:.1f} at first, {used:.1f} when all disks were used, {after:.1f} after the scrapes")


if __name__ == "__main__":
    main()
