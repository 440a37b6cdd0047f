"""A report as PNG files: IOPS and CPU per I/O against depth, and how latencies are distributed. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ringplane.bench.cells import WORKLOADS, Cell
from ringplane.bench.errors import BenchError
from ringplane.bench.results import Report, Storage, merged
from ringplane.bench.summary import Figures, cells_of, medians
from ringplane.bench.tables import heading
from ringplane.histogram import lower_bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Percentiles of a latency curve, and the marks on its axis.
PERCENTILES = 100 - np.logspace(2, -2, 200)
MARKS = (0, 50, 90, 99, 99.9, 99.99)
LATENCY_DEPTH = 32


def require() -> None:
    """Raise BenchError if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'ringplane[bench]'")


def draw(folder: Path, report: Report) -> list[Path]:
    """Write the files for each storage, number of queues and driver into a folder; raises BenchError."""
    require()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for storage in report.storages:
        for queues, driver in dict.fromkeys((cell.queues, cell.driver) for cell in cells_of(report)):
            cells = [cell for cell in cells_of(report) if (cell.queues, cell.driver) == (queues, driver)]
            name = re.sub(r"[^A-Za-z0-9]+", "-", f"{storage.name} {queues}q {driver}").strip("-")
            paths += [folder / f"depth-{name}.png", folder / f"latency-{name}.png"]
            _depth_figure(paths[-2], report, storage, cells)
            _latency_figure(paths[-1], report, storage, cells)
    return paths


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.5 * columns, 3.4 * rows + 0.8)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _save(figure: Any, path: Path, title: str, axis: Axes) -> None:
    from matplotlib import pyplot

    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _depth_figure(path: Path, report: Report, storage: Storage, cells: list[Cell]) -> None:
    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    figure, axes = _figure(len(workloads), 2)
    found = medians(report.rows)
    for line, workload in enumerate(workloads):
        depths = [cell for cell in cells if cell.workload == workload]
        for axis, label in zip(axes[line], ("k IOPS", "CPU us per I/O"), strict=True):
            for subject in report.subjects:
                keys = [(storage.name, cell, subject.name) for cell in depths]
                points = [
                    (cell.depth, _value(found[key], label))
                    for cell, key in zip(depths, keys, strict=True)
                    if key in found
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=subject.name)
            axis.set(title=WORKLOADS[workload].title, xlabel="depth", ylabel=label, xscale="log", ylim=(0, None))
            axis.set_xticks([cell.depth for cell in depths], [str(cell.depth) for cell in depths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    _save(figure, path, heading(storage, cells[0]), axes[0][0])


def _value(figures: Figures, label: str) -> float:
    if label == "k IOPS":
        return figures.iops / 1000
    return float("nan") if figures.cpu_us is None else figures.cpu_us


def _latency_figure(path: Path, report: Report, storage: Storage, cells: list[Cell]) -> None:
    """One panel a workload, at the depth that is nearest to LATENCY_DEPTH; the rounds' histograms are added up."""
    depth = min((cell.depth for cell in cells), key=lambda depth: abs(depth - LATENCY_DEPTH))
    shown = [cell for cell in cells if cell.depth == depth]
    figure, axes = _figure(-(-len(shown) // 2), 2)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, cell in zip(axes.flat, shown, strict=False):
        for subject in report.subjects:
            mine = (storage.name, cell, subject.name)
            histogram = merged([row for row in report.rows if (row.storage, row.cell, row.subject) == mine])
            if histogram.any():
                axis.plot(100 / (100 - PERCENTILES), curve(histogram), label=subject.name)
        axis.set(title=WORKLOADS[cell.workload].title, xlabel="percentile", ylabel="us", xscale="log", yscale="log")
        axis.set_xticks([100 / (100 - mark) for mark in MARKS], [f"{mark:g}" for mark in MARKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    _save(figure, path, f"latency at depth {depth}: {heading(storage, cells[0])}", axes[0][0])


def curve(histogram: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The latency in microseconds at each of PERCENTILES (the lower bound of its bucket)."""
    wanted = np.maximum(1, PERCENTILES / 100 * histogram.sum())
    buckets = np.searchsorted(np.cumsum(histogram), wanted)
    latencies: npt.NDArray[np.float64] = lower_bounds()[buckets] / 1000
    return latencies
