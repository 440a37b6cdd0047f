"""The options of a zoned disk."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from ringplane.options.declare import WrongOptions, option
from ringplane.options.image_options import ImageOptions
from ringplane.options.kinds import Kind, text_from_toml
from ringplane.options.sizes import parse_size

MIN_ZONE, MAX_ZONE = 64 << 10, 1 << 40


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


def _check_zones(model: Any) -> None:
    """Raises ValueError."""
    if not isinstance(model, ZoneModel):
        raise ValueError(f"{model!r} is not a ZoneModel")
    if not all(type(value) is int for value in astuple(model)):
        raise ValueError(f"{model!r} has values that are not whole numbers")
    if min(model.conventional, model.max_open, model.max_active) < 0:
        raise ValueError("conventional, max-open and max-active cannot be negative")
    if not MIN_ZONE <= model.size <= MAX_ZONE or model.size & (model.size - 1):
        raise ValueError(f"a zone size of {model.size} bytes is not a power of two from 64K to 1T")
    if not 0 < model.capacity <= model.size or model.capacity % 4096:
        raise ValueError(f"a zone capacity of {model.capacity} bytes is not a multiple of 4096 up to the zone's size")
    if 0 < model.max_active < model.max_open:
        raise ValueError("max-open is more than max-active, but each open zone is active too")


def _from_toml(value: Any) -> ZoneModel:
    return parse_zones(text_from_toml(value))


def _to_toml(model: ZoneModel) -> str:
    limits = f"max-open={model.max_open},max-active={model.max_active}"
    return f"{model.size},capacity={model.capacity},conventional={model.conventional},{limits}"


class ZoneOptions(ImageOptions):
    """The zones of a disk."""

    zoned: ZoneModel | None = option(
        Kind("SIZE[,...]", parse_zones, _from_toml, _check_zones, to_toml=_to_toml),
        default=None,
        fixed=True,
        help="Zoned disk on a new image, for example 64M,capacity=48M,conventional=4,max-open=8,max-active=12.",
        doc='serves a new image as a zoned disk: `"64M"` or `"64M,conventional=4"`, see '
        "[features.md](features.md#zoned-disks)",
    )

    def check(self) -> None:
        if self.zoned and self.share_rw:
            raise WrongOptions("{zoned} and {share_rw} exclude each other: each process has write pointers of its own")
