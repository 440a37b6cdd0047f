"""The names of disks: what may be one, the default, and the places where people meet them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.control.config import ConfigError, read_config
from ringplane.control.start import serve_all
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.name_options import LONGEST_NAME, default_names, parse_disk_name
from ringplane.options.thread_options import IoThread

from .rig import eventually

LONG = "a" * LONGEST_NAME


@pytest.mark.parametrize("name", ["a", "0", "A-b_c.d", LONG])
def test_names(name: str) -> None:
    assert parse_disk_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", ".a", "a b", "a/b", "a\n", "ä", "a%2f", LONG + "a"])
def test_what_is_not_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a disk: up to 64 letters"):
        parse_disk_name(name)


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        (["/x/a.img", "/y/b"], [None, None], ["a", "b"]),
        (["a.img", "b/a.raw", "a"], [None] * 3, ["a", "a-2", "a-3"]),
        # A name that is given is never changed, whatever comes before it.
        (["a.img", "b.img"], [None, "a"], ["a-2", "a"]),
        (["a.img", "a-2.img", "a.raw"], [None] * 3, ["a", "a-2", "a-3"]),
        (["a.b.img", ".hidden", "my disk (2).img"], [None] * 3, ["a.b", "hidden", "my-disk-2-"]),
        (["ä.img", "---"], [None] * 2, ["disk", "disk-2"]),
        ([f"{LONG}b", f"{LONG}c"], [None] * 2, [LONG, LONG[:-2] + "-2"]),
    ],
)
def test_default_names(images: list[str], given: list[str | None], expected: list[str]) -> None:
    found = default_names(map(Path, images), given)
    assert found == expected
    assert [parse_disk_name(name) for name in found] == expected


def config(folder: Path, image: str, **options: Any) -> DiskConfig:
    path = folder / image
    return DiskConfig(path, ("io0",), socket_path=path.with_suffix(".sock"), create=1 << 20, num_queues=1, **options)


def test_the_same_name_twice(tmp_path: Path) -> None:
    with pytest.raises(WrongOptions) as wrong:
        serve_all([config(tmp_path, "x", name="a"), config(tmp_path, "y", name="a")], [IoThread("io0")])
    assert f"{wrong.value}" == f'{tmp_path}/y: name: "a" is the name of {tmp_path}/x already; give each its own'
    path = tmp_path / "disks.toml"
    path.write_text("".join(f'[[disk]]\nname = "a"\nimage = "{each}"\nsocket-path = "{each}.sock"\n' for each in "xy"))
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert (
        f"{raised.value}"
        == f'{path}: [[disk]] 2 (y): name: "a" is the name of [[disk]] 1 (x) already; give each its own'
    )


def unchanged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The lines about sizes that did not change, with the disks that the log lines belong to."""
    lines = [(record.getMessage(), str(record.disk)) for record in caplog.records if hasattr(record, "disk")]
    return [line for line in lines if "unchanged" in line[0]]


def test_names_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ringplane")
    (tmp_path / "z").mkdir()
    disks = [config(tmp_path, "x.img", name="system"), config(tmp_path, "y.img"), config(tmp_path, "z/y.img")]
    with serve_all(disks, [IoThread("io0")]) as server:
        assert [export.name for export in server.exports] == ["system", "y", "y-2"]
        for export in server.exports:
            export.make_way()
            export.refresh_size()
        assert eventually(lambda: len(unchanged(caplog)) == len(disks))
    # Each image is looked at on another thread, so the order is any.
    names = ("system", "y", "y-2")
    assert set(unchanged(caplog)) == {(f"{name}: has 1048576 bytes, unchanged", name) for name in names}


def test_the_name_of_one_disk(tmp_path: Path) -> None:
    with ringplane.serve(tmp_path / "a.img", tmp_path / "socket", create=1 << 20, name="only") as export:
        assert export.name == "only"
        assert export.disk.queues[0].name == "only queue 0"
