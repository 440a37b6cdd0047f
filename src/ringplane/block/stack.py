"""The stack of a disk as one I/O thread sees it: layers, and the source below them.

A layer sees each I/O once on its way down and once, ended and whole, on its way up. It is a struct of its own and two
compiled functions, called by address, so that a disk without layers pays nothing for them and does not compile them:

    down(layer, channel, io)     up(layer, channel, io)

All three are addresses. The functions return what happens next: CONTINUE, or one of the other verdicts below. On the
way down a layer can change the I/O, or turn it round (`turn_round`) with a result. On the way up it can change the
result, or set `io.upward` to 0: then the I/O goes down again from below this layer. A layer never blocks the thread.

Waiting. If the layer knows the time, it returns WAIT. If it waits for something else, it keeps the I/O: it returns
KEEP, and calls `resume` when it has happened. Then the I/O continues as if the layer had returned CONTINUE: with
`turn_round` before `resume` it ends here. A kept I/O is in no list of the channel, so the layer can make lists of its
own with `put`. Only the I/O thread resumes: in `down` or `up` of another I/O of this thread, or in a unit that is
called when an fd of the layer is readable, which any other thread can cause (events.py).

An I/O that waits or is kept is in flight as one that storage works on: a ring is drained only when it has ended, and
until then the stack stays attached, with its events. If the process is killed, the next one gets the request again
from the in-flight region. So a layer must not keep an I/O without something that will resume it.

A source is the lowest element. `submit` gets, at the end of each turn of the loop, all I/Os of the turn that are for it
(route.py); 0: the I/Os are done by the engine of the I/O thread (sources/file.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.block.events import Event
from ringplane.block.io import ENDED, MOVING, put
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, view
from ringplane.native.structs import new, struct

if TYPE_CHECKING:
    from ringplane.engines.choose_engine import Engine

# CONTINUE: in the direction that `io.upward` says. WAIT: the same, at the time `io.due`. HELP: the same, after a helper
# thread has called `help(layer, io)`, which may block, and whose result becomes the I/O's. KEEP: the same, when the
# layer calls `resume`.
CONTINUE, WAIT, HELP, KEEP = range(4)

# `state` is the address of the layer's own struct; the others are addresses of functions, or 0.
LAYER = struct("state", "down", "up", "help")
LAYER_SIZE = LAYER.itemsize

STACK = struct(
    "layers",  # LAYER structs, the highest first
    "layer_count",
    "source",  # the source's struct
    "submit",  # address of the source's function; 0: `source` is a FILE
    "merges",  # adjacent I/Os reach that function as one (merge.py)
    "ranges",  # address of the function with which a helper discards, zeroes and erases, and its first argument
    "backing",
    "batch_first = -1",  # IO_LIST: the I/Os of this turn for `submit`
    "batch_last",
    "next_batch",  # the next STACK with such I/Os
)
BATCH: int = STACK.fields["batch_first"][1]  # type: ignore[index]


@compiled
def finish(channel, io, result):
    """The source has ended this I/O."""
    io.result = result
    if view(io.stack, STACK).layer_count:
        io.upward = 1
        put(channel, address_of(channel) + MOVING, io)
    else:
        put(channel, address_of(channel) + ENDED, io)


@compiled
def add_to_batch(channel, stack, io):
    """Have `submit` of the source called for the I/O at the end of this turn."""
    if stack.batch_first < 0:
        stack.next_batch = channel.batches
        channel.batches = address_of(stack)
    put(channel, address_of(stack) + BATCH, io)


@compiled
def turn_round(io, result):
    """End the I/O here: it goes up to the layers above this one. Returns CONTINUE."""
    io.result = result
    io.upward = 1
    return CONTINUE


@compiled
def resume(channel, io):
    """Have an I/O that a layer has kept continue, in the direction that `io.upward` says."""
    if not io.upward:
        io.level += 1
    put(channel, address_of(channel) + MOVING, io)


@compiled
def call_again(io):
    """Call this layer's `up` next, even if the I/O did not go down from here."""
    io.upward = 1
    io.level += 1


class LayerPart:
    """The part of a layer for one I/O thread: the address of its struct, and of its functions (0: none)."""

    state: int
    down = up = help = 0
    # Watched as long as a queue uses the stack.
    events: Sequence[Event] = ()

    # For a layer that may keep I/Os for ever. Both are called on the I/O thread, between two runs of the loop.

    def kept(self, ios: npt.NDArray[np.void]) -> list[int]:
        """The slots of the I/Os that it keeps and does not know when to resume; `ios`: those of the thread."""
        return []

    def forget(self, channel: int, slot: int) -> None:
        """One of these does not exist any more; `channel` is the address of the thread's channel."""

    # For a layer that can be removed (`Stack.remove`); on the I/O thread, too.

    def leave(self, channel: int) -> bool:
        """Keep no I/O any more: those in progress do not pass this layer again. False: not now, ask again."""
        return True


class SourcePart:
    """The part of a source for one I/O thread: see STACK. The methods are those of a source without the engine."""

    address: int
    # Watched as long as a queue uses the stack.
    events: Sequence[Event] = ()
    submit: int
    # Whether `submit` wants adjacent I/Os as one: then it transfers `bytes_left` of `iovecs_left` (io.py).
    merges = False
    ranges: int
    backing: int

    def attach(self, engine: Engine) -> None:
        """Called on the I/O thread before the first I/O; raises OSError."""

    def detach(self, engine: Engine) -> None:
        """Called on the I/O thread when no queue uses it any more."""

    def warning(self) -> str:
        """What the log is to report, once; empty: nothing."""
        return ""


class Stack:
    """Owns a STACK; `address` is its address."""

    def __init__(self, source: SourcePart, layers: Sequence[LayerPart] = ()) -> None:
        """`layers`: the highest first."""
        self.source, self.layers = source, tuple(layers)
        self._users = 0
        self._layers = _records(layers)
        self._record: npt.NDArray[np.void] = new(STACK)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["layers"], record["layer_count"] = self._layers.ctypes.data, len(layers)
        record["source"], record["submit"] = source.address, source.submit
        record["merges"] = source.merges
        record["ranges"], record["backing"] = source.ranges, source.backing

    @property
    def events(self) -> list[Event]:
        of_layers = [event for layer in self.layers for event in layer.events]
        return [*of_layers, *self.source.events]

    @property
    def uses_engine(self) -> bool:
        """Whether the engine of the I/O thread does the I/O."""
        return self.source.submit == 0

    def insert(self, index: int, layer: LayerPart, ios: npt.NDArray[np.void], engine: Engine) -> None:
        """Put a layer below the first `index` ones; `ios` are the BLOCK_IO structs of the I/O thread.

        Only on that thread, between two runs of the loop. I/Os that are below that place already do not pass the layer
        on their way down, but on their way up if the stack has had layers before. Raises OSError.
        """
        if self._users:
            for event in layer.events:
                event.watch(engine)
        ours = ios["stack"] == self.address
        # Without layers I/Os have no level.
        ios["level"][ours] = ios["level"][ours] + (ios["level"][ours] > index) if self.layers else 0
        self._use(*self.layers[:index], layer, *self.layers[index:])

    def remove(self, layer: LayerPart, ios: npt.NDArray[np.void], engine: Engine) -> None:
        """Undo `insert`, after `leave` of the layer: I/Os that are below it do not pass it on their way up."""
        if self._users:
            for event in layer.events:
                event.unwatch(engine)
        ours = ios["stack"] == self.address
        ios["level"][ours] -= ios["level"][ours] > self.layers.index(layer)
        self._use(*(each for each in self.layers if each is not layer))

    def _use(self, *layers: LayerPart) -> None:
        """Have these layers, and the probe below them if there is one."""
        probe, probed = self._layers[-1].copy(), int(self._record["layer_count"][0]) > len(self.layers)
        self.layers = layers
        self._layers = _records(layers)
        self._layers[-1] = probe
        self._record["layers"], self._record["layer_count"] = self._layers.ctypes.data, len(layers) + probed

    def set_probe(self, state: int, function: int) -> None:
        """Put a layer below the others, if there are any, to watch I/Os: `function` is its `down` and `up`.

        Only between two runs of the loop. I/Os that are at the source now do not pass it on their way up.
        """
        if self.layers:
            self._layers[-1] = (state, function, function, 0)
            self._record["layer_count"] = len(self.layers) + 1

    def remove_probe(self) -> None:
        """Undo it. I/Os that are below it find a layer without functions."""
        self._layers[-1] = (0, 0, 0, 0)
        self._record["layer_count"] = len(self.layers)

    def attach(self, engine: Engine) -> None:
        """One more queue of the I/O thread uses the stack; raises OSError."""
        if self._users == 0:
            self._attach(engine)
        self._users += 1

    def _attach(self, engine: Engine) -> None:
        with contextlib.ExitStack() as undo:
            self.source.attach(engine)
            undo.callback(self.source.detach, engine)
            for event in self.events:
                event.watch(engine)
                undo.callback(event.unwatch, engine)
            # From now on `detach` does it.
            undo.pop_all()

    def detach(self, engine: Engine) -> None:
        """One queue fewer uses it."""
        self._users -= 1
        if self._users == 0:
            for event in self.events:
                event.unwatch(engine)
            self.source.detach(engine)


def _records(layers: Sequence[LayerPart]) -> npt.NDArray[np.void]:
    """LAYER structs of these, and one more, for a probe."""
    records = np.zeros(len(layers) + 1, LAYER)
    for record, layer in zip(records, layers, strict=False):
        record["state"], record["down"], record["up"] = layer.state, layer.down, layer.up
        record["help"] = layer.help
    return records
