"""The options of limits: the fields of libvirt's `iotune`, and `weight`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ringplane.options.declare import Options, dashed, option
from ringplane.options.kinds import Kind, shown, suggestion
from ringplane.options.name_options import parse_disk_name
from ringplane.options.sizes import parse_size

# A rate that is not limited, as for libvirt.
UNLIMITED = 0

# Of a rate, and of a burst: as for QEMU.
MOST = 10**15
MAX_WEIGHT = 100

SCOPES, UNITS = ("total", "read", "write"), ("bytes", "iops")
LIMITS = tuple(f"{scope}-{unit}-sec" for unit in UNITS for scope in SCOPES)
KEYS = (
    *LIMITS,
    *(f"{limit}-max" for limit in LIMITS),
    *(f"{limit}-max-length" for limit in LIMITS),
    *("size-iops-sec", "group-name", "weight"),
)

# By their names: numbers, and the name of a group.
Limits = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rate:
    """One limit: so many bytes or requests per second, and in a burst `highest` per second for `length` seconds."""

    name: str
    average: int
    highest: int
    length: int

    @property
    def scope(self) -> str:
        """`total`, `read` or `write`."""
        return self.name.partition("-")[0]

    @property
    def counts_bytes(self) -> bool:
        return "-bytes-" in self.name


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits that the disks of a group share; 0: unlimited. `size_iops_sec`: bytes that count as one request."""

    total_bytes_sec: int = UNLIMITED
    read_bytes_sec: int = UNLIMITED
    write_bytes_sec: int = UNLIMITED
    total_iops_sec: int = UNLIMITED
    read_iops_sec: int = UNLIMITED
    write_iops_sec: int = UNLIMITED
    total_bytes_sec_max: int = UNLIMITED
    read_bytes_sec_max: int = UNLIMITED
    write_bytes_sec_max: int = UNLIMITED
    total_iops_sec_max: int = UNLIMITED
    read_iops_sec_max: int = UNLIMITED
    write_iops_sec_max: int = UNLIMITED
    # 0: a second.
    total_bytes_sec_max_length: int = 0
    read_bytes_sec_max_length: int = 0
    write_bytes_sec_max_length: int = 0
    total_iops_sec_max_length: int = 0
    read_iops_sec_max_length: int = 0
    write_iops_sec_max_length: int = 0
    size_iops_sec: int = 0

    def limits(self) -> Iterator[Rate]:
        """Those that limit something."""
        for name in LIMITS:
            if average := self.value(name):
                yield Rate(name, average, self.value(f"{name}-max"), self.value(f"{name}-max-length") or 1)

    def value(self, key: str) -> int:
        """By its name in a configuration file."""
        number: int = getattr(self, key.replace("-", "_"))
        return number

    def keys(self) -> dict[str, int]:
        """Those that are not 0, by their names in a configuration file."""
        return {dashed(name): value for name, value in dataclasses.asdict(self).items() if value}


def rates_of(limits: Limits) -> Rates:
    """What of these options the disks of a group share."""
    fields = {field.name for field in dataclasses.fields(Rates)}
    return Rates(**{name: value for key, value in limits.items() if (name := key.replace("-", "_")) in fields})


def group_of(limits: Limits) -> str:
    """Empty: the disk is in no group."""
    return str(limits.get("group-name", ""))


def weight_of(limits: Limits) -> int:
    """The weight in its group."""
    return int(limits.get("weight", 1))


def parse_limit(text: str) -> tuple[str, Any]:
    """`total-iops-sec=20000`, `read-bytes-sec=100M`, `group-name=tenant1`. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not KEY=VALUE; an example: total-iops-sec=20000")
    return key, _read(key, value)


def _read(key: str, value: Any) -> Any:
    """The value of one key, a text or a number. Raises ValueError, which names the key."""
    if key not in KEYS:
        raise ValueError(f"unknown key {shown(key)}{suggestion(key, KEYS)}")
    try:
        return parse_disk_name(value) if key == "group-name" else _number(key, value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from None


def _number(key: str, value: Any) -> int:
    in_bytes = key == "size-iops-sec" or (key.partition("-")[2].startswith("bytes") and not key.endswith("-length"))
    if isinstance(value, str) and value != "0" and in_bytes:
        value = parse_size(value)
    elif isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    lowest, highest = (1, MAX_WEIGHT) if key == "weight" else (0, MOST)
    if type(value) is not int or not lowest <= value <= highest:
        example = ', or a size such as "100M"' if in_bytes else ""
        raise ValueError(f"{shown(value)} is not a whole number from {lowest} to {highest}{example}")
    return value


def check_limits(limits: Any) -> None:
    """Raises ValueError unless these fit together; the rules are QEMU's."""
    if not isinstance(limits, Mapping):
        raise ValueError(f"{shown(limits)} is not a table of limits; an example: {{ total-iops-sec = 20000 }}")
    numbers = {key: _read(key, value) for key, value in limits.items()}
    if any(type(limits[key]) is not type(value) for key, value in numbers.items()):
        raise ValueError("sizes are numbers of bytes here")
    if "weight" in limits and not group_of(limits):
        raise ValueError("weight is the share of a disk in a group; add group-name")
    rates = rates_of(limits)
    for unit in UNITS:
        _check_scopes(rates, unit)
    for name in LIMITS:
        _check_burst(rates, name)
    if rates.size_iops_sec and not any(rates.value(f"{scope}-iops-sec") for scope in SCOPES):
        raise ValueError("size-iops-sec says what counts as one request; add a limit such as total-iops-sec")


def _check_scopes(rates: Rates, unit: str) -> None:
    total = f"total-{unit}-sec"
    for scope in ("read", "write"):
        other = f"{scope}-{unit}-sec"
        if rates.value(total) and rates.value(other):
            raise ValueError(f"{total} and {other} exclude each other: limit reads and writes together or each of them")


def _check_burst(rates: Rates, name: str) -> None:
    average, highest, length = (rates.value(f"{name}{end}") for end in ("", "-max", "-max-length"))
    if length and not highest:
        raise ValueError(f"{name}-max-length is the length of a burst; add its rate, {name}-max")
    if highest and not average:
        raise ValueError(f"{name}-max is the rate of a burst; add the rate after it, {name}")
    if highest and highest < average:
        raise ValueError(f"{name}-max is {highest}, less than {name}, {average}: a burst is faster, not slower")
    if highest * length > MOST:
        raise ValueError(f"{name}-max-length: {length} seconds at {highest} are more than {MOST} in all")


def _from_toml(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{shown(value)} is not a table of limits; an example: {{ total-iops-sec = 20000 }}")
    read = {key: _read(key, each) for key, each in value.items()}
    check_limits(read)
    return read


def merge_limits(present: Limits, changes: Any) -> dict[str, Any]:
    """The limits after a change; 0 or None removes one, and with it its burst. Raises ValueError."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"{shown(changes)} is not a table of limits; an example: {{ total-iops-sec = 20000 }}")
    read = {key: None if value is None and key in KEYS else _read(key, value) for key, value in changes.items()}
    bursts = {f"{key}{end}": None for key, value in read.items() if not value for end in ("-max", "-max-length")}
    merged = {**present, **bursts, **read}
    if not merged.get("group-name"):
        merged.pop("weight", None)
    limits = {key: value for key, value in merged.items() if value}
    check_limits(limits)
    return limits


# On the command line an option for each of them.
LIMIT = Kind("KEY=VALUE", parse_limit, _from_toml, check_limits, to_toml=dict, json_types=("object",))


class LimitOptions(Options):
    """How fast a disk may be used."""

    limits: Mapping[str, Any] = option(
        LIMIT,
        default_factory=dict,
        flags=("--limit",),
        several=dict,
        help="Limit the disk, for example total-iops-sec=20000 or read-bytes-sec=100M; docs/limits.md lists the keys.",
        doc="how fast it may be used, a table `[disk.limits]` or `{ total-iops-sec = 20000 }`; "
        "[limits.md](limits.md) lists the keys",
        doc_default="",
    )
