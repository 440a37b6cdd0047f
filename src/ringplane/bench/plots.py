"""A report as pictures: IOPS and CPU time per I/O at each depth, and the distribution of latencies. Needs matplotlib.

Each picture is written three times: SVG for light pages, SVG for dark pages, and PNG. Text in an SVG is drawn as paths:
it looks the same everywhere.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringplane.bench.console_tables import groups
from ringplane.bench.errors import BenchError
from ringplane.bench.results import Report
from ringplane.bench.summary import cells_of
from ringplane.bench.themes import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Paint = Callable[[Theme], "Figure"]

DPI = 120


def require() -> None:
    """Raise BenchError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(
            "--plot needs matplotlib: pip install matplotlib, or in ringplane's source directory pip install '.[bench]'"
        )


def draw(directory: Path, report: Report) -> list[Path]:
    """Write all pictures into a directory; raises BenchError."""
    require()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [path for name, paint in pictures(report) for path in _write(directory, name, paint)]
    except OSError as error:
        raise BenchError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None


def pictures(report: Report) -> Iterator[tuple[str, Paint]]:
    """The name of each picture, and the function that draws it."""
    from ringplane.bench import bars, curves

    for queues, driver in dict.fromkeys((cell.queues, cell.driver) for cell in cells_of(report)):
        yield f"iops-cpu-{queues}q-{driver}", partial(bars.draw, report, queues, driver)
    for storage, cells in groups(report):
        place = re.sub(r"[^A-Za-z0-9]+", "-", storage.name).strip("-")
        yield f"latency-{place}-{cells[0].queues}q-{cells[0].driver}", partial(curves.draw, report, storage, cells)


def _write(directory: Path, name: str, paint: Paint) -> Iterator[Path]:
    import matplotlib

    # The file does not depend on when the picture is drawn.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ringplane"}):
        for suffix, theme in ((".svg", LIGHT), ("-dark.svg", DARK), (".png", LIGHT)):
            path = directory / f"{name}{suffix}"
            metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
            paint(theme).savefig(path, dpi=DPI, metadata=metadata, facecolor=theme.page)
            yield path
