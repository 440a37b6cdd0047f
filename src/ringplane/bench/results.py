"""The results of a bench: one row for each measurement; saved as JSON and loaded again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.bench import files
from ringplane.bench.cells import Cell
from ringplane.bench.errors import BenchError
from ringplane.metrics.histogram import BUCKETS

FORMAT = "ringplane-bench-1"

# Families of programs
RINGPLANE, QSD, FIO, SOCKET = "ringplane", "qemu-storage-daemon", "fio", "socket"
# For tables, because the full name would take a third of a line.
SHORT = "qsd"


@dataclass(frozen=True, slots=True)
class Subject:
    """A program that is measured: a unique `name`, its family, and its flags beyond the bench's own."""

    name: str
    family: str
    flags: tuple[str, ...] = ()

    def option(self, *names: str) -> str | None:
        """The value of the last of these options, `--name value` or `--name=value`; None if none was given."""
        words = [word for flag in self.flags for word in flag.split("=", 1)]
        return next((value for name, value in reversed(list(pairwise(words))) if name in names), None)


def short(subject: Subject) -> str:
    """A short name, which leaves room for figures."""
    return subject.name.replace(QSD, SHORT) if subject.family == QSD else subject.name


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage of images: `name` is shown, `kind` is tmpfs, disk, loop, nbd or rbd, `medium` stores the bytes.

    `medium` is the name of a file system, "block device", or how an image elsewhere is reached.
    """

    name: str
    kind: str
    medium: str


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of one subject in one cell. Latencies and CPU time (of one request) in microseconds.

    `cpu_us` is None if the back end's process is not visible. `checked` sectors were read and compared just before,
    with the same depth and driver.
    """

    storage: str
    cell: Cell
    subject: str
    round: int
    seconds: float
    requests: int
    iops: float
    mb_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us: float | None
    driver_cpu_us: float | None
    checked: int
    histogram: dict[int, int] = field(repr=False)  # bucket of ringplane.metrics.histogram: requests


@dataclass(slots=True)
class Report:
    """All results of a bench. `problems` are wrong data and failed requests, in words."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    storages: list[Storage] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sectors_checked: int = 0

    def save(self, path: Path) -> None:
        """Write it as JSON; raises BenchError."""
        # asdict would be slow for the many rows, because it copies deeply.
        rows = [{**_shallow(row), "cell": _shallow(row.cell)} for row in self.rows]
        whole = {"format": FORMAT, **_shallow(self), "rows": rows}
        whole["storages"] = [asdict(storage) for storage in self.storages]
        whole["subjects"] = [asdict(subject) for subject in self.subjects]
        files.write(path, json.dumps(whole))


def _shallow(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def load(path: Path) -> Report:
    """Read a file that `Report.save` has written; raises BenchError."""
    try:
        whole = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(f"{path}: is not a report that `ringplane bench --json` has written: {error}") from None
    if not isinstance(whole, dict) or whole.pop("format", None) != FORMAT:
        raise BenchError(f"{path}: is not a report that `ringplane bench --json` has written")
    try:
        rows, storages, subjects = (whole.pop(name) for name in ("rows", "storages", "subjects"))
        return Report(
            **whole,
            storages=[Storage(**storage) for storage in storages],
            subjects=[Subject(**{**subject, "flags": tuple(subject["flags"])}) for subject in subjects],
            rows=[_row(row) for row in rows],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path}: is a damaged report, measure again: {error!r}") from None


def _row(row: dict[str, Any]) -> Row:
    histogram = {int(bucket): int(count) for bucket, count in row["histogram"].items()}
    return Row(**{**row, "cell": Cell(**row["cell"]), "histogram": histogram})


def sparse(histogram: npt.NDArray[np.int64]) -> dict[int, int]:
    """The buckets of a histogram that are not empty."""
    return {int(bucket): int(histogram[bucket]) for bucket in np.flatnonzero(histogram)}


def merged(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """The sum of the rows' histograms, shape (BUCKETS,)."""
    total = np.zeros(BUCKETS, np.int64)
    for row in rows:
        for bucket, count in row.histogram.items():
            total[bucket] += count
    return total
