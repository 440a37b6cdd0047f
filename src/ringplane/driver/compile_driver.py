"""Compiling the load generator in advance, in a child process."""

from __future__ import annotations

from ringplane.compiler.apart import compile_apart, run_child
from ringplane.compiler.cache import DRIVER, is_cached, mark_cached
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.jit import load
from ringplane.driver.generator import drive
from ringplane.driver.virtqueue import reap_at
from ringplane.system.signals import NONE, Signals


def warm_up(signals: Signals = NONE) -> None:
    """Fill the cache if it is empty. Raises Interrupted."""
    if not INTERPRETED and not is_cached(DRIVER):
        compile_apart(__name__, signals)


def load_all() -> None:
    """Compile or load the functions that take long to compile."""
    load(drive)
    load(reap_at)


def finish() -> None:
    load_all()
    mark_cached(DRIVER)


if __name__ == "__main__":
    run_child(lambda _: [load_all], finish)
