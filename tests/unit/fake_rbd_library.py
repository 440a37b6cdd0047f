"""librados and librbd that a test controls: a cluster with one image, calls that hang, any results."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

from ringplane.block.sources.rbd_library import RESULT
from ringplane.native.uio import IOVEC_SIZE

SIZE = 64 << 20
HANDLE = 77

# void (*)(completion, argument)
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


class FakeLibrary:
    """`calls` are the functions that were called, in their order."""

    def __init__(self) -> None:
        self.size = SIZE
        self.calls: list[str] = []
        # The functions that hang until `answers` is set.
        self.hanging: set[str] = set()
        self.answers = threading.Event()
        # What a read, write, flush or discard returns, if that is not what it should.
        self.result: int | None = None
        # What a read fills its buffers with.
        self.data = b"d"
        # By the number of the completion: the argument of its callback, the callback, and the result.
        self._completions: dict[int, list[Any]] = {}
        self._numbers = itertools.count(1)
        self._addresses = {name: _address(function, count) for name, (function, count) in self._asynchronous().items()}

    def call(self, name: str, *arguments: Any) -> int:
        self._enter(name)
        if name == "rbd_resize":
            self.size = arguments[1]
        return 0

    def created(self, name: str, *arguments: Any) -> int:
        assert RESULT in arguments
        self._enter(name)
        return {"rbd_get_size": self.size, "rbd_get_stripe_count": 1}.get(name, HANDLE)

    def text(self, name: str, *arguments: Any) -> str:
        self._enter(name)
        return {"rados_conf_get": "65536"}.get(name, "id")

    def has(self, name: str) -> bool:
        return True

    def address(self, name: str) -> int:
        return ctypes.cast(self._addresses[name], ctypes.c_void_p).value or 0

    def _enter(self, name: str) -> None:
        if name in self.hanging:
            self.calls.append(f"{name} hangs")
            self.answers.wait()
        self.calls.append(name)

    def _asynchronous(self) -> dict[str, tuple[Callable[..., int], int]]:
        """The functions that compiled code calls, and how many arguments each has."""
        return {
            "rbd_aio_create_completion": (self._create, 3),
            "rbd_aio_release": (lambda completion: 0, 1),
            "rbd_aio_get_return_value": (lambda completion: int(self._completions.pop(completion)[2]), 1),
            "rbd_aio_readv": (self._read, 5),
            "rbd_aio_writev": (lambda image, iov, count, offset, completion: self._end(completion), 5),
            "rbd_aio_flush": (lambda image, completion: self._end(completion), 2),
            "rbd_aio_discard": (lambda image, start, length, completion: self._end(completion), 4),
            "rbd_aio_write_zeroes": (lambda image, start, length, completion, *flags: self._end(completion), 6),
        }

    def _create(self, argument: int, callback: int, place: int) -> int:
        number = next(self._numbers)
        self._completions[number] = [argument, CALLBACK(callback), 0]
        ctypes.c_int64.from_address(place).value = number
        return 0

    def _read(self, image: int, iov: int, count: int, offset: int, completion: int) -> int:
        size = 0
        for number in range(count):
            base, length = (ctypes.c_int64 * 2).from_address(iov + number * IOVEC_SIZE)
            ctypes.memmove(base, self.data * length, length)
            size += length
        return self._end(completion, size)

    def _end(self, completion: int, result: int = 0) -> int:
        argument, callback, _ = self._completions[completion]
        self._completions[completion][2] = result if self.result is None else self.result
        callback(completion, argument)
        return 0


def _address(function: Callable[..., int], count: int) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(function)
