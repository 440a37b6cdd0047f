"""Fixtures of the tests of the vhost-user back end (protocol_rig.py)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.driver.frontend import SharedMemory
from ringplane.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES

from .protocol_rig import (
    MEMORY_SIZE,
    front_end,
    open_fds,
    serve_in,
    shared_mappings,
    wait_until,
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ringplane.Export]:
    with serve_in(tmp_path_factory.mktemp("session")) as export:
        yield export


@pytest.fixture
def own_export(tmp_path: Path) -> Iterator[ringplane.Export]:
    """A separate export for tests that would break all later ones if they found an error."""
    with serve_in(tmp_path) as export:
        yield export


@pytest.fixture
def nothing_leaks(export: ringplane.Export, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test the back end waits for the next front end, without additional fds or mappings."""
    fds, mappings = open_fds(), shared_mappings()
    yield
    wait_until(lambda: export.state == "listening")
    # The exceptions in there refer to frames, and these to memory tables.
    caplog.get_records("call").clear()
    gc.collect(0)
    if shared_mappings() > mappings or open_fds() != fds:
        gc.collect()
    # Fewer after a test that failed, whose frames were kept.
    assert open_fds().items() <= fds.items()
    assert shared_mappings() <= mappings
    assert export.in_flight == 0
    with front_end(export) as following:
        assert following.get_features() & VHOST_USER_F_PROTOCOL_FEATURES
    wait_until(lambda: export.state == "listening")


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(MEMORY_SIZE)
    yield memory
    memory.close()
    # pytest keeps the object for a while; the mapping is removed now.
    vars(memory).clear()


@pytest.fixture
def dropped(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log lines of the back end in this test, from level warning on."""
    caplog.set_level(logging.INFO, "ringplane")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
