"""benchmarks/limits.py: the same limits for both back ends, what is measured together, and what its tables say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from ringplane.driver.load import Progress
from ringplane.options.limit_options import LIMITS, check_limits

from . import benchmark


@pytest.fixture(scope="module")
def disks() -> ModuleType:
    return benchmark.load("limited_disks")


@pytest.fixture(scope="module")
def limits() -> ModuleType:
    return benchmark.load("limits")


def test_the_keys_of_qemu(disks: ModuleType) -> None:
    assert disks.qemu_limits({"total-iops-sec-max-length": 2, "read-bytes-sec": 3, "size-iops-sec": 4}) == {
        "iops-total-max-length": 2,
        "bps-read": 3,
        "iops-size": 4,
    }
    assert len(disks.qemu_limits(dict.fromkeys(LIMITS, 1))) == len(LIMITS)


def test_disks_of_one_group(disks: ModuleType) -> None:
    both = [disks.Disk({"total-iops-sec": 5}, 3, "group", weight) for weight in (1, 2)]
    words = disks.qemu_command(both, Path("."))
    assert words.count("--object") == 1
    assert json.loads(words[words.index("--object") + 1])["limits"] == {"iops-total": 5}
    assert sum("throttle-group=group" in word for word in words) == 2
    tables = tomllib.loads(disks.ringplane_config(both, Path(".")))["disk"]
    assert [table["limits"]["weight"] for table in tables] == [1, 2]
    for table in tables:
        check_limits(table["limits"])


def test_a_disk_without_limits(disks: ModuleType) -> None:
    assert not any("throttle" in word for word in disks.qemu_command([disks.Disk()], Path(".")))
    assert tomllib.loads(disks.ringplane_config([disks.Disk()], Path(".")))["disk"][0]["limits"] == {}


def test_few_requests_are_measured_together(limits: ModuleType) -> None:
    rates = list(limits.all_rates(limits.Settings(1.0, [])))
    batches = list(limits.batches(iter(rates)))
    assert [rate for batch in batches for rate in batch] == rates
    for batch in batches:
        assert len(batch) == 1 or sum(rate.requests for rate in batch) <= limits.TOGETHER


def test_what_was_done_at_a_moment(limits: ModuleType) -> None:
    watcher = limits.Watcher()
    for seconds, requests in ((1.0, 100), (2.0, 300)):
        watcher(Progress(seconds, requests, 0, 0, 0))
    assert [watcher.done(at) for at in (0.5, 1.5, 9)] == [50, 200, 300]


@pytest.mark.parametrize(("length", "expected"), [(1, [6000, 7000, 9000]), (2, [5500, 10_500, 14_000])])
def test_bursts(limits: ModuleType, length: int, expected: list[int]) -> None:
    """The rate of the burst until its bucket is full, at once if it lasts a second, and then the limit."""
    assert [limits.expected_burst(length, at) for at in (1, 2, 4)] == expected


def test_a_limit_that_the_machine_does_not_reach_is_in_brackets(limits: ModuleType) -> None:
    def shown(without_limit: int) -> str:
        text: str = limits.shown_rate({"off": -0.31, "limit": 1_000_000, "without_limit": without_limit})
        return text

    assert limits.shown_rate({"off": -0.0012}) == "-0.12 %"
    assert shown(700_000) == "(-31.00 %, 700,000 without a limit)"
    assert shown(1_700_000) == "-31.00 %, 1,700,000 without a limit"
