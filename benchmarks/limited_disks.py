"""Disks with limits, served by ringplane and by qemu-storage-daemon with its throttle groups.

They read and write nothing (`--engine null`, `null-co`), so that storage is not what limits them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from trees import THIS, serving

RINGPLANE, QEMU = "ringplane", "qemu-storage-daemon"
SIZE = 1 << 30
# The I/O threads of ringplane. qemu-storage-daemon serves all disks in its main loop.
THREADS = ("io0", "io1")
# Another one, which does not poll, for those disks that name it.
SLEEPING = "sleeping"

# What QEMU calls the keys of limits.
NAMES = {"sec-max-length": "max-length", "sec-max": "max", "sec": ""}

Limits = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Disk:
    """Its limits are those of its group, if it is in one. `threads`: those that ringplane uses; empty: all in turn."""

    limits: Limits = field(default_factory=dict)
    queues: int = 1
    group: str = ""
    weight: int = 1
    threads: tuple[str, ...] = ()


# Serves disks; yields their sockets.
Serve = Callable[[Sequence[Disk], Path], contextlib.AbstractContextManager[list[Path]]]


def sockets_of(disks: Sequence[Disk], folder: Path) -> list[Path]:
    return [folder / f"{number}.sock" for number in range(len(disks))]


def qemu_limits(limits: Limits) -> dict[str, int]:
    """`total-iops-sec-max` is `iops-total-max` there."""
    found = {}
    for key, value in limits.items():
        if key == "size-iops-sec":
            found["iops-size"] = value
            continue
        scope, unit, end = key.split("-", 2)
        found["-".join(filter(None, ["bps" if unit == "bytes" else unit, scope, NAMES[end]]))] = value
    return found


def qemu_command(disks: Sequence[Disk], folder: Path) -> list[str]:
    """A disk without limits has no throttle filter."""
    words = [QEMU]
    groups = {group_name(disk, number): disk.limits for number, disk in enumerate(disks) if disk.limits}
    for name, limits in groups.items():
        words += ["--object", json.dumps({"qom-type": "throttle-group", "id": name, "limits": qemu_limits(limits)})]
    for number, (disk, socket) in enumerate(zip(disks, sockets_of(disks, folder), strict=True)):
        top = f"disk{number}" if disk.limits else f"null{number}"
        words += ["--blockdev", f"driver=null-co,node-name=null{number},size={SIZE},read-zeroes=off"]
        if disk.limits:
            group = f"throttle-group={group_name(disk, number)}"
            words += ["--blockdev", f"driver=throttle,node-name={top},{group},file=null{number}"]
        words += ["--export", f"type=vhost-user-blk,id=export{number},node-name={top},addr.type=unix,"
                  f"addr.path={socket},writable=on,num-queues={disk.queues}"]  # fmt: skip
    return words


def group_name(disk: Disk, number: int) -> str:
    return disk.group or f"group{number}"


@contextlib.contextmanager
def qemu(disks: Sequence[Disk], folder: Path) -> Iterator[list[Path]]:
    sockets = sockets_of(disks, folder)
    process = subprocess.Popen(qemu_command(disks, folder), start_new_session=True)
    try:
        while not all(socket.exists() for socket in sockets):
            if process.poll() is not None:
                raise click.ClickException(f"{QEMU} ended with status {process.returncode}")
            time.sleep(0.02)
        yield sockets
    finally:
        process.terminate()
        process.wait()


def ringplane_config(disks: Sequence[Disk], folder: Path) -> str:
    """TOML."""
    tables = [f'[[io-thread]]\nname = "{name}"' for name in THREADS]
    if any(SLEEPING in disk.threads for disk in disks):
        tables.append(f'[[io-thread]]\nname = "{SLEEPING}"\npoll-us = 0')
    for number, (disk, socket) in enumerate(zip(disks, sockets_of(disks, folder), strict=True)):
        lines = [
            "[[disk]]", f'image = "{number}.img"', f'socket-path = "{socket}"', f"create = {SIZE}", 'engine = "null"',
            f"num-queues = {disk.queues}",
        ]  # fmt: skip
        if disk.threads:
            lines.append(f"io-threads = {json.dumps(disk.threads)}")
        lines += ["[disk.limits]", *(f"{key} = {value}" for key, value in disk.limits.items())]
        lines += [f'group-name = "{disk.group}"', f"weight = {disk.weight}"] if disk.group else []
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


@contextlib.contextmanager
def ringplane(disks: Sequence[Disk], folder: Path) -> Iterator[list[Path]]:
    config = folder / "disks.toml"
    config.write_text(ringplane_config(disks, folder))
    with serving(THIS, ["--config", str(config)], len(disks)):
        yield sockets_of(disks, folder)


SERVERS: Mapping[str, Serve] = {RINGPLANE: ringplane, QEMU: qemu}


@contextlib.contextmanager
def served(server: str, disks: Sequence[Disk]) -> Iterator[list[Path]]:
    """The sockets of these disks."""
    with tempfile.TemporaryDirectory() as name, SERVERS[server](disks, Path(name)) as sockets:
        yield sockets
