"""benchmarks/compare_trees.py: rounds that are kept for the next run, and what its table calls worse."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from . import benchmark


@pytest.fixture(scope="module")
def trees() -> ModuleType:
    return benchmark.load("compare_trees")


def test_a_run_continues_with_the_rounds_of_the_same_trees(trees: ModuleType, tmp_path: Path) -> None:
    cell, kept = trees.Cell("aio", "busy", 8), tmp_path / "results"
    for names in (("a", "b"), ("a", "c"), ("a", "b")):
        trees.Results(names, kept, []).add([trees.Row(names, cell, (1.0, 2.0), (3.0, 4.0))])
    results = trees.Results(("a", "b"), kept, [])
    results.load()
    assert results.rounds([cell]) == 2
    assert results.rounds([cell, trees.Cell("aio", "busy", 32)]) == 0
    assert trees.Row(("a", "c"), cell, (1.0, 2.0), (3.0, 4.0)) not in results.rows


def test_only_what_is_worse_than_the_noise_is_bold(trees: ModuleType) -> None:
    def figures(ratio: float, worse: int) -> Any:
        return list(trees.figures([(1.0, 1.0), (1.0, ratio), (1.0, ratio)], worse))

    assert figures(1.04, worse=1) == ["1.00", "1.04", "**1.040**", "1.00-1.04"]
    assert figures(0.9, worse=-1)[2] == "**0.900**"
    assert [figures(1.02, worse=1)[2], figures(0.5, worse=1)[2], figures(1.5, worse=-1)[2]] == [
        "1.020",
        "0.500",
        "1.500",
    ]
