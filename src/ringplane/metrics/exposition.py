"""Metrics as text in Prometheus' format (https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4).

prometheus_client can write it too, but makes objects of each line, which takes some ten times as much CPU time. Its
parser reads the text in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Labels as `labelled` writes them, and the value of the metric with these labels.
Sample = tuple[str, float]

# The same for a histogram: how many values are at most as large as each bound, and how many there are; their sum.
Distribution = tuple[str, Sequence[int], float]


# Histograms in a piece of text: some 100 KB.
TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric family; `help` says what it means. A histogram has upper `bounds`."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()


def labelled(names: Sequence[str], values: Sequence[str]) -> str:
    """Labels as text. Many lines have the same ones, so that they are made apart from lines."""
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)])


def text(metric: Metric, samples: Iterable[Sample]) -> str:
    """The lines of a counter or gauge."""
    begin, end = ("{", "}") if metric.labels else ("", "")
    return _heading(metric) + "".join([f"{metric.name}{begin}{labels}{end} {value}\n" for labels, value in samples])


def histogram_text(metric: Metric, distributions: Iterable[Distribution]) -> Iterator[str]:
    """The lines of a histogram, which may be very many, in pieces."""
    yield _heading(metric)
    # All lines of one are made at once: its labels join what is between them, then the values are filled in.
    lines = [f'{metric.name}_bucket{{LABELS,le="{bound}"}} %d\n' for bound in (*metric.bounds, "+Inf")]
    lines += [f"{metric.name}_sum{{LABELS}} %s\n", f"{metric.name}_count{{LABELS}} %d\n"]
    parts = "".join(lines).split("LABELS")
    every = iter(distributions)
    while some := list(islice(every, TOGETHER)):
        yield "".join(
            [labels.replace("%", "%%").join(parts) % (*counts, total, counts[-1]) for labels, counts, total in some]
        )


def _heading(metric: Metric) -> str:
    return f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.type}\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
