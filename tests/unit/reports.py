"""Reports of `ringplane bench` made by hand."""

from __future__ import annotations

from typing import Any

from ringplane.bench import backends, fio, machine, qsd, run
from ringplane.bench.cells import Cell
from ringplane.bench.results import Report, Row, Storage, Subject

CELL = Cell("randread", 32, 1, "event")
TMPFS = Storage("/dev/shm (tmpfs)", "tmpfs", "tmpfs")
OURS, NATIVE, THREADS = (
    backends.ringplane(),
    qsd.subject("native"),
    qsd.subject("threads"),
)


def row(
    subject: Subject, iops: float, number: int = 0, cell: Cell = CELL, storage: str = TMPFS.name, **others: Any
) -> Row:
    values: dict[str, Any] = {
        "seconds": 1.0, "requests": int(iops), "mb_s": iops / 1000, "mean_us": 10.0, "p50_us": 10.0, "p99_us": 20.0,
        "p999_us": 30.0, "cpu_us": 2.0, "driver_cpu_us": 1.0, "checked": 8, "histogram": {100: 5, 120: 1},
    }  # fmt: skip
    return Row(storage, cell, subject.name, number, iops=iops, **{**values, **others})


def report_of(*rows: Row, subjects: tuple[Subject, ...] = (OURS, NATIVE, THREADS, fio.RAW)) -> Report:
    settings = run.Settings(cells=[CELL]).described()
    return Report(machine.describe(), settings, [TMPFS], list(subjects), list(rows), sectors_checked=8)
