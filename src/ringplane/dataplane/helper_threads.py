"""Helper threads: they do the operations that would block a worker, and get the slots of such requests through a pipe.

A pipe serves as the queue in each direction. Messages are so short that each is written and read whole, even with
several readers or writers, and writing never blocks: the pipe has room for all slots. While a helper has a request, no
other thread touches it.
"""

from __future__ import annotations

import fcntl
import os
import threading
from errno import EINTR

import numpy as np

from ringplane.compiler.jit import compiled, load
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
from ringplane.native.syscalls import read, write

# How many such requests of a worker are in progress at a time; the others wait in the pipe and delay nothing else.
HELPERS = 2

# A message to a helper is the `slot` of a COMPLETION, a message back is the whole COMPLETION.
SLOT_SIZE = 8


@compiled
def send_to_helpers(worker, request):
    """Have a helper perform `request.operation`."""
    write(worker.jobs_fd, address_of(request), SLOT_SIZE)


@compiled
def take_from_helpers(worker):
    """Add what the helpers have completed to the completions of the engine."""
    place = address_of(worker) + WORKER_HELPER_MESSAGE
    while read(worker.done_fd, place, COMPLETION_SIZE) == COMPLETION_SIZE:
        completion = view(place, COMPLETION)
        complete(worker.engine, completion.slot, completion.result)


@compiled
def run_helper(requests, jobs_fd, done_fd, message):
    """A helper's loop: perform requests until `jobs_fd` is closed. `message` is room for a COMPLETION."""
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
    """The helper threads of one worker; `jobs_fd` and `done_fd` are the worker's ends of the pipes."""

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
        """The two ends of a pipe with room for `room` bytes."""
        ends = os.pipe2(os.O_CLOEXEC)
        self._fds += ends
        if fcntl.fcntl(ends[1], fcntl.F_GETPIPE_SZ) < room:
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, room)
        return ends

    def load(self) -> None:
        """Load the compiled code now; otherwise the threads would load it at some time after their start."""
        load(run_helper, 0, 0, 0, 0)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads after the requests that they were given; a second call does nothing."""
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
