"""Calls the units of the worker's engine, by their addresses in its struct."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call
from ringplane.native.access import address_of


@compiled
def prepare_io(engine, slot, operation, file, iov, iov_count, offset, dsync):
    """See engines/__init__.py for this and the functions below."""
    call(engine.prepare_io, address_of(engine), slot, operation, file, iov, iov_count, offset, dsync)


@compiled
def prepare_flush(engine, slot, file):
    call(engine.prepare_flush, address_of(engine), slot, file)


@compiled
def submit(engine):
    if engine.submit:
        call(engine.submit, address_of(engine))


@compiled
def wait(engine, timeout_ns, wanted):
    return call(engine.wait, address_of(engine), timeout_ns, wanted)


@compiled
def has_events(engine):
    return call(engine.has_events, address_of(engine)) != 0


@compiled
def reap(engine):
    """How many completions there are in `engine.completions`."""
    if engine.collect:
        call(engine.collect, address_of(engine))
    count = engine.completed
    engine.completed = 0
    return count
