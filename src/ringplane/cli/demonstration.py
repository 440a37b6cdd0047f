"""What `ringplane demo` does: a disk is served by another process, written, verified and measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ringplane.options.sizes import format_size
from ringplane.system.signals import Signals

if TYPE_CHECKING:
    from ringplane.driver.load import Load, Model, Result

DEPTHS = (1, 32, 128)
READY = b"listening on"
# In columns. A line leaves room at its end for the ^C that a terminal shows, which would otherwise move all lines.
BAR = 16
# Seconds
STOP_PATIENCE = 20.0


def run_demo(console: Console, signals: Signals, image: Path | None, size: int, seconds: float) -> bool:
    """Run all steps; returns whether all data was right. Raises Interrupted."""
    with tempfile.TemporaryDirectory(prefix="ringplane-demo-") as folder:
        path = image or Path(folder, "disk.img")
        socket = Path(folder, "socket")
        try:
            with serving(signals, path, socket, size) as started:
                console.print(f"serving a new disk of {format_size(size)}, {started:.2f} s after its start:")
                console.print(f"  image   {path}\n  socket  {socket}", soft_wrap=True)
                with failures_in_words():
                    results, good = exercise(console, signals, socket, seconds)
        finally:
            path.unlink(missing_ok=True)
    console.print(results)
    return good


def compile_first(console: Console, signals: Signals) -> None:
    """Compile in advance for the first start, so that the user sees what takes long."""
    from ringplane.compiler.cache import DATA_PLANE, DRIVER, is_cached, place
    from ringplane.compiler.interpreted import INTERPRETED
    from ringplane.dataplane import compile_data_plane
    from ringplane.driver import compile_driver

    parts = (("data plane", DATA_PLANE, compile_data_plane, 10), ("driver", DRIVER, compile_driver, 5))
    for name, cached, module, seconds in parts:
        if not INTERPRETED and not is_cached(cached):
            once = "" if place().short_lived else ", once per installation"
            console.print(f"compiling the {name}{once}: about {seconds} s ...")
            started = time.monotonic()
            module.warm_up(signals=signals)
            console.print(f"compiled the {name} in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def serving(signals: Signals, image: Path, socket: Path, size: int) -> Iterator[float]:
    """A `ringplane serve` process; yields the seconds that it took to listen. Raises Interrupted."""
    from ringplane.compiler.cache import variables

    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", str(image), "--socket-path", str(socket)]
    command += ["--create", str(size), "--num-queues", "1", "--log-level", "warning"]
    environment = {**os.environ, **variables()}
    started = time.monotonic()
    # It has its own process group: Ctrl-C must signal only this process, which stops it in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, process_group=0)
    try:
        wait_until_it_listens(process, signals)
        yield time.monotonic() - started
    finally:
        end(process)
    if process.returncode != 0:
        raise click.ClickException(f"`ringplane serve` ended with status {process.returncode}")


def wait_until_it_listens(process: subprocess.Popen[bytes], signals: Signals) -> None:
    """Return when it listens; raises Interrupted, and ClickException if the process ends."""
    assert process.stdout is not None
    announced = b""
    while READY not in announced:
        signals.wait(process.stdout.fileno())
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            raise click.ClickException(f"`ringplane serve` ended with status {process.wait()} before it listened")
        announced += part


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop the process, by force if its storage hangs."""
    process.terminate()
    try:
        process.communicate(timeout=STOP_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def failures_in_words() -> Iterator[None]:
    """Turn exceptions of the driver into a ClickException."""
    from ringplane.driver.driver_failures import FAILURES, reason

    try:
        yield
    except FAILURES as error:
        raise click.ClickException(f"the disk failed: {reason(error)}") from None


class Bars(Progress):
    """Progress bars; updating one raises Interrupted after a signal."""

    def __init__(self, *columns: ProgressColumn, console: Console, signals: Signals) -> None:
        super().__init__(*columns, console=console)
        self._signals = signals

    def update(self, *arguments: Any, **options: Any) -> None:
        self._signals.check()
        super().update(*arguments, **options)


def exercise(console: Console, signals: Signals, socket: Path, seconds: float) -> tuple[Table, bool]:
    """Write and verify the whole disk, then load it; returns the table, and whether all data was right."""
    from ringplane.driver.driver import Driver
    from ringplane.driver.load import check, fill

    table = results_table()
    columns = (TextColumn("{task.description:<34}"), BarColumn(BAR), TextColumn("{task.fields[rate]:>16}"))
    with Driver(socket) as disk, Bars(*columns, TimeElapsedColumn(), console=console, signals=signals) as progress:
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
    """The loads at one depth; the mixed load verifies each sector that it reads."""
    from ringplane.driver.load import Load

    return [
        ("random read", Load(depth=depth, seconds=seconds, warm_up=0.2)),
        ("70/30, verified", Load(depth=depth, seconds=seconds, read_percent=70, verify=True, model=model)),
    ]


def measure(progress: Progress, disk: object, name: str, load: Load, seconds: float) -> Result:
    """Run one load and show its progress."""
    from ringplane.driver.driver import Driver
    from ringplane.driver.load import run_load

    assert isinstance(disk, Driver)
    task = progress.add_task(name, total=seconds, rate="")
    result = run_load(disk, load, lambda now: show(progress, task, now.seconds, now))
    show(progress, task, seconds, result)
    return result


def show(progress: Progress, task: object, completed: float, now: object) -> None:
    """Update a bar; `now` is a Progress or Result of the load generator."""
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
    """Print whether the data was right."""
    mismatches, errors = sum(r.mismatches for r in results), sum(r.errors for r in results)
    checked = sum(result.sectors_checked for result in results)
    if not mismatches and not errors:
        console.print(f"verified: all {capacity // 512:,} sectors, {checked:,} sector reads, no mismatch, no error")
        return True
    first = next(text for r in results for text in (r.first_mismatch, r.first_error) if text)
    console.print(f"[bold red]FAILED[/]: {mismatches} sectors wrong, {errors} requests failed; the first: {first}")
    return False
