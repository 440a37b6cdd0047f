"""How long is a guest without its disk in a planned restart? The slowest request of a load, with one and without.

    python benchmarks/restart.py [--image-folder /var/tmp] [--engine io_uring] [--rounds 7]

Each round loads the disk twice at each depth: once undisturbed, and once while another process takes over (`serve
--upgrade`). A request that comes at the wrong moment waits until the new process resumes. Storage that is sometimes
slow is so during a restart too: what ringplane adds is best measured on tmpfs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

from ringplane.driver import Driver, Load, run_load
from ringplane.metrics.histogram import percentile

SIZE = 256 << 20
SECONDS = 2.0


def start(image: Path, socket: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ringplane", "serve", "--image", str(image), "--socket-path", str(socket)]
    process = subprocess.Popen(
        [*command, "--num-queues", "1", "--log-level", "warning", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "listening" not in process.stdout.readline():
        if process.poll() is not None:
            sys.exit(f"ringplane ended with status {process.returncode}")
    return process


class Restart(threading.Thread):
    """A new process takes over from the running one, one second after the load started."""

    def __init__(self, running: subprocess.Popen[str], image: Path, socket: Path, engine: str) -> None:
        super().__init__()
        self.running, self.image, self.socket, self.engine = running, image, socket, engine

    def run(self) -> None:
        time.sleep(1)
        old, self.running = self.running, start(self.image, self.socket, "--engine", self.engine, "--upgrade")
        if old.wait() != 0:
            sys.exit("the process that was taken over from has failed")


def slowest_ms(driver: Driver, depth: int) -> float:
    load = Load(pattern="random", read_percent=70, depth=depth, queues=1, seconds=SECONDS)
    result = run_load(driver, load)
    if result.errors:
        sys.exit(f"an error: {result.first_error}")
    return percentile(result.histogram, 100) / 1e6


@click.command()
@click.option("--image-folder", type=Path, help="Where the image lies [default: TMPDIR].")
@click.option("--engine", default="auto", show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(image_folder: Path | None, engine: str, rounds: int) -> None:
    """Print the slowest request in milliseconds, for each depth: median and maximum of the rounds."""
    with tempfile.TemporaryDirectory(dir=image_folder) as folder:
        image, socket = Path(folder, "image"), Path(folder, "socket")
        image.write_bytes(bytes(SIZE))
        running = start(image, socket, "--engine", engine)
        with Driver(socket, queue_size=256) as driver:
            for depth in (1, 32, 128):
                quiet, restarted = [], []
                for _ in range(rounds):
                    quiet.append(slowest_ms(driver, depth))
                    restart = Restart(running, image, socket, engine)
                    restart.start()
                    restarted.append(slowest_ms(driver, depth))
                    restart.join()
                    running = restart.running
                for name, values in (("undisturbed", quiet), ("restarted", restarted)):
                    median = statistics.median(values)
                    click.echo(f"depth {depth:3}, {name:11}: median {median:6.1f} ms, max {max(values):6.1f} ms")
        running.terminate()
        running.wait()


if __name__ == "__main__":
    main()
