"""These tests mount file systems, which only root may do: other users skip them, CI must not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ceph import SHARED, CephCluster


@pytest.fixture(autouse=True, scope="session")
def need_root() -> None:
    if os.geteuid() != 0 and os.environ.get("CI") != "true":
        pytest.skip("file systems are mounted here, which needs root")


@pytest.fixture(scope="session")
def cluster() -> CephCluster:
    """The one of all tests of this run, whose daemons nobody stops."""
    found = CephCluster(Path(os.environ[SHARED]))
    # Others that start it at the same time wait for its lock.
    found.start()
    return found


@pytest.fixture(scope="module")
def failing_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """One whose OSD a test may stop, kill and start again."""
    own = CephCluster(Path(f"{os.environ[SHARED]}-{os.getpid()}"), "bluestore")
    own.start()
    yield own
    own.stop()
