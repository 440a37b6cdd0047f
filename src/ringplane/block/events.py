"""Events of layers and sources: an fd, and the unit that is called on the I/O thread when the fd is readable.

    ready(state, channel)

`state` is the address of the struct of the layer or source, `channel` that of the I/O thread's channel. The unit does
what can be done now: it resumes I/Os that a layer has kept (stack.py), or ends I/Os of a source (`complete`,
engines/common.py). It never blocks.

Fds are watched edge-triggered: what is not read from the fd does not wake the thread again, but the next write to an
eventfd does. The unit can be called although nothing is there to be read, so its fd is non-blocking. An fd that was
readable before it is watched counts as an edge, so nothing is lost while no queue uses the stack.

Any other thread wakes the worker with a write to an eventfd (`os.eventfd_write`, or `write` of native/syscalls.py). A
source that waits until a socket is writable has an epoll instance of its own, with the socket and EPOLLOUT |
EPOLLONESHOT in it, and watches the epoll instance: it is readable when the socket is writable, and only if the source
has asked for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call
from ringplane.native.access import address_of, view
from ringplane.native.structs import new, struct

if TYPE_CHECKING:
    from ringplane.engines.choose_engine import Engine

# `ready` is the address of the unit.
EVENT = struct("ready", "state")

# The token by which the engine reports the fd is the address of the EVENT plus this.
EVENT_TOKEN = 4


@compiled
def handle_event(channel, token):
    """The fd of this event is readable."""
    event = view(token - EVENT_TOKEN, EVENT)
    call(event.ready, event.state, address_of(channel))


class Event:
    """Owns an EVENT. The fd stays the caller's; a worker can have only one event for it."""

    def __init__(self, fd: int, ready: int, state: int) -> None:
        """`ready` is the address of the unit, `state` its first argument."""
        self.fd = fd
        self._record = new(EVENT)
        self._record["ready"], self._record["state"] = ready, state

    @property
    def token(self) -> int:
        return int(self._record.ctypes.data) + EVENT_TOKEN

    def watch(self, engine: Engine) -> None:
        """Called on the I/O thread; raises OSError if the fd cannot be polled."""
        engine.watch(self.fd, self.token)

    def unwatch(self, engine: Engine) -> None:
        """Called on the I/O thread; a second call does nothing."""
        engine.unwatch(self.fd)
