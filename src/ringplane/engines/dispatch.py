"""Calls the functions of the worker's engine: one branch, the same for all requests of a worker."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.engines import aio, uring
from ringplane.engines.aio import AIO_ENGINE
from ringplane.engines.common import IO_URING
from ringplane.engines.uring import URING_ENGINE
from ringplane.native.access import address_of, view


@compiled
def prepare_io(engine, slot, operation, file, iov, iov_count, offset, dsync):
    """See engines/__init__.py for this and the functions below."""
    if engine.kind == IO_URING:
        ring = view(address_of(engine), URING_ENGINE)
        uring.prepare_io(ring, slot, operation, file, iov, iov_count, offset, dsync)
    else:
        aio.prepare_io(view(address_of(engine), AIO_ENGINE), slot, operation, file, iov, iov_count, offset, dsync)


@compiled
def prepare_flush(engine, slot, file):
    if engine.kind == IO_URING:
        uring.prepare_flush(view(address_of(engine), URING_ENGINE), slot, file)
    else:
        aio.prepare_flush(view(address_of(engine), AIO_ENGINE), slot, file)


@compiled
def submit(engine):
    """For io_uring this does nothing: its `wait` submits."""
    if engine.kind != IO_URING:
        aio.submit(view(address_of(engine), AIO_ENGINE))


@compiled
def wait(engine, timeout_ns, wanted):
    if engine.kind == IO_URING:
        return uring.wait(view(address_of(engine), URING_ENGINE), timeout_ns, wanted)
    return aio.wait(view(address_of(engine), AIO_ENGINE), timeout_ns)


@compiled
def has_events(engine):
    if engine.kind == IO_URING:
        return uring.has_events(view(address_of(engine), URING_ENGINE))
    return aio.has_events(view(address_of(engine), AIO_ENGINE))


@compiled
def reap(engine):
    if engine.kind == IO_URING:
        return uring.reap(view(address_of(engine), URING_ENGINE))
    return aio.reap(view(address_of(engine), AIO_ENGINE))
