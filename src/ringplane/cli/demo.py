"""`ringplane demo`: no guest, no root: serve a temporary image, verify every block of it, and measure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ringplane.cli.types import FILE, SIZE
from ringplane.values import format_size

if TYPE_CHECKING:
    from ringplane.driver.load import Load, Model, Result

DEPTHS = (1, 32, 128)
READY = "listening on"


@click.command(short_help="Try ringplane without a guest.")
@click.option("--image", type=FILE, help="Where to make the image [default: a temporary folder]; removed afterwards.")
@click.option("--size", type=SIZE, default="256M", show_default=True, help="Of the image.")
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Of each measurement.")
def demo(image: Path | None, size: int, seconds: float) -> None:
    """Try ringplane without a guest: start a disk, write and verify every block, then measure it.

    A real `ringplane serve` process serves a new image; this process drives it over the socket as a guest would.
    Exits with status 1 if a single byte comes back wrong.
    """
    console = Console(highlight=False)
    if image and image.exists():
        raise click.ClickException(f"{image}: exists already; the demo overwrites nothing, name a new file")
    if size < 4 << 20 or size % 4096:
        raise click.ClickException(f"--size {size} is not a multiple of 4096 of at least 4M")
    with tempfile.TemporaryDirectory(prefix="ringplane-demo-") as folder:
        path = image or Path(folder, "disk.img")
        try:
            good = run_demo(console, Path(folder), path, size, seconds)
        finally:
            path.unlink(missing_ok=True)
    if not good:
        raise SystemExit(1)


def run_demo(console: Console, folder: Path, image: Path, size: int, seconds: float) -> bool:
    """All steps; whether all data was right."""
    from ringplane.native.cache import is_cached

    # The first start is a cold one: with what this machine has not compiled yet, or else with an empty cache.
    cache = {"RINGPLANE_CACHE_DIR": str(folder / "cache")} if is_cached() else {}
    console.print("cold start: compiling the data plane ...")
    with serving(folder, image, ["--create", str(size)], cache) as cold:
        pass
    with serving(folder, image, [], cache) as warm:
        console.print(f"serving {image} ({format_size(size)}) at {folder / 'socket'}; compiling the driver ...")
        results, good = exercise(console, folder / "socket", seconds)
    console.print(results)
    console.print(f"start to listening: cold {cold:.1f} s (compiles), warm {warm:.2f} s")
    return good


@contextlib.contextmanager
def serving(folder: Path, image: Path, extra: list[str], environment: dict[str, str]) -> Iterator[float]:
    """A `ringplane serve` process; yields the seconds that it took to listen."""
    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", str(image), "--log-level", "warning"]
    command += ["--socket-path", str(folder / "socket"), "--num-queues", "1", *extra]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(READY):
                break
        else:
            raise click.ClickException(f"`ringplane serve` ended with status {process.wait()} before it listened")
        yield time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    if process.returncode != 0:
        raise click.ClickException(f"`ringplane serve` ended with status {process.returncode}")


def exercise(console: Console, socket: Path, seconds: float) -> tuple[Table, bool]:
    """Write and verify the whole disk, then load it; the table, and whether all data was right."""
    from ringplane.driver.disk import Driver
    from ringplane.driver.load import check, fill

    table = results_table()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[rate]:>16}"))
    with Driver(socket) as disk, Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("write every block", total=disk.capacity, rate="")
        model, written = fill(disk, progress=lambda now: show(progress, task, now.bytes, now))
        show(progress, task, disk.capacity, written)
        task = progress.add_task("read and verify every block", total=disk.capacity, rate="")
        results = [check(disk, model, progress=lambda now: show(progress, task, now.bytes, now))]
        show(progress, task, disk.capacity, results[0])
        for depth in DEPTHS:
            for name, load in loads(depth, seconds, model):
                results.append(measure(progress, disk, f"{name}, depth {depth}", load, seconds))
                add_row(table, name, depth, results[-1])
    return table, report(console, disk.capacity, results)


def loads(depth: int, seconds: float, model: Model) -> list[tuple[str, Load]]:
    """What is measured at one depth; the mixed load verifies each sector that it reads."""
    from ringplane.driver.load import Load

    return [
        ("random read", Load(depth=depth, seconds=seconds, warm_up=0.2)),
        ("70/30, verified", Load(depth=depth, seconds=seconds, read_percent=70, verify=True, model=model)),
    ]


def measure(progress: Progress, disk: object, name: str, load: Load, seconds: float) -> Result:
    """One load, with its progress shown."""
    from ringplane.driver.disk import Driver
    from ringplane.driver.load import run_load

    assert isinstance(disk, Driver)
    task = progress.add_task(name, total=seconds, rate="")
    result = run_load(disk, load, lambda now: show(progress, task, now.seconds, now))
    show(progress, task, seconds, result)
    return result


def show(progress: Progress, task: object, completed: float, now: object) -> None:
    """Move a bar on; `now` is a Progress or Result of the load generator."""
    seconds, requests, size = (getattr(now, name) for name in ("seconds", "requests", "bytes"))
    rate = ""
    if seconds > 0:
        large = requests and size / requests > 65536
        rate = f"{size / seconds / 1e6:,.0f} MB/s" if large else f"{requests / seconds / 1000:,.1f} k IOPS"
    progress.update(task, completed=completed, rate=rate)  # type: ignore[arg-type]


def results_table() -> Table:
    table = Table(title="4 KiB random requests, one queue, one I/O thread")
    table.add_column("load", no_wrap=True)
    for heading in ("depth", "IOPS", "MB/s", "p50 us", "p99 us", "CPU us per I/O"):
        table.add_column(heading, justify="right")
    return table


def add_row(table: Table, name: str, depth: int, result: Result) -> None:
    cpu = result.backend_cpu_per_io_us
    table.add_row(
        name,
        str(depth),
        f"{result.iops:,.0f}",
        f"{result.mb_per_second:,.0f}",
        f"{result.p50_us:.0f}",
        f"{result.p99_us:.0f}",
        "?" if cpu is None else f"{cpu:.2f}",
    )


def report(console: Console, capacity: int, results: list[Result]) -> bool:
    """Say whether the data was right."""
    mismatches, errors = sum(r.mismatches for r in results), sum(r.errors for r in results)
    checked = sum(result.sectors_checked for result in results)
    if not mismatches and not errors:
        console.print(f"verified: all {capacity // 512:,} sectors, {checked:,} sector reads, no mismatch, no error")
        return True
    first = next(text for r in results for text in (r.first_mismatch, r.first_error) if text)
    console.print(f"[bold red]FAILED[/]: {mismatches} sectors wrong, {errors} requests failed; the first: {first}")
    return False
