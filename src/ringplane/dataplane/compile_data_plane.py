"""Compiling the data plane in advance, in child processes: what all disks need, and the units of this configuration."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable

# These have units; what has them is also imported when its unit is needed.
from ringplane.block import ranges  # noqa: F401
from ringplane.block.helper_threads import run_helper
from ringplane.block.layers import registry  # noqa: F401
from ringplane.block.sources import choose_source
from ringplane.compiler.apart import compile_apart, run_child
from ringplane.compiler.cache import DATA_PLANE, forget_old_versions, is_cached, mark_cached, place
from ringplane.compiler.interpreted import INTERPRETED, VARIABLE
from ringplane.compiler.intrinsics import load_intrinsics
from ringplane.compiler.jit import load
from ringplane.compiler.side_by_side import Job
from ringplane.compiler.units import Unit, known
from ringplane.dataplane import disk_figures, limit_gate, request_types  # noqa: F401
from ringplane.dataplane.loop import mark_ready_at, run
from ringplane.dataplane.signaller import signal
from ringplane.dataplane.worker_state import UNITS
from ringplane.engines import aio, uring  # noqa: F401
from ringplane.native import sigbus
from ringplane.policies.declaring import POLICY
from ringplane.system.code_pages import drop_code
from ringplane.system.signals import NONE, Signals

log = logging.getLogger(__name__)


def warm_up(units: Iterable[Unit] | None = None, signals: Signals = NONE) -> None:
    """Fill the cache with what is missing of the data plane and of these units (by default all); raises Interrupted.

    If no child process can be started, the first worker compiles. That compilation cannot be interrupted, because an
    exception must not be raised in the middle of it.
    """
    if INTERPRETED:
        log.warning("the data plane is interpreted, because %s is set: it is slow, and not confined", VARIABLE)
        load_intrinsics()
        return
    missing = [each.job for each in (all_units() if units is None else units) if not each.is_cached()]
    if is_cached() and not missing:
        return
    if why := place().short_lived:
        log.warning("compiling the data plane, which takes some 6 s of CPU time, at each start: %s", why)
    else:
        log.info("compiling the data plane; only the first start after an installation does this ...")
    compile_apart(__name__, signals, missing)


def all_units() -> list[Unit]:
    """Those that any disk or any command may need."""
    choose_source.import_all()
    return list(known.values())


def release_compiler() -> None:
    """Release the memory of LLVM's code, which from now on only loads cached code: a third of a small process."""
    drop_code("libllvmlite.so")


def load_loop() -> None:
    """What a plain disk does for each request."""
    load(run)


def load_rest() -> None:
    """What else Python calls in all workers."""
    load(run_helper)
    load(mark_ready_at)
    load(signal)
    sigbus.install()


def jobs_of(units: Iterable[str]) -> list[Job]:
    """What compiles the data plane with the units of these names, the longest jobs first."""
    names = dict.fromkeys([*(each.name for each in UNITS), *units])
    return [load_loop, *(_unit(name).address for name in names), load_rest]


def _unit(name: str) -> Unit:
    if name.startswith(POLICY):
        # compiler/checker.py and more, which only a disk with policies needs.
        from ringplane.policies.loading import policy_unit

        return policy_unit(name)
    importlib.import_module(name.rpartition(".")[0])
    return known[name]


def finish() -> None:
    """Mark what all workers need as complete; this process knows their names then."""
    load_loop()
    load_rest()
    for each in UNITS:
        each.address()
    mark_cached(DATA_PLANE)
    forget_old_versions()


if __name__ == "__main__":
    run_child(jobs_of, finish)
