"""benchmarks/policy_filters.py: each way of serving the disk is measured, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks/policy_filters.py"
# The figures of three ways: IOPS, CPU time, latency.
FIGURES = 9


def test_a_short_run() -> None:
    words = ["--rounds", "1", "--seconds", "0.3", "--depth", "8", "--fault", "none", "--fault", "delay of 1 ms"]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table, about = done.stdout.split("\n\n")
    heading, _, *lines = (line.strip("| ").split("|") for line in table.splitlines())
    assert [title.strip() for title in heading] == [
        *("fault", "depth"),
        *("k IOPS", "qsd", "nbd", "CPU us", "qsd", "nbd", "p50 us", "qsd", "nbd"),
    ]
    assert [line[0].strip() for line in lines] == ["none", "delay of 1 ms"]
    for _, depth, *figures in lines:
        assert int(depth) == 8
        assert len([float(figure) for figure in figures]) == FIGURES
    # Each request takes the time of the delay at least, in all three ways; latencies are in buckets of 6 %.
    assert min(float(figure) for figure in lines[1][-3:]) >= 940
    assert about.startswith("Medians of 1 rounds")
