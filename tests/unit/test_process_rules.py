"""Rules for the disks and I/O threads of one process, as `serve_all` applies them; test_config.py: as a file does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ringplane.control.start import serve_all
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import MAX_THREADS, DiskConfig
from ringplane.options.process_rules import check_process
from ringplane.options.thread_options import IoThread

IO0 = IoThread("io0")


def disk(folder: Path, image: str, socket: str, **options: Any) -> DiskConfig:
    return DiskConfig(folder / image, ("io0",), socket_path=folder / socket, create=1 << 20, **options)


def rejected(disks: list[DiskConfig], *threads: IoThread) -> str:
    with pytest.raises(WrongOptions) as raised:
        serve_all(disks, threads or [IO0])
    return str(raised.value)


@pytest.mark.parametrize("name", ["b.img", "./b.img", "symbolic"])
def test_disks_of_one_image(tmp_path: Path, name: str) -> None:
    """Even without locks, which are the only other thing that would notice it."""
    (tmp_path / "symbolic").symlink_to("b.img")
    before = list(tmp_path.iterdir())
    disks = [
        disk(tmp_path, "a.img", "a"),
        disk(tmp_path, "b.img", "b", lock="off"),
        disk(tmp_path, name, "c", lock="off"),
    ]
    line = rejected(disks)
    assert line.startswith(f"{tmp_path / name}: image: is also the image of {tmp_path / 'b.img'}; disks can share ")
    assert list(tmp_path.iterdir()) == before


def test_a_disk_is_compared_with_all_before_it(tmp_path: Path) -> None:
    ways: tuple[dict[str, bool], ...] = ({"read_only": True, "share_rw": True}, {"read_only": True}, {"share_rw": True})
    disks = [disk(tmp_path, "a.img", str(number), **way) for number, way in enumerate(ways)]
    check_process(disks[:2], [IO0])
    assert "is also the image of" in rejected(disks)


def test_disks_of_one_socket(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    disks = [disk(tmp_path, "a.img", "socket"), disk(tmp_path, "b.img", "link/socket")]
    assert rejected(disks) == (
        f"{tmp_path}/b.img: socket_path: {tmp_path}/link/socket is also the socket of {tmp_path}/a.img; "
        "give each disk its own"
    )


def test_disks_of_one_recording(tmp_path: Path) -> None:
    """Otherwise the second one would be said to exist already, by a start that has just made it."""
    (tmp_path / "link").symlink_to(tmp_path)
    before = list(tmp_path.iterdir())
    paths = tmp_path / "rec", tmp_path / "link/rec"
    disks = [disk(tmp_path, f"{number}.img", f"{number}", record=path) for number, path in enumerate(paths)]
    assert rejected(disks) == (
        f"{tmp_path}/1.img: record: {tmp_path}/link/rec is also the recording of {tmp_path}/0.img; "
        "give each disk its own"
    )
    assert list(tmp_path.iterdir()) == before


def test_disks_of_one_path_with_their_names(tmp_path: Path) -> None:
    """The template of docs/recordings.md for all disks of a process."""
    check_process([disk(tmp_path, f"{name}.img", name, record=tmp_path / "{name}-{time}.rec") for name in "ab"], [IO0])


def test_disks_of_one_image_and_socket(tmp_path: Path) -> None:
    same = disk(tmp_path, "a.img", "socket", share_rw=True)
    assert "is also the socket of" in rejected([same, same])


def test_disks_of_one_inherited_socket(tmp_path: Path) -> None:
    disks = [DiskConfig(tmp_path / name, ("io0",), fd=7, create=1 << 20) for name in "ab"]
    assert rejected(disks) == f"{tmp_path}/b: fd: 7 is also the socket of {tmp_path}/a; give each disk its own"


def test_no_disk() -> None:
    assert rejected([]) == "there is no disk to serve"


def test_too_many_threads(tmp_path: Path) -> None:
    threads = [IoThread(f"io{number}") for number in range(MAX_THREADS + 1)]
    check_process([disk(tmp_path, "a.img", "socket")], threads[:-1])
    assert rejected([disk(tmp_path, "a.img", "socket")], *threads) == (
        f"I/O thread io{MAX_THREADS}: is one I/O thread too many; the maximum is {MAX_THREADS}"
    )


def test_braces_in_the_name_of_an_image(tmp_path: Path) -> None:
    assert rejected([disk(tmp_path, "{image}", "a"), disk(tmp_path, "{image}", "b")]).startswith(
        f"{tmp_path}/{{image}}: image: is also the image of {tmp_path}/{{image}}; "
    )


def test_many_disks_are_compared_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[object] = []
    status = os.stat
    disks = [disk(tmp_path, f"{number}.img", f"{number}.sock") for number in range(100)]
    monkeypatch.setattr(os, "stat", lambda path: [looked_at.append(path), status(path)][1])
    check_process(disks, [IO0])
    assert len(looked_at) == len(disks)
