"""Helper threads: they call functions that would block an I/O thread, for I/Os whose slots they get through a pipe.

A pipe serves as the queue in each direction. Messages are so short that each is written and read whole, even with
several readers or writers, and writing never blocks: the pipe has room for all slots. While a helper has an I/O, no
other thread touches it.
"""

from __future__ import annotations

import fcntl
import os
import threading
from errno import EINTR

import numpy as np

from ringplane.block.io import BLOCK_IO, BLOCK_IO_SIZE, HELPER_MESSAGE
from ringplane.compiler.jit import compiled, load
from ringplane.compiler.units import call
from ringplane.engines.common import COMPLETION, COMPLETION_SIZE, complete
from ringplane.native.access import address_of, view
from ringplane.native.syscalls import read, write

# How many such I/Os of a worker are in progress at a time; the others wait in the pipe and delay nothing else.
HELPERS = 2

# A message to a helper is the `slot` of a COMPLETION, a message back is the whole COMPLETION.
SLOT_SIZE = 8


@compiled
def send_to_helpers(channel, io, function, argument):
    """Have a helper call `function(argument, io)`; its result is that of the completion."""
    io.help = function
    io.helped = argument
    write(channel.jobs_fd, address_of(io), SLOT_SIZE)


@compiled
def take_from_helpers(channel):
    """Add what the helpers have completed to the completions of the engine."""
    place = address_of(channel) + HELPER_MESSAGE
    while read(channel.done_fd, place, COMPLETION_SIZE) == COMPLETION_SIZE:
        completion = view(place, COMPLETION)
        complete(channel.engine, completion.slot, completion.result)


@compiled
def run_helper(ios, jobs_fd, done_fd, message):
    """A helper's loop: until `jobs_fd` is closed. `message` is room for a COMPLETION."""
    completion = view(message, COMPLETION)
    while True:
        size = read(jobs_fd, message, SLOT_SIZE)
        if size == -EINTR:
            continue
        if size != SLOT_SIZE:
            return
        address = ios + completion.slot * BLOCK_IO_SIZE
        io = view(address, BLOCK_IO)
        completion.result = call(io.help, io.helped, address)
        write(done_fd, message, COMPLETION_SIZE)


class Helpers:
    """The helper threads of one worker; `jobs_fd` and `done_fd` are the worker's ends of the pipes."""

    def __init__(self, name: str, ios: int, slots: int) -> None:
        """`ios` is the address of the BLOCK_IO structs of the worker's channel. Raises OSError."""
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
                args=(ios, self._take_fd, self._give_fd, self._messages.ctypes.data + number * COMPLETION_SIZE),
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
        load(run_helper)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads after the I/Os that they were given; a second call does nothing."""
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
