"""Shared memory that is truncated while the device uses it: SIGBUS."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import pytest

from ringplane.driver import Driver, Load, run_load
from ringplane.driver.frontend import Refused
from ringplane.vhost_user.messages import ProtocolError
from unit.rig import PATIENCE, eventually

from .conftest import Victim

LOAD = Load(block_size=65536, pattern="random", read_percent=50, depth=32, queues=2, seconds=5)


@pytest.mark.row("shared memory truncated while in use")
@pytest.mark.parametrize("left", [0, 1 << 20], ids=["all", "most"])
def test_memory_is_truncated_under_load(victim: Victim, left: int) -> None:
    """A front end that truncates its memory while requests run loses its disk; nobody else is affected."""
    before = victim.resources()
    for _ in range(3):
        driver = Driver(victim.socket, queues=2, memory_size=16 << 20, timeout=PATIENCE)
        failures: list[BaseException] = []

        def work(driver: Driver = driver, failures: list[BaseException] = failures) -> None:
            try:
                run_load(driver, LOAD)
            except Exception as error:
                failures.append(error)

        load = threading.Thread(target=work)
        load.start()
        assert eventually(lambda: victim.image.stat().st_blocks > 100), "the load did not begin"
        # The test's own mapping is guarded too: it reads zeros from now on.
        os.ftruncate(driver.memory.fd, left)
        load.join(PATIENCE)
        assert not load.is_alive()
        driver.close()
        assert failures, "the load noticed nothing"
    victim.check()
    assert victim.logged().count("it truncated memory that it shares with this disk") == 3
    victim.wait_for_resources(before)


@pytest.mark.row("shared memory truncated while in use")
def test_memory_is_truncated_before_a_ring_starts(victim: Victim) -> None:
    """When a ring starts, the control plane reads the index of the used ring."""
    before = victim.resources()
    driver = Driver(victim.socket, queues=2, memory_size=16 << 20, timeout=PATIENCE)
    front_end = driver.front_end
    base = front_end.get_vring_base(0)
    os.ftruncate(driver.memory.fd, 0)
    # However far it gets before the connection ends.
    with suppress(OSError, ProtocolError, Refused):
        front_end.start_vring(driver.queues[0], base)
        front_end.get_features()
    driver.close()
    victim.check()
    victim.wait_for_resources(before)
