"""The layer `gate`: it keeps all writes until somebody writes to its eventfd, and then lets as many of them through.

It is an example of a layer that keeps I/Os for an event of its own. As a program it serves a disk with such a gate, and
writes each number that it reads from its standard input to the eventfd:

    python -m unit.gate IMAGE SOCKET
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import ringplane
from ringplane.block.events import Event
from ringplane.block.io import BLOCK_IO, CHANNEL, WRITE, io_at, put
from ringplane.block.layers.layer import Layer
from ringplane.block.stack import CONTINUE, KEEP, LayerPart, resume
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.control import opening
from ringplane.native.access import view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import read

if TYPE_CHECKING:
    from ringplane.block.sources.source import Source
    from ringplane.opener.opener import Opener
    from ringplane.options.disk_config import DiskConfig

GATE = struct(
    "fd",  # the eventfd
    "number",  # that was read from it
    "passes",  # how many more writes may pass
    "first = -1",  # IO_LIST: kept writes, in their order
    "last",
    "kept",  # how many these are
    "calls",  # of `ready`
)
NUMBER, KEPT = (GATE.fields[name][1] for name in ("number", "first"))  # type: ignore[index]


@unit
def down(layer, channel, io_address):
    gate, io = view(layer, GATE), view(io_address, BLOCK_IO)
    if io.operation != WRITE:
        return CONTINUE
    if gate.passes > 0:
        gate.passes -= 1
        return CONTINUE
    put(view(channel, CHANNEL), layer + KEPT, io)
    gate.kept += 1
    return KEEP


@unit
def ready(state, channel):
    gate = view(state, GATE)
    gate.calls += 1
    if read(gate.fd, state + NUMBER, 8) == 8:
        gate.passes += gate.number
        let_through(gate, view(channel, CHANNEL))
    return 0


@compiled
def let_through(gate, channel):
    while gate.passes > 0 and gate.first >= 0:
        io = io_at(channel, gate.first)
        gate.first = io.next
        gate.passes -= 1
        gate.kept -= 1
        resume(channel, io)


class Gate(LayerPart):
    """The part of the layer for one I/O thread."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.record = new(GATE)
        self.record["fd"] = self.fd
        self.state = int(self.record.ctypes.data)
        self.down = down.address()
        self.events = (Event(self.fd, ready.address(), self.state),)

    def let(self, count: int) -> None:
        """Let so many writes through, from any thread."""
        os.eventfd_write(self.fd, count)

    @property
    def kept(self) -> int:
        return int(self.record["kept"][0])

    @property
    def calls(self) -> int:
        return int(self.record["calls"][0])


class GateLayer(Layer):
    """The layer of a disk."""

    def __init__(self) -> None:
        self.gates: list[Gate] = []

    def part(self, backing: int, slots: int) -> Gate:
        self.gates.append(Gate())
        return self.gates[-1]

    def close(self) -> None:
        while self.gates:
            os.close(self.gates.pop().fd)

    def abandon(self) -> None:
        self.close()


class GateModule:
    """What the registry of layers has of a module; `layers` are those of the disks that were opened."""

    def __init__(self) -> None:
        self.layers: list[GateLayer] = []

    def open_layer(self, config: DiskConfig, source: Source, *, shared: bool, opener: Opener) -> Layer:
        self.layers.append(GateLayer())
        return self.layers[-1]

    def check(self, config: DiskConfig, source: Source) -> type[Layer]:
        return GateLayer


def main() -> None:
    module = GateModule()
    opening.LAYERS = (module,)
    with ringplane.serve(Path(sys.argv[1]), Path(sys.argv[2])):
        print("listening", flush=True)
        for line in sys.stdin:
            module.layers[0].gates[0].let(int(line))


if __name__ == "__main__":
    main()
