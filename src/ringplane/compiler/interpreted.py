"""The interpreted mode (`RINGPLANE_INTERPRET=1`): the same code, uncompiled, so that a debugger can stop in it.

A compiled function is then the Python function that it was written as. An intrinsic (intrinsics.py) stays compiled,
each one alone: so it has one declaration, and does the same in both modes. Only those that take structs have a
counterpart here, where a struct is an object that reads and writes memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

VARIABLE = "RINGPLANE_INTERPRET"
INTERPRETED = os.environ.get(VARIABLE, "0") not in ("", "0")

# The units of this process. The address of a unit is its place here; 0 is none.
_units: list[Callable[..., int]] = []


# What takes structs.


class Struct:
    """A struct in memory. The classes made by `_struct_class` have a property for each field."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = int(address)

    def __repr__(self) -> str:
        names = (name for name, each in vars(type(self)).items() if isinstance(each, property))
        return f"{hex(self._address)}: " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def view(address: int, dtype: np.dtype[np.void]) -> Struct:
    """The struct of layout `dtype` at `address`."""
    return _struct_class(dtype)(address)


def address_of(struct: Struct) -> int:
    """The address of a struct."""
    return struct._address


@functools.cache
def _struct_class(dtype: np.dtype[np.void]) -> type[Struct]:
    fields = {name: _field(*place[:2]) for name, place in (dtype.fields or {}).items()}
    return type("Struct", (Struct,), {"__slots__": (), **fields})


def _field(dtype: np.dtype[Any], offset: int) -> property:
    """Reads with the sign or with zeros in front, and stores truncated, as compiled code does."""
    if dtype.names:
        return property(lambda struct: view(struct._address + offset, dtype))
    kind = np.ctypeslib.as_ctypes_type(dtype)
    if dtype.subdtype is not None:
        return property(lambda struct: kind.from_address(struct._address + offset))

    def load(struct: Struct) -> Any:
        return kind.from_address(struct._address + offset).value

    def store(struct: Struct, value: int) -> None:
        kind.from_address(struct._address + offset).value = value

    return property(load, store)


# Units.


def address_of_unit(function: Callable[..., int]) -> int:
    """What stands for the address of this unit: `call` calls it."""
    if function not in _units:
        _units.append(function)
    return _units.index(function) + 1


def call(address: int, *args: int) -> int:
    """Call a unit, or a C function at this address."""
    if address <= len(_units):
        return int(_units[address - 1](*args))
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(args))(address)(*args))
