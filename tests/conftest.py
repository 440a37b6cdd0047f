"""How `pytest -n auto` distributes the tests to processes; they share one cache of compiled code."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ceph import SHARED, CephCluster, need_ceph, stop_shared
from ringplane.dataplane.compile_data_plane import warm_up as compile_data_plane
from ringplane.driver.compile_driver import warm_up as compile_driver

GUESTS = "tests/guest/"
# They begin first because they take longest, so that no process has to wait long for another one at the end.
LONGEST = (GUESTS, "tests/program/test_container.py", "tests/program/test_serve.py", "tests/program/", "tests/storage/")
# A guest has up to two processors, which are emulated.
GUESTS_AT_A_TIME = max(1, len(os.sched_getaffinity(0)) // 2)


class ByFile(LoadScopeScheduling):
    """The tests of a file run in one process and in their order, because they share back ends and global settings.

    Guests share nothing, but many at a time are so slow that they miss their deadlines.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(GUESTS):
            return f"guests {zlib.crc32(nodeid.encode()) % GUESTS_AT_A_TIME}"
        return nodeid.partition("::")[0]


# Without the plugin (`pytest -p no:xdist`) there is no such hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    # In the order of collection, not by the number of tests.
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((at for at, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


def pytest_configure(config: pytest.Config) -> None:
    """The Ceph cluster that all processes of the run share is in this folder, when the first test needs it."""
    os.environ.setdefault(SHARED, f"/dev/shm/ringplane-ceph-{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        stop_shared()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile once, before the processes start that would all do so."""
    if session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput"):
        compile_data_plane()
        compile_driver()


def pytest_collection_finish() -> None:
    """Keep all that is imported out of garbage collections: with Numba's objects each one takes 0.2 s.

    The second one finds few objects. Python takes their number as the measure for when the next one is worthwhile:
    without it there would be none, and each disk that a test has served, some 20 MB, would stay.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


@pytest.fixture(scope="session")
def cluster() -> CephCluster:
    """The one of all tests of this run, whose daemons nobody stops."""
    need_ceph()
    found = CephCluster(Path(os.environ[SHARED]))
    # Others that start it at the same time wait for its lock.
    found.start()
    return found


@pytest.fixture(scope="module")
def failing_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephCluster]:
    """One whose OSD a test may stop, kill and start again."""
    need_ceph()
    own = CephCluster(Path(f"{os.environ[SHARED]}-{os.getpid()}"), "bluestore")
    own.start()
    yield own
    own.stop()
