"""What recording costs: CPU time of the process per write of 4 KiB, of a disk that is recorded and of one that is not.

    python benchmarks/recording_cost.py FOLDER

The disk and the recording are in the folder: on tmpfs it is the engine `memory`. The rounds are interleaved. Beside it
stands what a program needs that only writes as many bytes as the recording has, in pieces of 1 MiB: recording cannot
cost less than that, whatever else it does.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from trees import THIS, serving, table

from ringplane.driver import Driver, Load, run_load
from ringplane.driver.load import Result
from ringplane.recordings.recording_format import HEAD

# The first requests allocate the image and start the I/O thread's measurements of its own.
WARM_UP = 70_000

# Of a write of 4 KiB in the recording, in bytes.
ENTRY_SIZE = HEAD.size + 4096
# Those that are written without a disk, and the size of such a write.
ENTRIES, PIECE = 100_000, 1 << 20


def measure(place: Path, seconds: float, *, recorded: bool) -> Result:
    """A load of writes at depth 128 on a new disk."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        options = ["--blk-file", f"{folder}/disk.img", "--create", "256M", "--socket-path", f"{folder}/sock"]
        options += ["--num-queues", "1", "--poll-us", "0", *(["--record", f"{folder}/disk.rec"] if recorded else [])]
        with serving(THIS, options), Driver(f"{folder}/sock", timeout=300) as driver:
            run_load(driver, Load(depth=128, read_percent=0, requests=WARM_UP))
            return run_load(driver, Load(depth=128, read_percent=0, seconds=seconds))


def bare_writes(place: Path, flags: int) -> float:
    """CPU time in microseconds per entry, of a new file with as many bytes as ENTRIES entries."""
    piece = mmap.mmap(-1, PIECE)
    piece.write(os.urandom(PIECE))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        fd = os.open(f"{folder}/file", os.O_WRONLY | os.O_CREAT | flags)
        begin = time.process_time()
        for _ in range(ENTRIES * ENTRY_SIZE // PIECE):
            os.write(fd, piece)
        cpu = time.process_time() - begin
        os.close(fd)
    return cpu / ENTRIES * 1e6


def bare_line(name: str, place: Path, flags: int, rounds: int) -> list[str]:
    """The median of some rounds."""
    try:
        cpu = statistics.median(bare_writes(place, flags) for _ in range(rounds))
    except OSError as error:
        return [name, str(error.strerror), ""]
    return [name, f"{cpu:.2f}", ""]


def line(name: str, results: Sequence[Result]) -> list[str]:
    """The medians of some rounds."""
    cpu = statistics.median(result.backend_cpu_per_io_us or 0.0 for result in results)
    return [name, f"{cpu:.2f}", f"{statistics.median(result.iops for result in results):.0f}"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Length of each measurement.")
def main(folder: Path, rounds: int, seconds: float) -> None:
    """Measure it on the file system of a FOLDER."""
    plain: list[Result] = []
    recorded: list[Result] = []
    for _ in range(rounds):
        plain.append(measure(folder, seconds, recorded=False))
        recorded.append(measure(folder, seconds, recorded=True))
    lines = [line("not recorded", plain), line("recorded", recorded)]
    lines.append(bare_line("only write(2)", folder, 0, rounds))
    lines.append(bare_line("only write(2), O_DIRECT", folder, os.O_DIRECT, rounds))
    click.echo(table(["", "CPU us per write", "writes per second"], lines))


if __name__ == "__main__":
    main()
