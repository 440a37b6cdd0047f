"""How accurate are limits, and how fair are groups? ringplane beside qemu-storage-daemon's throttle groups.

    python benchmarks/limits.py --markdown limits.md --json limits.json

Both serve disks that read and write nothing, so that storage is not what limits. In each row both are measured one
after the other, for --seconds after a warm-up in which the bucket gets full. `off by` is the difference from the limit.
A row that is below its limit by more than 0.5 % is measured without a limit too: it is in brackets if the machine does
not reach the limit. Disks that need few requests per second are measured at the same time.

All of it takes some 12 minutes with 8 seconds per row, and 6 with --seconds 2, which are too few for a limit of 100
requests per second. Both files are written after each row.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from limited_disks import QEMU, RINGPLANE, SLEEPING, THREADS, Disk, Limits, served
from one_driver import SECOND_NS, drive_together, serving_apart
from trees import table

from ringplane.bench import machine
from ringplane.driver.driver import Driver
from ringplane.driver.load import Load, Progress, Result, run_load

WARM_UP = 1.0
DEPTHS, QUEUES = (1, 32, 128), (1, 4)
IOPS = (100, 1_000, 10_000, 100_000, 1_000_000)
# Bytes per second, and the size of the requests.
BYTES = {1_000_000: 4096, 100_000_000: 16384, 1_000_000_000: 1 << 18, 5_000_000_000: 1 << 20}
# Disks are measured at the same time if they need no more requests per second together, and that many disks.
TOGETHER, MOST_TOGETHER = 25_000, 6
# A row is off if it is below its limit by more.
NOISE = 0.005
# How long disks without limits are measured.
FREE_SECONDS = 1.5

WEIGHTS = {"8 disks, equal": (1,) * 8, "3 disks, 1:2:4": (1, 2, 4)}
GROUP_IOPS = (100, 8_000, 80_000)

# Of requests per second: the limit, the rate of its burst and its length. What is done after so many seconds.
AVERAGE, HIGHEST, LENGTH = 1000, 5000, 2
MOMENTS = (1.0, 2.0, 4.0, 6.0)

# A disk beside another one on its I/O thread: how often it is measured, for how long.
ROUNDS, ROUND_SECONDS = 3, 1.5

# What was measured of a server.
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """`what`: the first columns of its table; `figures`: of each server."""

    part: str
    what: dict[str, Any]
    figures: dict[str, Figures]


@dataclass(frozen=True, slots=True)
class Case:
    """A disk, and what is done to it."""

    disk: Disk
    load: Load

    @property
    def free(self) -> Case:
        """Without a limit, in a shorter time."""
        return replace(
            self, disk=replace(self.disk, limits={}, group=""), load=replace(self.load, seconds=FREE_SECONDS)
        )


@dataclass(frozen=True, slots=True)
class Settings:
    seconds: float
    servers: Sequence[str]

    def load(self, **values: Any) -> Load:
        return Load(**{"seconds": self.seconds, "warm_up": WARM_UP, "timeout": 120.0} | values)


def run(
    server: str, cases: Sequence[Case], watchers: Sequence[Callable[[Progress], None] | None] | None = None
) -> list[Result]:
    """All of them at the same time."""
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(served(server, [case.disk for case in cases]))
        drivers = [stack.enter_context(driver_of(case, socket)) for case, socket in zip(cases, sockets, strict=True)]
        return drive(drivers, [case.load for case in cases], watchers)


def driver_of(case: Case, socket: Path) -> Driver:
    load = case.load
    size = load.queues * load.depth * max(load.sizes)
    return Driver(socket, queues=load.queues, memory_size=size + (64 << 20), timeout=load.timeout)


def drive(
    drivers: Sequence[Driver],
    loads: Sequence[Load],
    watchers: Sequence[Callable[[Progress], None] | None] | None = None,
) -> list[Result]:
    with ThreadPoolExecutor(len(drivers)) as pool:
        results = list(pool.map(run_load, drivers, loads, watchers or [None] * len(drivers)))
    for result in results:
        if result.errors:
            raise click.ClickException(f"a request failed: {result.first_error}")
    return results


# One disk: limits of requests and of bytes


@dataclass(frozen=True, slots=True)
class Rate:
    """A row of the first table."""

    key: str
    limit: int
    case: Case

    @property
    def requests(self) -> float:
        """Per second."""
        return self.limit if self.key == "total-iops-sec" else self.limit / self.case.load.sizes[0]

    @property
    def what(self) -> dict[str, Any]:
        load = self.case.load
        unit = "IOPS" if self.key == "total-iops-sec" else "B/s"
        return {"limit": f"{self.limit:,} {unit}", "size": load.sizes[0], "queues": load.queues, "depth": load.depth}

    def value(self, result: Result) -> float:
        """Requests or bytes per second."""
        return result.iops if self.key == "total-iops-sec" else result.bytes / result.seconds


def all_rates(settings: Settings) -> Iterator[Rate]:
    limits = [("total-iops-sec", limit, 4096) for limit in IOPS]
    limits += [("total-bytes-sec", limit, size) for limit, size in BYTES.items()]
    for (key, limit, size), queues, depth in itertools.product(limits, QUEUES, DEPTHS):
        # The queues of a disk that has several are on two I/O threads.
        disk = Disk({key: limit}, queues, threads=THREADS if queues > 1 else ())
        yield Rate(key, limit, Case(disk, settings.load(block_size=size, depth=depth, queues=queues)))


def batches(rates: Iterator[Rate]) -> Iterator[list[Rate]]:
    """Those that can be measured at the same time."""
    batch: list[Rate] = []
    for rate in rates:
        if batch and (len(batch) == MOST_TOGETHER or sum(each.requests for each in [*batch, rate]) > TOGETHER):
            yield batch
            batch = []
        batch.append(rate)
    yield batch


def measure_rates(settings: Settings) -> Iterator[Row]:
    for batch in batches(all_rates(settings)):
        results = {server: run(server, [rate.case for rate in batch]) for server in settings.servers}
        for number, rate in enumerate(batch):
            figures = {server: rate_figures(server, rate, results[server][number]) for server in settings.servers}
            yield Row("rates", rate.what, figures)


def rate_figures(server: str, rate: Rate, result: Result) -> Figures:
    value = rate.value(result)
    figures = {"per_second": value, "off": value / rate.limit - 1}
    if figures["off"] < -NOISE:
        figures["without_limit"] = rate.value(run(server, [rate.case.free])[0])
        figures["limit"] = rate.limit
    return figures


def shown_rate(figures: Figures) -> str:
    off = percent(figures["off"], 2)
    if "without_limit" not in figures:
        return off
    text = f"{off}, {figures['without_limit']:,.0f} without a limit"
    return f"({text})" if figures["without_limit"] < figures["limit"] else text


def percent(ratio: float, digits: int) -> str:
    return f"{100 * ratio:+.{digits}f} %"


# Bursts


class Watcher:
    """How many requests were done when."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = [(0.0, 0)]

    def __call__(self, progress: Progress) -> None:
        self.samples.append((progress.seconds, progress.requests))

    def done(self, at: float) -> float:
        """Between two samples as many per second as on average."""
        for (since, before), (until, after) in itertools.pairwise(self.samples):
            if since <= at <= until:
                return before + (after - before) * (at - since) / max(until - since, 1e-9)
        return self.samples[-1][1]


def expected_burst(length: int, at: float) -> float:
    """A bucket of the burst's rate and length is filled, at that rate if it lasts longer than a second."""
    first = HIGHEST * length + AVERAGE * at
    return first if length == 1 else min(first, HIGHEST * (at + 0.1))


def measure_bursts(settings: Settings) -> Iterator[Row]:
    """They are too short for --seconds."""
    lengths, found = (1, LENGTH), {}
    for server in settings.servers:
        watchers = [Watcher() for _ in lengths]
        load = settings.load(depth=32, seconds=max(MOMENTS) + 0.3, warm_up=0)
        run(server, [Case(Disk(burst(length)), load) for length in lengths], watchers)
        found[server] = watchers
    for (number, length), at in itertools.product(enumerate(lengths), MOMENTS):
        what = {"length": f"{length} s", "after": f"{at:g} s", "expected": round(expected_burst(length, at))}
        yield Row("bursts", what, {server: {"requests": found[server][number].done(at)} for server in found})


def burst(length: int) -> Limits:
    limits = {"total-iops-sec": AVERAGE, "total-iops-sec-max": HIGHEST}
    return limits if length == 1 else {**limits, "total-iops-sec-max-length": length}


# Groups


def measure_groups(settings: Settings) -> Iterator[Row]:
    """With equal weights half of the disks have 4 requests in flight, the others 32."""
    for (name, weights), limit in itertools.product(WEIGHTS.items(), GROUP_IOPS):
        depths = (4, 32) if len(set(weights)) == 1 else (32,)
        cases = [
            Case(Disk({"total-iops-sec": limit}, group="group", weight=weight), settings.load(depth=depth))
            for weight, depth in zip(weights, itertools.cycle(depths), strict=False)
        ]
        # QEMU has no weights.
        able = [server for server in settings.servers if server == RINGPLANE or len(set(weights)) == 1]
        found = {server: group_figures(run(server, cases), weights, limit) for server in able}
        yield Row("groups", {"group": name, "limit": f"{limit:,} IOPS"}, found)


def group_figures(results: Sequence[Result], weights: Sequence[int], limit: int) -> Figures:
    total = sum(result.iops for result in results)
    fair = [total * weight / sum(weights) for weight in weights]
    shares = [result.iops / share - 1 for result, share in zip(results, fair, strict=True)]
    return {"per_second": total, "off": total / limit - 1, "shares": shares}


# Reads and writes with limits of their own


def measure_mixed(settings: Settings) -> Iterator[Row]:
    """How many requests per second in all; the reads are as many as their limit allows."""
    mixes = (({"read-iops-sec": 1000}, 50, 2000), ({"read-iops-sec": 1000, "write-iops-sec": 3000}, 25, 4000))
    rows = list(itertools.product(mixes, QUEUES))
    cases = [
        Case(
            Disk(limits, queues, threads=THREADS if queues > 1 else ()),
            settings.load(depth=32, queues=queues, read_percent=reads),
        )
        for (limits, reads, _), queues in rows
    ]
    results = {server: run(server, cases) for server in settings.servers}
    for number, ((limits, reads, expected), queues) in enumerate(rows):
        words = ", ".join(f"{key}={value}" for key, value in limits.items())
        what = {"limits": words, "reads": f"{reads} %", "queues": queues, "expected": expected}
        yield Row("mixed", what, {server: {"iops": results[server][number].iops} for server in settings.servers})


# A disk without a limit, beside one at its limit on the same I/O thread; and beside one that has no limit, but as many
# requests, because its driver pauses

BESIDE = 1000
BESIDE_CASES = ("alone", "limited", "paced")


def measure_beside(settings: Settings) -> Iterator[Row]:
    for thread, depth in itertools.product((THREADS[0], SLEEPING), DEPTHS[:2]):
        disks = [Disk(threads=(thread,)), Disk({"total-iops-sec": BESIDE}, threads=(thread,)), Disk(threads=(thread,))]
        # QEMU has one thread, which polls if that pays off.
        able = [server for server in settings.servers if server == RINGPLANE or thread != SLEEPING]
        found = {server: beside_figures(server, disks, depth) for server in able}
        yield Row("beside", {"depth": depth, "I/O thread": "sleeps" if thread == SLEEPING else "may poll"}, found)


def beside_figures(server: str, disks: Sequence[Disk], depth: int) -> Figures:
    """Medians of some rounds."""
    taken: dict[str, list[float]] = {}
    with serving_apart(server, disks) as (free, limited, paced):
        both, pause = [depth, 32], SECOND_NS // BESIDE
        loads = ([free], [depth], [0]), ([free, limited], both, [0, 0]), ([free, paced], both, [0, pause])
        cases = list(zip(BESIDE_CASES, loads, strict=True))
        for number in range(ROUNDS):
            for name, load in cases[:: -1 if number % 2 else 1]:
                found = drive_together(*load, ROUND_SECONDS)
                taken.setdefault(name, []).append(found.iops)
                taken.setdefault(f"p99_{name}", []).append(found.p99_us)
    return {name: statistics.median(values) for name, values in taken.items()}


# Very many disks, all at their limits

MANY, IN_ALL = (1, 64, 512), 51_200


def measure_many(settings: Settings) -> Iterator[Row]:
    """The CPU time of an I/O thread that does not poll, for as many requests in all."""
    for count in MANY:
        disks = [Disk({"total-iops-sec": IN_ALL // count}, threads=(SLEEPING,))] * count
        with serving_apart(RINGPLANE, disks) as drivers:
            measured = [drive_together(drivers, [4] * count, [0] * count, ROUND_SECONDS) for _ in range(ROUNDS)]
        busy, iops = (statistics.median(getattr(each, name) for each in measured) for name in ("busy", "iops"))
        yield Row("many", {"disks": count}, {RINGPLANE: {"cpu_us": busy * 1e6 / (iops * count)}})


# The tables


def shown_shares(figures: Figures) -> str:
    return f"{percent(min(figures['shares']), 1)[:-2]} to {percent(max(figures['shares']), 1)}"


@dataclass(frozen=True, slots=True)
class Part:
    """`columns`: of each server, by their titles."""

    title: str
    measure: Callable[[Settings], Iterator[Row]]
    columns: Mapping[str, Callable[[Figures], str]]


PARTS = {
    "rates": Part("One disk; the depth is that of each queue", measure_rates, {"off by": shown_rate}),
    "bursts": Part(
        f"Requests done, {AVERAGE} per second, bursts of {HIGHEST}",
        measure_bursts,
        {"done": lambda figures: f"{figures['requests']:,.0f}"},
    ),
    "groups": Part(
        "Groups, each disk with one queue",
        measure_groups,
        {"off by": lambda figures: percent(figures["off"], 2), "shares off by": shown_shares},
    ),
    "mixed": Part(
        "Reads and writes, 32 in flight on each queue",
        measure_mixed,
        {"IOPS in all": lambda figures: f"{figures['iops']:,.0f}"},
    ),
    "beside": Part(
        f"A disk without a limit, beside one of {BESIDE} IOPS on its thread: at its limit, or paced by its driver",
        measure_beside,
        {
            "IOPS alone": lambda figures: f"{figures['alone']:,.0f}",
            "beside limited": lambda figures: percent(figures["limited"] / figures["alone"] - 1, 1),
            "paced": lambda figures: percent(figures["paced"] / figures["alone"] - 1, 1),
            "p99 us": lambda figures: ", ".join(
                f"{figures[f'p99_{name}']:.1f}" for name in ("alone", "limited", "paced")
            ),
        },
    ),
    "many": Part(
        f"Many disks at their limits, {IN_ALL} IOPS in all",
        measure_many,
        {"CPU us per request": lambda figures: f"{figures['cpu_us']:.2f}"},
    ),
}


def described(rows: Sequence[Row], servers: Sequence[str]) -> str:
    """Markdown."""
    tables = []
    for name, part in PARTS.items():
        mine = [row for row in rows if row.part == name]
        if mine:
            heading = [*mine[0].what, *(f"{server}: {title}" for server in servers for title in part.columns)]
            tables.append(f"{part.title}:\n\n{table(heading, [cells(row, part, servers) for row in mine])}\n")
    return "\n".join(tables)


def cells(row: Row, part: Part, servers: Sequence[str]) -> list[str]:
    shown = [
        show(row.figures[server]) if server in row.figures else ""
        for server in servers
        for show in part.columns.values()
    ]
    return [*map(str, row.what.values()), *shown]


@click.command(help=__doc__.replace("\n\n    python", "\n\n\b\n    python"))
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), default=list(PARTS))
@click.option("--seconds", type=click.FloatRange(0.1), default=8.0, show_default=True)
@click.option("--against/--alone", default=True, help="Beside qemu-storage-daemon.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables to this file.")
@click.option("--json", "data", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this file.")
def main(parts: Sequence[str], seconds: float, against: bool, markdown: Path | None, data: Path | None) -> None:
    settings = Settings(seconds, [RINGPLANE, *([QEMU] if against else [])])
    about, began, rows = machine.describe(), time.monotonic(), list[Row]()
    for name in dict.fromkeys(parts):
        for row in PARTS[name].measure(settings):
            rows.append(row)
            click.echo(
                f"{time.monotonic() - began:4.0f} s {' '.join(cells(row, PARTS[name], settings.servers))}", err=True
            )
            text = f"{described(rows, settings.servers)}\n{machine.sentence(about)}; {seconds:g} s per row\n"
            if markdown:
                markdown.write_text(text)
            if data:
                data.write_text(json.dumps({"machine": about, "seconds": seconds, "rows": list(map(asdict, rows))}))
    click.echo(text)


if __name__ == "__main__":
    main()
