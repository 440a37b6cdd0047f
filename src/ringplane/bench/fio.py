"""Raw fio on an image: the performance of the storage without a virtqueue, which is the limit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.bench.cells import WORKLOADS, Cell
from ringplane.bench.errors import BenchError, never
from ringplane.bench.results import FIO, Subject
from ringplane.metrics.histogram import BUCKETS, STEP_BITS, STEPS, percentile

RAW = Subject("raw fio", FIO)
# fio's time beyond warm-up and measurement, in seconds: it starts, and waits for its processes.
OVERHEAD = 0.7


def require() -> None:
    """Raise BenchError if fio is not installed."""
    if not shutil.which("fio"):
        raise BenchError("fio is not installed: apt install fio, or leave out --fio")


@dataclass(frozen=True, slots=True)
class Measured:
    """fio's results: latencies in microseconds; CPU time of fio's own threads per request, without io_uring's."""

    seconds: float
    requests: int
    iops: float
    mb_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us: float
    histogram: npt.NDArray[np.int64]


def command(image: Path, cell: Cell, region: tuple[int, int], seconds: float, warm_up: float) -> list[str]:
    """fio's command line for a cell: one job per queue, each on its part of `region` (offset and length in bytes)."""
    workload = WORKLOADS[cell.workload]
    share = region[1] // cell.queues // workload.block_size * workload.block_size
    kind = {0: "write", 100: "read"}.get(workload.read_percent, "rw")
    return [
        "fio", "--name=raw", f"--filename={image}", "--allow_file_create=0", "--ioengine=io_uring", "--direct=1",
        f"--rw={'rand' if workload.pattern == 'random' else ''}{kind}", f"--rwmixread={workload.read_percent}",
        f"--bs={workload.block_size}", f"--iodepth={cell.depth}", f"--numjobs={cell.queues}", "--group_reporting",
        f"--offset={region[0]}", f"--size={share}", f"--offset_increment={share}", "--norandommap", "--randrepeat=0",
        "--time_based", f"--runtime={round(seconds * 1e6)}us", f"--ramp_time={round(warm_up * 1e6)}us",
        "--unified_rw_reporting=mixed", "--lat_percentiles=1", "--clat_percentiles=0", "--output-format=json+",
    ]  # fmt: skip


def measure(
    image: Path,
    cell: Cell,
    region: tuple[int, int],
    seconds: float,
    warm_up: float,
    pulse: Callable[[], None] = never,
) -> Measured:
    """Run fio in one cell; writes over `region` if the workload writes. `pulse` is called regularly.

    Raises BenchError.
    """
    process = subprocess.Popen(
        command(image, cell, region, seconds, warm_up),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = _wait(process, pulse)
    except BaseException:
        # fio's jobs are processes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode != 0:
        last = (errors.strip() or output.strip() or f"exit status {process.returncode}").splitlines()[-1]
        raise BenchError(f"fio failed on {image}: {last}")
    # Warnings may precede the JSON.
    return parse(json.loads(output[output.index("{") :])["jobs"][0])


def _wait(process: subprocess.Popen[str], pulse: Callable[[], None]) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=0.2)
        except subprocess.TimeoutExpired:
            pulse()


def parse(job: dict[str, Any]) -> Measured:
    """The figures of one job in fio's output (--output-format=json+ --group_reporting)."""
    mixed = job["mixed"]
    histogram = _histogram(mixed["lat_ns"].get("bins", {}))
    requests = int(mixed["total_ios"])
    p50, p99, p999 = (percentile(histogram, percent) / 1000 for percent in (50, 99, 99.9))
    return Measured(
        seconds=mixed["runtime"] / 1000,
        requests=requests,
        iops=float(mixed["iops"]),
        mb_s=mixed["bw_bytes"] / 1e6,
        mean_us=mixed["lat_ns"]["mean"] / 1000,
        p50_us=p50,
        p99_us=p99,
        p999_us=p999,
        # A percentage of the time of all jobs together, in milliseconds.
        cpu_us=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1000 / max(1, requests),
        histogram=histogram,
    )


def _histogram(bins: dict[str, int]) -> npt.NDArray[np.int64]:
    """fio's bins (nanoseconds: count), converted to a histogram of ringplane.metrics.histogram."""
    counts = np.zeros(BUCKETS, np.int64)
    for text, number in bins.items():
        value = int(text)
        # The same rule as in ringplane.metrics.histogram.count.
        exponent = max(0, value.bit_length() - STEP_BITS)
        counts[exponent * STEPS + ((value >> max(0, exponent - 1)) & (STEPS - 1))] += number
    return counts
