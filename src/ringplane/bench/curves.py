"""The picture of latencies: at each percentile, for each workload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.bench.cells import WORKLOADS, Cell
from ringplane.bench.console_tables import heading
from ringplane.bench.results import FIO, Report, Storage, merged
from ringplane.bench.themes import Theme
from ringplane.metrics.histogram import lower_bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Percentiles of a curve, and the marks on its axis.
PERCENTILES = 100 - np.logspace(2, -2, 200)
MARKS = (0, 50, 90, 99, 99.9, 99.99)
# The measured depth nearest to this is shown.
DEPTH = 32


def draw(report: Report, storage: Storage, cells: list[Cell], theme: Theme) -> Figure:
    """One panel per workload, at one depth; the rounds' histograms are added up."""
    from matplotlib.figure import Figure

    depth = min((cell.depth for cell in cells), key=lambda depth: abs(depth - DEPTH))
    shown = [cell for cell in cells if cell.depth == depth]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(10, 3.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, cell in zip(axes.flat, shown, strict=False):
        _curves(axis, report, storage, cell, theme)
        _style(axis, WORKLOADS[cell.workload].title, theme)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=theme.text
    )
    figure.suptitle(f"Latency at depth {depth}: {heading(storage, cells[0])}", color=theme.text, fontsize=11)
    return figure


def _curves(axis: Axes, report: Report, storage: Storage, cell: Cell, theme: Theme) -> None:
    colours = theme.colours(report.subjects)
    for subject in report.subjects:
        mine = (storage.name, cell, subject.name)
        histogram = merged([row for row in report.rows if (row.storage, row.cell, row.subject) == mine])
        if histogram.any():
            line = "--" if subject.family == FIO else "-"
            axis.plot(_position(PERCENTILES), curve(histogram), line, label=subject.name, color=colours[subject.name])


def _style(axis: Axes, title: str, theme: Theme) -> None:
    from matplotlib import ticker

    axis.set(xscale="log", yscale="log", facecolor=theme.page)
    axis.set_title(title, color=theme.text, fontsize=10)
    axis.set_xlabel("percentile of requests", color=theme.text, fontsize=9)
    axis.set_ylabel("latency in µs (less is better)", color=theme.text, fontsize=9)
    axis.set_xticks(_position(np.array(MARKS)), [f"{mark:g}" for mark in MARKS])
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(ticker.NullLocator())
    axis.tick_params(colors=theme.text, labelsize=8)
    axis.spines[:].set_color(theme.quiet)
    axis.grid(color=theme.quiet, alpha=0.3)


def _position(percentiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The position on the axis, on which each further nine takes the same width."""
    return 100 / (100 - percentiles)


def curve(histogram: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The latency in microseconds at each of PERCENTILES (the lower bound of its bucket)."""
    wanted = np.maximum(1, PERCENTILES / 100 * histogram.sum())
    buckets = np.searchsorted(np.cumsum(histogram), wanted)
    latencies: npt.NDArray[np.float64] = lower_bounds()[buckets] / 1000
    return latencies
