"""A policy of a disk: its memory, which all I/O threads of the disk share, and its units."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.options.kinds import shown, suggestion
from ringplane.options.policy_options import PolicyUse
from ringplane.policies.declaring import SEED, Policy, count_of, fields_of, memory_layout
from ringplane.policies.io_view import HEADER, HEADER_SIZE, MUTEX
from ringplane.policies.loading import LoadedPolicy
from ringplane.policies.parameter_kinds import FILE, Value
from ringplane.policies.watched_file import Flag, WatchedFile, watch
from ringplane.system import libc
from ringplane.system.digests import blake2b


class WrongParameter(ValueError):
    """The text says which one, and what is right."""


class RunningPolicy:
    """`enabled`: it is called. Its parameters may be changed while I/O threads use it.

    `in_use`: I/O threads have its memory, so parameters that are changed wait for `put_in_force`.
    """

    def __init__(
        self, name: str, loaded: LoadedPolicy, given: Mapping[str, Any], *, enabled: bool = True, address: str = ""
    ) -> None:
        """`given`: the parameters that have other values than their defaults; `address`: how users call its file.

        Raises WrongParameter.
        """
        self.name, self.loaded, self.enabled, self.address_of_file = name, loaded, enabled, address
        declared = loaded.program.declared
        self.values: dict[str, Value] = {key: each.default for key, each in declared.parameters.items()}
        layout = memory_layout(declared)
        self._memory = np.zeros(HEADER_SIZE + layout.itemsize, np.uint8)
        self._header = self._memory[:HEADER_SIZE].view(HEADER)[0]
        self._my = self._memory[HEADER_SIZE:].view(layout)[0]
        # Each with its length before it.
        self._arrays: dict[str, npt.NDArray[np.int64]] = {}
        self.in_use = False
        # From which the random numbers follow now.
        self._seed: Value | None = None
        # Those that were changed, until they are put in force.
        self._waiting: dict[str, Value] = {}
        self._storing = threading.Lock()
        # Kept as long as the files are watched.
        self._files: dict[str, tuple[WatchedFile, Flag]] = {}
        for key, each in fields_of(declared):
            if (count := count_of(each)) is not None:
                self._arrays[key] = array = np.zeros(count + 1, np.int64)
                array[0] = count
                self._my[key] = array.ctypes.data + 8
        self._store(self.values)
        self.change(given)

    @property
    def address(self) -> int:
        """Of the HEADER, with the fields of the policy behind it."""
        return int(self._memory.ctypes.data)

    @property
    def declared(self) -> type[Policy]:
        return self.loaded.program.declared

    @property
    def down(self) -> int:
        """The address of its function."""
        return self.loaded.down.address()

    @property
    def up(self) -> int:
        """That of its function for results, or 0."""
        return self.loaded.up.address() if self.loaded.up is not None else 0

    @property
    def counters(self) -> dict[str, int]:
        """What it has counted: `requests`, of which it was asked, and its own."""
        own = {key: int(self._my[key]) for key in self.declared.counters}
        return {"requests": int(self._header["entered"]), **own}

    def change(self, given: Mapping[str, Any]) -> None:
        """Change parameters. Raises WrongParameter; then none is changed."""
        parameters = self.declared.parameters
        values: dict[str, Value] = {}
        watched: list[WatchedFile] = []
        for key, value in given.items():
            if key not in parameters:
                raise WrongParameter(f"unknown parameter {key}{suggestion(key, parameters)}")
            try:
                values[key] = each = parameters[key].value(value)
                if isinstance(each, str) and each:
                    watched.append(watch(each))
            except ValueError as error:
                raise WrongParameter(f"{key}: {error}") from None
        self.values.update(values)
        self._store(values)

    def _store(self, values: Mapping[str, Value]) -> None:
        with self._storing:
            for key, each in values.items():
                if isinstance(each, str):
                    self._watch(key, each)
            self._waiting.update(values)
        if not self.in_use:
            self.put_in_force()

    def _watch(self, key: str, path: str) -> None:
        """Have this file, which is watched already, store whether it exists once that is put in force."""
        if not path:
            self._files.pop(key, None)
            return
        file = watch(path)
        if key not in self._files or self._files[key][0] is not file:
            self._files[key] = file, Flag(partial(self._my.__setitem__, key))

    def put_in_force(self) -> None:
        """Store the parameters that were changed, all together; on an I/O thread that uses it, between two runs."""
        with self._storing:
            waiting, self._waiting = self._waiting, {}
            if not waiting:
                return
            # Other I/O threads may be in its functions.
            libc.lock_mutex(self.address + MUTEX)
            try:
                for key, each in waiting.items():
                    self._put(key, each)
            finally:
                libc.unlock_mutex(self.address + MUTEX)

    def _put(self, key: str, value: Value) -> None:
        if key == SEED and value != self._seed:
            self._seed, self._header["random"] = value, _first_random(self.name, value)
        if isinstance(value, tuple):
            self._arrays[key][1:] = value
        elif key in self._files:
            file, flag = self._files[key]
            file.add(flag)
        else:
            # A file that is not given always exists.
            self._my[key] = 1 if isinstance(value, str) else value

    def check_paths(self) -> None:
        """Raises WrongParameter for a relative one: whoever has named it may be in another folder."""
        for key, each in self.declared.parameters.items():
            path = str(self.values[key])
            if each.kind is FILE and path and not os.path.isabs(path):
                raise WrongParameter(f"{key}: {shown(path)} is not an absolute path; it has to begin with /")

    def start_threads(self) -> None:
        """Start those that watch files for it. Raises NoThread."""
        for file, _ in self._files.values():
            file.start()

    def shown(self) -> dict[str, str]:
        """The values of its parameters as users write them."""
        return {key: each.kind.shown(self.values[key]) for key, each in self.declared.parameters.items()}

    @property
    def use(self) -> PolicyUse:
        """How a file describes it now."""
        parameters = {
            key: self._absolute(self.values[key]) if each.kind is FILE else each.kind.shown(self.values[key])
            for key, each in self.declared.parameters.items()
            if self.values[key] != each.default
        }
        return PolicyUse(self.address_of_file, parameters, self.name, self.enabled)

    @staticmethod
    def _absolute(path: Value) -> str:
        """The same file for a process in another folder."""
        return os.path.abspath(str(path)) if path else ""

    def enter(self, count: int) -> int:
        """How often it has been asked before, and now `count` times more; while no thread asks it."""
        before = int(self._header["entered"])
        self._header["entered"] = before + count
        return before

    def take_parameters(self, other: RunningPolicy) -> None:
        """Those of another one of the same file."""
        self.values.update(other.values)
        self._store(other.values)

    def continue_from(self, previous: RunningPolicy) -> None:
        """Count on, as far as both count the same; between two calls of either."""
        self._header["entered"] = previous._header["entered"]
        for key in self.declared.counters.keys() & previous.declared.counters.keys():
            self._my[key] = previous._my[key]

    def snapshot(self) -> dict[str, Any]:
        """What another process continues with, as JSON, while no thread asks it; `states` has the rest."""
        return {
            "name": self.name,
            "code": self.loaded.code,
            "counters": self.counters,
            "seed": self.values[SEED],
            "random": int(self._header["random"]),
        }

    def states(self) -> bytes:
        """The numbers that only the policy uses."""
        return b"".join(self._numbers(key).tobytes() for key in self.declared.states)

    def resume_from(self, saved: Mapping[str, Any], states: bytes) -> None:
        """Continue what `snapshot` and `states` of another process are, as far as it is the same policy.

        Raises LookupError, TypeError, ValueError.
        """
        counters = saved["counters"]
        self._header["entered"] = counters["requests"]
        for key in self.declared.counters.keys() & counters.keys():
            self._my[key] = counters[key]
        if saved["code"] != self.loaded.code:
            return
        if saved["seed"] == self.values[SEED]:
            self._header["random"] = saved["random"]
        begin = 0
        for key in self.declared.states:
            numbers = self._numbers(key)
            numbers[:] = np.frombuffer(states, np.int64, len(numbers), begin)
            begin += numbers.nbytes

    def _numbers(self, key: str) -> npt.NDArray[np.int64]:
        """Those of a field of the state, in its memory."""
        if key in self._arrays:
            return self._arrays[key][1:]
        place = HEADER_SIZE + int(self._my.dtype.fields[key][1])
        return self._memory[place : place + 8].view(np.int64)


def _first_random(name: str, seed: Value) -> int:
    """Another one for each policy of a disk."""
    digest = blake2b(f"{name} {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
