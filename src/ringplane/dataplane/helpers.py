"""Threads that do for a worker what would make it wait: they are told the slot of a request through a pipe.

A pipe is the queue, in both directions: a message of so few bytes is written and read whole, whoever else does, and
never waits, as there are fewer slots than room in the pipe. While a helper has a request, it is the helper's.
"""

from __future__ import annotations

import fcntl
import os
import threading

import numpy as np

from ringplane.dataplane.state import (
    DEVICE,
    DEVICE_BACKING,
    QUEUE,
    REQUEST,
    REQUEST_SIZE,
    REQUEST_ZEROS_IOV,
    WORKER_HELPER_MESSAGE,
)
from ringplane.engines import zones
from ringplane.engines.common import COMPLETION, COMPLETION_SIZE, RESET_ZONES, SYNC_ZONES, complete
from ringplane.engines.ranges import BACKING, apply
from ringplane.engines.zones import ZONES
from ringplane.native.access import address_of, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import EINTR, read, write

# How many requests of a worker are done at a time; the others wait, and hold up nothing else.
HELPERS = 2

# A message is a COMPLETION: of its request alone on the way there, whole on the way back.
SLOT_SIZE = 8


@compiled
def send_to_helpers(worker, request):
    """Have a helper do the operation of this request, as it stands there."""
    write(worker.jobs_fd, address_of(request), SLOT_SIZE)


@compiled
def take_from_helpers(worker):
    """Note what helpers have done as completions of the engine."""
    place = address_of(worker) + WORKER_HELPER_MESSAGE
    while read(worker.done_fd, place, COMPLETION_SIZE) == COMPLETION_SIZE:
        completion = view(place, COMPLETION)
        complete(worker.engine, completion.slot, completion.result)


@compiled
def run_helper(requests, jobs_fd, done_fd, message):
    """A helper's life: until `jobs_fd` has no writer any more, do what comes. `message` is room for a COMPLETION."""
    completion = view(message, COMPLETION)
    while True:
        size = read(jobs_fd, message, SLOT_SIZE)
        if size == -EINTR:
            continue
        if size != SLOT_SIZE:
            return
        completion.result = perform(view(requests + completion.slot * REQUEST_SIZE, REQUEST))
        write(done_fd, message, COMPLETION_SIZE)


@compiled
def perform(request):
    queue = view(request.queue, QUEUE)
    device = view(queue.device, DEVICE)
    backing = view(address_of(device) + DEVICE_BACKING, BACKING)
    vector = address_of(request) + REQUEST_ZEROS_IOV
    if request.operation == SYNC_ZONES:
        return zones.sync(view(device.zones, ZONES), device.fd)
    if request.operation == RESET_ZONES:
        return zones.reset(view(device.zones, ZONES), backing, request.slot + 1, request.ranges, vector)
    return apply(backing, request.operation, request.ranges, request.range_count, vector)


class Helpers:
    """The threads of one worker; `jobs_fd` and `done_fd` are its ends of the pipes."""

    def __init__(self, name: str, requests: int, slots: int) -> None:
        """`requests` is the address of the worker's REQUEST structs. Raises OSError."""
        self._fds: list[int] = []
        try:
            self._take_fd, self.jobs_fd = self._pipe(slots * SLOT_SIZE)
            self.done_fd, self._give_fd = self._pipe(slots * COMPLETION_SIZE)
        except BaseException:
            self._close_fds()
            raise
        os.set_blocking(self.done_fd, False)
        self._messages = np.zeros(HELPERS, COMPLETION)
        self._threads = [
            threading.Thread(
                target=run_helper,
                args=(requests, self._take_fd, self._give_fd, self._messages.ctypes.data + number * COMPLETION_SIZE),
                name=f"helper-{number} of {name}",
                daemon=True,
            )
            for number in range(HELPERS)
        ]

    def _pipe(self, room: int) -> tuple[int, int]:
        """A pipe's ends, with room for so many bytes."""
        ends = os.pipe2(os.O_CLOEXEC)
        self._fds += ends
        if fcntl.fcntl(ends[1], fcntl.F_GETPIPE_SZ) < room:
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, room)
        return ends

    def load(self) -> None:
        """Load the compiled code; the threads would do so at any time after their start."""
        # Of no pipe at all, so it ends at once.
        run_helper(0, -1, -1, int(self._messages.ctypes.data))

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads when they have done what they were given; a second call does nothing."""
        if self.jobs_fd in self._fds:
            self._fds.remove(self.jobs_fd)
            os.close(self.jobs_fd)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._close_fds()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
