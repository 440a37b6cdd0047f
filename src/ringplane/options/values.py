"""Values that people write, in options and in configuration files alike: sizes, CPUs, times, serial numbers."""

from __future__ import annotations

import difflib
import grp
import math
import os
import pwd
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

Entry = TypeVar("Entry")

# The highest user or group; the one above means none (chown(2)).
MAX_ID = (1 << 32) - 2

# VIRTIO_BLK_ID_BYTES, without importing NumPy: `ringplane --help` must be quick.
MAX_SERIAL = 20

MAX_POLL_US = 1_000_000

MAX_SECONDS = 86_400

MIN_BLOCK, MAX_BLOCK = 512, 64 << 10

MIN_ZONE, MAX_ZONE = 64 << 10, 1 << 40

# Features that users can switch (device/disk.py has the bit of each), and those that are off by default, because
# drivers that accept them pay for them.
FEATURES = (
    *("indirect-desc", "event-idx", "packed", "in-order", "order-platform", "notification-data", "ring-reset"),
    *("size-max", "seg-max", "geometry", "topology", "flush", "config-wce"),
    *("discard", "write-zeroes", "secure-erase", "lifetime"),
    *("status", "inband-notifications"),
)
OFF_BY_DEFAULT = ("in-order", "inband-notifications")

MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
# Whether an image is locked (block/image.py): where it has to be and can be, always, never.
LOCKS = LOCK_AUTO, LOCK_ON, LOCK_OFF = ("auto", "on", "off")

# Virtqueues of a disk. Front ends use as many of them as they want; QEMU wants one for each of its guest's CPUs, and
# refuses a disk with fewer.
MAX_QUEUES = 64

CPU_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", re.ASCII)


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
UNIT_NAMES = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def parse_size(text: str) -> int:
    """A number of bytes, with a suffix K, M, G or T for powers of 1024: `10G`, `1.5M`, `4096`. Raises ValueError."""
    short = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (short[:-1], short[-1]) if short[-1:] and short[-1:] in UNITS else (short, "")
    try:
        size = int(float(number) * UNITS[unit]) if "." in number else int(number) * UNITS[unit]
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; examples: 512M, 10G, 4096") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def format_size(size: int) -> str:
    """A number of bytes in the largest unit of which it has one, with up to two decimals: `64 MiB`, `1.5 GiB`."""
    number, units = float(size), iter(UNIT_NAMES)
    unit = next(units)
    while round(number, 2) >= 1024:
        number, unit = number / 1024, next(units)
    return f"{number:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def check_physical_block_size(size: int, block_size: int) -> None:
    """Raises ValueError where a disk of such logical blocks cannot report this physical block size."""
    if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
        raise ValueError(f"a physical block size of {size}: it must be a power of two from {MIN_BLOCK} to {MAX_BLOCK}")
    if size < block_size:
        raise ValueError(f"a physical block size of {size}: it must not be less than the block size, {block_size}")


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs in the format of taskset(1): `2`, `2-3`, `0,2-3`. Raises ValueError."""
    cpus: set[int] = set()
    for part in text.split(","):
        found = CPU_RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f"{text!r} is not a list of CPUs; examples: 2, 2-3, 0,2-3")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def check_cpus(cpus: Collection[int]) -> None:
    """Raises ValueError where this process may not run on all of `cpus`."""
    allowed = os.sched_getaffinity(0)
    if not cpus:
        raise ValueError(f"no CPU is named; this process may use {format_cpus(allowed)}")
    if not allowed.issuperset(cpus):
        raise ValueError(
            f"CPU {format_cpus(set(cpus) - allowed)} is not available to this process, "
            f"which may use {format_cpus(allowed)}"
        )


def format_cpus(cpus: Iterable[int]) -> str:
    """The CPUs in the format of `parse_cpus`, as short as possible."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_poll_us(text: str) -> int | None:
    """Microseconds from 0 to MAX_POLL_US, or `always`, for which None is returned. Raises ValueError."""
    if text == "always":
        return None
    if not text.isascii() or not text.isdigit() or int(text) > MAX_POLL_US:
        raise ValueError(f"{text!r} is neither a number of microseconds from 0 to {MAX_POLL_US} nor always")
    return int(text)


def parse_seconds(text: str, lowest: float) -> float:
    """A number of seconds from `lowest` to MAX_SECONDS. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not lowest <= seconds <= MAX_SECONDS:
        raise ValueError(f"{text!r} is not a number of seconds from {lowest:g} to {MAX_SECONDS}")
    return seconds


def parse_feature(text: str) -> tuple[str, bool]:
    """A feature's name, and whether to offer it: `packed=off`. Raises ValueError."""
    name, _, state = text.partition("=")
    if state not in ("on", "off"):
        raise ValueError(f"{text!r} is neither {name}=on nor {name}=off")
    check_feature(name)
    return name, state == "on"


def check_feature(name: str) -> None:
    """Raises ValueError unless this is the name of a feature that can be switched."""
    if name not in FEATURES:
        near = difflib.get_close_matches(name, FEATURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the features are {', '.join(FEATURES)}"
        raise ValueError(f"{name!r} is not a feature that can be switched; {hint}")


@dataclass(frozen=True, slots=True)
class ZoneModel:
    """The zones of a zoned disk, as the user wants them; sizes in bytes.

    Each zone has `size`, of which `capacity` can be written. The first `conventional` zones behave like a disk without
    zones. At most `max_open` zones can be open, and `max_active` open or closed, at a time; 0 means no limit.
    """

    size: int
    capacity: int
    conventional: int = 0
    max_open: int = 0
    max_active: int = 0


def parse_zones(text: str) -> ZoneModel:
    """`64M`, or `64M,capacity=48M,conventional=4,max-open=8,max-active=12`. Raises ValueError."""
    first, *rest = text.split(",")
    sizes = {"capacity": first}
    numbers = {"conventional": 0, "max-open": 0, "max-active": 0}
    for part in rest:
        name, _, value = part.strip().partition("=")
        if name in sizes:
            sizes[name] = value
        elif name in numbers and value.isascii() and value.isdigit():
            numbers[name] = int(value)
        else:
            raise ValueError(f"{part!r} is not one of capacity=SIZE, conventional=N, max-open=N, max-active=N")
    model = ZoneModel(parse_size(first), parse_size(sizes["capacity"]), *numbers.values())
    _check_zones(model)
    return model


def _check_zones(model: ZoneModel) -> None:
    """Raises ValueError."""
    if not MIN_ZONE <= model.size <= MAX_ZONE or model.size & (model.size - 1):
        raise ValueError(f"a zone size of {model.size} bytes is not a power of two from 64K to 1T")
    if model.capacity > model.size or model.capacity % 4096:
        raise ValueError(f"a zone capacity of {model.capacity} bytes is not a multiple of 4096 up to the zone's size")
    if 0 < model.max_active < model.max_open:
        raise ValueError("max-open is more than max-active, but each open zone is active too")


def check_serial(serial: str) -> None:
    """Raises ValueError unless a disk can have this serial number."""
    size = len(os.fsencode(serial))
    if size > MAX_SERIAL:
        raise ValueError(f"{serial!r} has {size} bytes; a serial number has at most {MAX_SERIAL}")
    if not serial.isprintable():
        raise ValueError(f"{serial!r} contains characters that cannot be printed")


@dataclass(frozen=True, slots=True)
class User:
    """The user and group that a process changes to; `name` is what the user has written."""

    name: str
    uid: int
    gid: int


def parse_user(text: str) -> User:
    """`nobody`, `nobody:kvm` or `1000:1000`: a user, and a group unless it is the user's own. Raises ValueError."""
    name, _, group = text.partition(":")
    entry = _find(name, pwd.getpwnam, pwd.getpwuid)
    uid = entry.pw_uid if entry else _number(name, "user")
    if group:
        return User(text, uid, parse_group(group))
    if entry is None:
        raise ValueError(
            f"user {name} has no entry in the user database, so its group is unknown; give one, for example {name}:100"
        )
    return User(text, uid, entry.pw_gid)


def parse_group(text: str) -> int:
    """The number of a group: `kvm`, `109`. Raises ValueError."""
    found = _find(text, grp.getgrnam, grp.getgrgid)
    return found.gr_gid if found else _number(text, "group")


def format_group(number: int) -> str:
    """The name of a group, or its number if it has none."""
    found = _find(str(number), grp.getgrnam, grp.getgrgid)
    return found.gr_name if found else str(number)


def parse_mode(text: str) -> int:
    """The permission bits of a file in octal, as chmod(1) has them: `0660`. Raises ValueError."""
    if not MODE.fullmatch(text):
        raise ValueError(f"{text!r} is not a file mode; it has three octal digits, for example 0660")
    return int(text, 8)


def _find(text: str, by_name: Callable[[str], Entry], by_number: Callable[[int], Entry]) -> Entry | None:
    try:
        return by_number(int(text)) if _is_number(text) else by_name(text)
    except (KeyError, OverflowError):
        return None


def _number(text: str, what: str) -> int:
    if not _is_number(text):
        raise ValueError(f"{what} {text!r} does not exist")
    if int(text) > MAX_ID:
        raise ValueError(f"{text} is too large for the number of a {what}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
