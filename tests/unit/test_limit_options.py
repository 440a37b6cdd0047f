"""What may be written for limits, on the command line, in a file and in Python, and what a change makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ringplane.control.config import ConfigError, read_config
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.limit_options import (
    KEYS,
    LIMITS,
    check_limits,
    merge_limits,
    parse_limit,
    rates_of,
)
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread

WRONG = [
    ({"total-iops": 5}, 'unknown key "total-iops"; did you mean "total-iops-sec"?'),
    ({"total-iops-sec": -1}, "total-iops-sec: -1 is not a whole number from 0 to 1000000000000000"),
    ({"total-iops-sec": True}, "total-iops-sec: true is not a whole number from 0 to 1000000000000000"),
    ({"total-iops-sec": 1.5}, "total-iops-sec: 1.5 is not a whole number from 0 to 1000000000000000"),
    ({"total-iops-sec": 5, "read-iops-sec": 5}, "total-iops-sec and read-iops-sec exclude each other: "),
    ({"total-bytes-sec": 5, "write-bytes-sec": 5}, "total-bytes-sec and write-bytes-sec exclude each other: "),
    ({"read-iops-sec-max": 5}, "read-iops-sec-max is the rate of a burst; add the rate after it, read-iops-sec"),
    ({"read-iops-sec": 5, "read-iops-sec-max": 4}, "read-iops-sec-max is 4, less than read-iops-sec, 5: "),
    (
        {"read-iops-sec": 5, "read-iops-sec-max-length": 4},
        "read-iops-sec-max-length is the length of a burst; add its ",
    ),
    (
        {"read-iops-sec": 5, "read-iops-sec-max": 10**14, "read-iops-sec-max-length": 11},
        "read-iops-sec-max-length: 11 ",
    ),
    ({"size-iops-sec": 4096}, "size-iops-sec says what counts as one request; add a limit such as total-iops-sec"),
    ({"size-iops-sec": 4096, "total-bytes-sec": 1}, "size-iops-sec says what counts as one request; "),
    ({"weight": 2, "total-iops-sec": 1}, "weight is the share of a disk in a group; add group-name"),
    ({"weight": 0, "group-name": "a"}, "weight: 0 is not a whole number from 1 to 100"),
    ({"group-name": "a/b"}, 'group-name: "a/b" cannot be the name of a disk'),
]


@pytest.mark.parametrize(("limits", "message"), WRONG, ids=lambda each: "" if isinstance(each, str) else ",".join(each))
def test_what_does_not_fit_together(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_limits(limits)


def test_all_keys_are_those_of_libvirt_and_a_weight() -> None:
    """https://libvirt.org/formatdomain.html, `iotune`; with dashes as virsh blkdeviotune has them."""
    assert len(KEYS) == 21
    assert {key for key in KEYS if not key.startswith(LIMITS)} == {"size-iops-sec", "group-name", "weight"}


def test_separate_limits_of_bytes_and_of_requests() -> None:
    limits = {"total-bytes-sec": 5, "read-iops-sec": 6, "write-iops-sec": 7, "size-iops-sec": 8}
    check_limits(limits)
    assert rates_of(limits).keys() == limits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("total-iops-sec=20000", ("total-iops-sec", 20_000)),
        ("read-bytes-sec=100M", ("read-bytes-sec", 100 << 20)),
        ("read-bytes-sec=0", ("read-bytes-sec", 0)),
        ("size-iops-sec=4K", ("size-iops-sec", 4096)),
        ("read-bytes-sec-max-length=60", ("read-bytes-sec-max-length", 60)),
        ("group-name=tenant.1", ("group-name", "tenant.1")),
    ],
)
def test_the_command_line(text: str, value: tuple[str, Any]) -> None:
    assert parse_limit(text) == value


@pytest.mark.parametrize("text", ["total-iops-sec", "total-iops-sec=", "total-iops-sec=5K", "read-bytes-sec=x", "x=1"])
def test_wrong_values_on_the_command_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|unknown key"):
        parse_limit(text)


def test_a_change() -> None:
    present = {"total-iops-sec": 5, "total-iops-sec-max": 10, "total-iops-sec-max-length": 3, "group-name": "a"}
    assert merge_limits(present, {"total-iops-sec": 6}) == {**present, "total-iops-sec": 6}
    assert merge_limits(present, {"total-iops-sec": None, "read-iops-sec": 7}) == {
        "group-name": "a",
        "read-iops-sec": 7,
    }
    assert merge_limits(present, {"total-iops-sec": 0}) == {"group-name": "a"}
    assert merge_limits({**present, "weight": 2}, {"group-name": None}).keys() == {
        "total-iops-sec", "total-iops-sec-max", "total-iops-sec-max-length",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^total-iops-sec-max is 10, less than"):
        merge_limits(present, {"total-iops-sec": 11})
    with pytest.raises(ValueError, match="unknown key"):
        merge_limits(present, {"nonsense": None})
    with pytest.raises(ValueError, match="is not a table"):
        merge_limits(present, 5)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disks.toml"
    path.write_text(
        '[[disk]]\nimage = "a"\nsocket-path = "s"\n[disk.limits]\ntotal-iops-sec = 20000\nread-bytes-sec = "100M"\n'
    )
    assert read_config(path).disks[0].limits == {"total-iops-sec": 20_000, "read-bytes-sec": 100 << 20}


def test_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "disks.toml"
    path.write_text('[[disk]]\nimage = "a"\nsocket-path = "s"\nlimits = { total-iops-sec = 1, read-iops-sec = 1 }\n')
    with pytest.raises(ConfigError, match="limits: total-iops-sec and read-iops-sec exclude each other"):
        read_config(path)


def disk(folder: Path, name: str, **limits: Any) -> DiskConfig:
    keys = {key.replace("_", "-"): value for key, value in limits.items()}
    return DiskConfig(folder / name, ("io0",), socket_path=folder / f"{name}.sock", name=name, limits=keys)


def test_disks_of_a_group_have_the_same_limits(tmp_path: Path) -> None:
    disks = [
        disk(tmp_path, "a", group_name="x", total_iops_sec=5),
        disk(tmp_path, "b", group_name="x", weight=2),
        disk(tmp_path, "c", group_name="x", total_iops_sec=5),
        disk(tmp_path, "d", group_name="y", total_iops_sec=6),
    ]
    check_process(disks, [IoThread("io0")])
    with pytest.raises(WrongOptions, match=r'limits: the group "x" has other limits at .*/a; its disks share one set'):
        check_process([*disks, disk(tmp_path, "e", group_name="x", total_iops_sec=6)], [IoThread("io0")])
