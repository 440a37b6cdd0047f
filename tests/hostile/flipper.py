"""Another thread of the guest, which keeps overwriting fields in guest memory; compiled, to be fast."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, load64, store16, store32, store64, view

CHOICES = 8

# A field: its address, its size in bytes, and the values that are written there in random order.
FIELD = np.dtype([("address", "<i8"), ("size", "<i8"), ("values", "<i8", (CHOICES,))])
FIELD_SIZE = FIELD.itemsize
VALUES: int = FIELD.fields["values"][1]  # type: ignore[index]
FLIPPER = np.dtype([(name, "<i8") for name in ("fields", "count", "random", "stop", "written")])
STOP: int = FLIPPER.fields["stop"][1]  # type: ignore[index]


@compiled
def flip(address):
    flipper = view(address, FLIPPER)
    while load64(address + STOP) == 0:
        for index in range(flipper.count):
            field = view(flipper.fields + index * FIELD_SIZE, FIELD)
            # Lehmer's generator with the factor and modulus of C++'s minstd_rand.
            flipper.random = flipper.random * 48271 % 2147483647
            value = load64(address_of(field) + VALUES + 8 * (flipper.random * CHOICES >> 31))
            if field.size == 8:
                store64(field.address, value)
            elif field.size == 4:
                store32(field.address, value)
            else:
                store16(field.address, value)
        flipper.written += flipper.count


class Flipper:
    """Keeps writing while its `with` block runs."""

    def __init__(self, fields: list[tuple[int, int, tuple[int, ...]]]) -> None:
        """For each field: address, size, values. The first value, which should be valid, is written most often."""
        self._fields: npt.NDArray[np.void] = np.zeros(len(fields), FIELD)
        for place, (address, size, values) in zip(self._fields, fields, strict=True):
            place["address"], place["size"] = address, size
            padded = [*values, *[values[0]] * (CHOICES - len(values))]
            place["values"] = np.array(padded, np.uint64).view(np.int64)
        self._record: npt.NDArray[np.void] = np.zeros(1, FLIPPER)
        self.record: Any = self._record[0]
        self.record["fields"], self.record["count"] = self._fields.ctypes.data, len(fields)
        self.record["random"] = 1
        self._thread = threading.Thread(target=lambda: flip(int(self._record.ctypes.data)), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.record["stop"] = 1
        self._thread.join()
