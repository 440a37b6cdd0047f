"""ringplane beside qemu-storage-daemon (aio=native, cache.direct=on): 4 KiB random reads, interleaved, medians.

    python benchmarks/compare.py --folder /dev/shm --folder /var/tmp

Both back ends serve files of their own with the same contents, in the same run: in each round each cell is measured on
one and then on the other, the order alternating, so that what else the machine does falls on both.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ringplane.cli.sizes import Size
from ringplane.driver.disk import Driver
from ringplane.driver.load import Load, Result, fill, run_load

AIO, IO_URING, QSD = "ringplane aio", "ringplane io_uring", "qemu-storage-daemon native"
BACKENDS = (AIO, IO_URING, QSD)
START_DEADLINE = 60.0


def command(backend: str, image: Path, socket: Path) -> list[str]:
    """The command line of a back end; all use O_DIRECT, qemu-storage-daemon Linux AIO."""
    if backend != QSD:
        return [sys.executable, "-m", "ringplane", "serve", "--blk-file", str(image), "--socket-path", str(socket),
                "--num-queues", "1", "--engine", backend.split()[1]]  # fmt: skip
    return [
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=file,filename={image},cache.direct=on,aio=native",
        "--blockdev", "driver=raw,node-name=disk,file=file",
        "--export", f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
    ]  # fmt: skip


@contextlib.contextmanager
def running(backend: str, image: Path, socket: Path) -> Iterator[None]:
    """A back end process, started and ended."""
    process = subprocess.Popen(command(backend, image, socket), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_DEADLINE
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"{backend} did not start: {' '.join(command(backend, image, socket))}")
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def measure_folder(
    folder: Path, size: int, depths: list[int], rounds: int, seconds: float, busy_poll: bool
) -> dict[tuple[int, str], list[Result]]:
    """All cells for images in one folder: (depth, back end) to one result a round."""
    results: dict[tuple[int, str], list[Result]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.ExitStack() as stack:
        disks = {}
        for backend in BACKENDS:
            image, socket = Path(name, f"{len(disks)}.img"), Path(name, f"{len(disks)}.sock")
            with image.open("wb") as file:
                file.truncate(size)
            stack.enter_context(running(backend, image, socket))
            disks[backend] = stack.enter_context(Driver(socket, queues=1, queue_size=256))
            fill(disks[backend])
        for round_number in range(rounds):
            order = BACKENDS if round_number % 2 == 0 else BACKENDS[::-1]
            for depth in depths:
                for backend in order:
                    load = Load(depth=depth, seconds=seconds, warm_up=0.3, seed=round_number + 1, busy_poll=busy_poll)
                    results[depth, backend].append(run_load(disks[backend], load))
    return results


def table(title: str, results: dict[tuple[int, str], list[Result]]) -> Table:
    """Medians of each cell, and the ratio of ringplane to the other."""
    shown = Table(title=title)
    for heading in ("depth", "back end", "k IOPS", "p50 us", "p99 us", "us CPU per I/O"):
        shown.add_column(heading, justify="right")
    for depth, backend in sorted(results, key=lambda cell: (cell[0], BACKENDS.index(cell[1]))):
        rows = results[depth, backend]
        shown.add_row(
            str(depth),
            backend,
            *(f"{statistics.median(values):.1f}" for values in figures(rows)),
            end_section=backend == QSD,
        )
    return shown


def figures(rows: list[Result]) -> tuple[list[float], ...]:
    """The columns of the table, one value a round."""
    return (
        [row.iops / 1000 for row in rows],
        [row.p50_us for row in rows],
        [row.p99_us for row in rows],
        [row.backend_cpu_per_io_us or 0.0 for row in rows],
    )


def plot(path: Path, rows: list[dict[str, Any]], rounds: int) -> None:
    """IOPS and CPU per I/O against depth, one line a back end, one row of plots a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folders = list(dict.fromkeys(row["folder"] for row in rows))
    figure, axes = pyplot.subplots(len(folders), 2, figsize=(10, 4 * len(folders)), squeeze=False, layout="constrained")
    for line, folder in enumerate(folders):
        for axis, (key, label) in zip(axes[line], (("kiops", "k IOPS"), ("cpu_us", "CPU us per I/O")), strict=True):
            for backend in BACKENDS:
                mine = [row for row in rows if (row["folder"], row["backend"]) == (folder, backend)]
                depths = sorted({row["depth"] for row in mine})
                medians = [statistics.median(row[key] for row in mine if row["depth"] == depth) for depth in depths]
                axis.plot(depths, medians, marker="o", label=backend)
            axis.set(title=f"image in {folder}", xlabel="depth", ylabel=label, xscale="log", ylim=(0, None))
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.legend()
    figure.suptitle(f"4 KiB random reads, one queue, medians of {rounds}")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--folder", "folders", type=Path, multiple=True, default=[Path("/dev/shm"), Path("/var/tmp")])
@click.option("--size", type=Size(), default="1G", show_default=True)
@click.option("--depth", "depths", type=int, multiple=True, default=[1, 32, 128], show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each measurement, after a warm-up.")
@click.option("--busy-poll", is_flag=True, help="A driver that spins instead of waiting for calls.")
@click.option("--json", "json_path", type=Path, help="Write all results there.")
@click.option("--plot", "plot_path", type=Path, help="Draw a PNG there (needs matplotlib: the extra `bench`).")
def main(
    folders: list[Path],
    size: int,
    depths: list[int],
    rounds: int,
    seconds: float,
    busy_poll: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Measure both back ends side by side and print the medians."""
    if not shutil.which("qemu-storage-daemon"):
        raise click.ClickException("qemu-storage-daemon is not installed (Debian package qemu-utils)")
    everything: list[dict[str, Any]] = []
    for folder in folders:
        results = measure_folder(folder, size, list(depths), rounds, seconds, busy_poll)
        Console(width=110).print(table(f"4 KiB random reads, image in {folder}, medians of {rounds}", results))
        for (depth, backend), rows in results.items():
            for iops, p50, p99, cpu in zip(*figures(rows), strict=True):
                everything.append(
                    {"folder": str(folder), "depth": depth, "backend": backend, "kiops": iops, "p50_us": p50,
                     "p99_us": p99, "cpu_us": cpu}
                )  # fmt: skip
    if json_path:
        json_path.write_text(json.dumps(everything, indent=1))
    if plot_path:
        plot(plot_path, everything, rounds)


if __name__ == "__main__":
    main()
