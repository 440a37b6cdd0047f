"""benchmarks/scrapes.py: quantiles within a bucket, and the comparison with rounds without scrapes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ringplane.control.start import serve
from ringplane.driver import Driver
from ringplane.metrics import histogram

from . import benchmark


@pytest.fixture(scope="module")
def scrapes() -> ModuleType:
    return benchmark.load("scrapes")


def test_a_quantile_lies_within_its_bucket(scrapes: ModuleType) -> None:
    counts, bounds = np.zeros(histogram.BUCKETS, np.int64), histogram.lower_bounds()
    counts[100], counts[200] = 90, 10
    assert scrapes.quantile_us(counts, 0.45) == pytest.approx((bounds[100] + bounds[101]) / 2000)
    assert scrapes.quantile_us(counts, 0.95) == pytest.approx((bounds[200] + bounds[201]) / 2000)


def test_a_round_is_compared_with_itself(scrapes: ModuleType) -> None:
    """The machine may be slower in another one."""
    rows = [
        scrapes.Row("all", beside, every, number, 10.0, 1.0, p99, 9.0, (5.0,) if every else ())
        for number, pair in enumerate([(100.0, 110.0), (200.0, 200.0), (50.0, 50.0)])
        for (beside, every), p99 in zip(scrapes.BESIDE[:2], pair, strict=True)
    ]
    without, once = [line.split("|")[1:-1] for line in scrapes.described(rows).splitlines()[2:]]
    assert [cell.strip() for cell in without[5:8]] == ["100.0", "1.000", "1.00-1.00"]
    assert [cell.strip() for cell in once[5:8]] == ["110.0", "1.000", "1.00-1.10"]
    assert [cell.strip() for cell in once[9:]] == ["3", "5.0"]


@pytest.mark.parametrize("rate", [0, 1000])
def test_all_disks_are_driven(scrapes: ModuleType, tmp_path: Path, rate: int) -> None:
    """As many requests as are possible, or this many per second, as soon as there is time."""
    path = tmp_path / "a.sock"
    with serve(tmp_path / "a.img", path, create=4 << 20, engine="null") as export:
        with Driver(path, memory_size=4 << 20) as driver:
            per_second, counts = scrapes.Paced([driver], rate).measure(seconds=0.5, warm_up=0)
        counted = export.counters["read"]
    # On a slow machine nothing may have completed in time, but what was submitted was waited for.
    assert counted.requests > 0
    assert counted.errors == 0
    assert 0 <= counts.sum() <= counted.requests
    assert (per_second > 0) == (counts.sum() > 0)
