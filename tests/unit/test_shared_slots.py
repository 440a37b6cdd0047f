"""Disks of different sources on one I/O thread: their I/Os use the same slots, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from errno import EOPNOTSUPP
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ringplane.block.io import CHANNEL, io_at
from ringplane.block.sources.null import NullPart
from ringplane.block.stack import SourcePart
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import view

from .rig import IN, OK, OUT, Line, Rig, RigFactory, direct_rig, pattern, rig_factory

SIZE = 1 << 20
# So that each request has the slot of the one before.
SLOTS = 1


@pytest.fixture(params=["aio", "io_uring"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with rig_factory(tmp_path, pattern(SIZE), engine=request.param, slots=SLOTS) as factory:
        yield direct_rig(cast(RigFactory, factory))


def line_on(rig: Rig, part: SourcePart) -> Line:
    """A further queue, whose disk has this source."""
    source: Any = SimpleNamespace(part=lambda slots: part)
    return replace(rig, source=source).line().start()


def test_a_source_without_bounce_buffers_after_an_unaligned_read(rig: Rig) -> None:
    """A bounce buffer that was given back is not read again."""
    file, null = rig.line().start(), line_on(rig, NullPart())
    for _ in range(3):
        assert file.do(IN, 0, room=4096, alignment=1).data == pattern(SIZE)[:4096]
        assert null.do(IN, 0, room=4096).status == OK


@unit
def refuse(stack_address, channel_address, first):
    """As a server may."""
    channel, slot = view(channel_address, CHANNEL), first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        complete(channel.engine, io.slot, -EOPNOTSUPP)
    return 0


class RefusingPart(SourcePart):
    ranges = backing = 0

    def __init__(self) -> None:
        self.struct = np.arange(1, 65)
        self.address, self.submit = int(self.struct.ctypes.data), refuse.address()


@pytest.mark.parametrize("kind", [IN, OUT])
def test_a_source_that_refuses_a_transfer_after_a_stable_write(rig: Rig, kind: int) -> None:
    """EOPNOTSUPP is about RWF_DSYNC only where a file was written with it."""
    part = RefusingPart()
    file, refusing = rig.line().start(write_through=True), line_on(rig, part)
    assert file.do(OUT, 0, pattern(4096), alignment=4096).status == OK
    content = {"data": pattern(512)} if kind == OUT else {"room": 512}
    assert refusing.do(kind, 0, **content).status != OK  # type: ignore[arg-type]
    assert list(part.struct) == list(range(1, 65))
