"""RBD images with a library that a test controls: calls that hang, wrong sizes, changes by others."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringplane.block.image import ImageError
from ringplane.block.sources import rbd, rbd_cluster
from ringplane.block.sources.rbd import RbdSource
from ringplane.block.sources.rbd_cluster import Cluster
from ringplane.block.sources.rbd_image import LARGEST_SIZE
from ringplane.options.disk_config import DiskConfig
from ringplane.options.rbd_address import parse

from .fake_rbd_library import SIZE, FakeLibrary
from .waiting import PATIENCE, eventually, wait_until


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    fake = FakeLibrary()
    monkeypatch.setattr(rbd_cluster, "library", lambda: fake)
    monkeypatch.setattr(rbd, "CLOSE_PATIENCE", 0.0)
    yield fake
    fake.answers.set()
    # No connection is left for the next test, also of openings that have hung until now.
    wait_until(lambda: not any(shared.users or shared.cluster for shared in Cluster._all.values()))


def opened(tmp_path: Path, address: str = "rbd:rbd/vm1", **options: Any) -> RbdSource:
    config = DiskConfig(parse(address), ["io0"], socket_path=tmp_path / "socket", **options)
    source = rbd.open_source(config)
    assert isinstance(source, RbdSource)
    return source


@pytest.fixture
def source(library: FakeLibrary, tmp_path: Path) -> Iterator[RbdSource]:
    made = opened(tmp_path)
    made.prepare([])
    yield made
    made.close()


class Caller(threading.Thread):
    """Calls a method of the source beside the test; `error` is what it raised."""

    def __init__(self, function: Any) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self.error = error


CALLS = {
    "rbd_get_size": lambda source: source.refresh_size(),
    "rbd_resize": lambda source: source.grow(2 * SIZE),
    "rbd_flush": lambda source: source.sync(),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_image_is_closed_under_a_call(library: FakeLibrary, source: RbdSource, name: str) -> None:
    """Closing gives up in time; the image is closed when the call has returned, and later calls do not get there."""
    library.hanging.add(name)
    caller = Caller(lambda: CALLS[name](source))
    wait_until(lambda: f"{name} hangs" in library.calls)
    source.close()
    assert "rbd_close" not in library.calls
    library.answers.set()
    wait_until(lambda: "rados_shutdown" in library.calls)
    caller.join(PATIENCE)
    order = [each for each in library.calls if each in (name, "rbd_close", "rados_ioctx_destroy", "rados_shutdown")]
    assert order[-4:] == [name, "rbd_close", "rados_ioctx_destroy", "rados_shutdown"]
    before = list(library.calls)
    for call in CALLS.values():
        with pytest.raises((ImageError, OSError), match="being closed"):
            call(source)
    assert library.calls == before
    wait_until(lambda: source not in rbd._closing)


def test_no_image_is_closed_while_its_size_is_noticed(library: FakeLibrary, source: RbdSource) -> None:
    source.start_threads()
    source.watch(lambda: None)
    wait_until(lambda: library.calls[-1] == "rbd_get_size")
    library.hanging.add("rbd_get_size")
    source._opened.look()
    wait_until(lambda: "rbd_get_size hangs" in library.calls)
    source.close()
    assert "rbd_close" not in library.calls
    library.answers.set()
    wait_until(lambda: "rbd_close" in library.calls)


def test_it_is_not_asked_again_while_it_hangs(
    library: FakeLibrary, source: RbdSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread is left, however often somebody asks."""
    monkeypatch.setattr(rbd, "ASK_PATIENCE", 0.0)
    library.hanging.add("rbd_get_size")
    with pytest.raises(ImageError, match="the cluster does not answer within"):
        source.refresh_size()
    for _ in range(3):
        with pytest.raises(ImageError, match="has not answered what it was asked before"):
            source.refresh_size()
    wait_until(lambda: library.calls.count("rbd_get_size hangs") == 1)
    library.answers.set()
    monkeypatch.setattr(rbd, "ASK_PATIENCE", PATIENCE)
    assert eventually(lambda: _refreshes(source))


def _refreshes(source: RbdSource) -> bool:
    try:
        source.refresh_size()
    except ImageError:
        return False
    return True


def test_openings_that_hang(library: FakeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been opened after all is closed again. Meanwhile images of another cluster can be opened."""
    monkeypatch.setattr(rbd_cluster, "OPENINGS", 2)
    monkeypatch.setattr(Cluster, "_all", {})
    library.hanging.add("rbd_open")
    with monkeypatch.context() as patch:
        patch.setattr(rbd, "OPEN_PATIENCE", 0.0)
        for _ in range(2):
            with pytest.raises(ImageError, match="the cluster does not answer within"):
                opened(tmp_path)
        wait_until(lambda: library.calls.count("rbd_open hangs") == 2)
        library.hanging.clear()
        with pytest.raises(ImageError, match="has not answered what it was asked before"):
            opened(tmp_path)
    opened(tmp_path, "rbd:rbd/vm1:conf=/other").close()
    wait_until(lambda: library.calls.count("rados_shutdown") == 1)
    library.answers.set()
    wait_until(lambda: library.calls.count("rados_shutdown") == 2)
    assert library.calls.count("rbd_close") == 3


def test_a_size_that_changes_before_it_is_served(library: FakeLibrary, tmp_path: Path) -> None:
    """Before the end of an upgrade, or while the other disks are opened: nobody has to notify us again."""
    config = DiskConfig(parse("rbd:rbd/vm1"), ["io0"], socket_path=tmp_path / "socket")
    library.size = 2 * SIZE
    for source in (rbd.take_over_source(config, {"size": SIZE}), rbd.open_source(config)):
        before = source.size
        source.prepare([])
        library.size = 3 * SIZE
        noticed = threading.Event()
        source.start_threads()
        source.watch(noticed.set)
        assert noticed.wait(PATIENCE)
        assert source.size == before
        source.refresh_size()
        assert source.size == 3 * SIZE
        source.close()
        library.size = 2 * SIZE


def test_a_size_that_is_noticed_before_it_is_served(library: FakeLibrary, source: RbdSource) -> None:
    """The thread of all watches runs already, because another disk is served."""
    source.start_threads()
    library.size = 2 * SIZE
    source._opened.look()
    wait_until(lambda: source._noticed == 2 * SIZE)
    noticed = threading.Event()
    source.watch(noticed.set)
    assert noticed.wait(PATIENCE)


@pytest.mark.parametrize("differs", ["rados_cluster_fsid", "rbd_get_id"])
def test_another_image_of_this_name_is_not_taken_over(
    library: FakeLibrary, source: RbdSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: str
) -> None:
    """In another cluster, or in this one since that of the running process was renamed."""
    offer = {"size": SIZE, **source.hand_over()}
    config = DiskConfig(parse("rbd:rbd/vm1:mon_host=there"), ["io0"], socket_path=tmp_path / "socket")
    assert rbd.is_offered(config, offer)

    def wait_until_disconnected(times: int) -> None:
        wait_until(lambda: library.calls.count("rados_shutdown") == times)

    rbd.take_over_source(config, offer).close()
    wait_until_disconnected(1)
    found = library.text
    monkeypatch.setattr(
        library, "text", lambda name, *arguments: "other" if name == differs else found(name, *arguments)
    )
    with pytest.raises(ImageError, match="vm1: is not the image that the running process serves"):
        rbd.take_over_source(config, offer)
    wait_until_disconnected(2)
    # An older release does not say which one it is.
    rbd.take_over_source(config, {"size": SIZE, "rbd": offer["rbd"]}).close()
    wait_until_disconnected(3)


def test_a_size_that_does_not_change(library: FakeLibrary, source: RbdSource) -> None:
    noticed: list[int] = []
    source.start_threads()
    source.watch(lambda: noticed.append(1))
    for count in range(1, 4):
        wait_until(lambda expected=count: library.calls.count("rbd_get_size") > expected)  # type: ignore[misc]
        source._opened.look()
    assert not noticed


@pytest.mark.parametrize("size", [LARGEST_SIZE + 1, (1 << 64) - 512])
def test_a_size_that_no_disk_can_have(library: FakeLibrary, tmp_path: Path, size: int) -> None:
    library.size = size
    with pytest.raises(ImageError, match=f"its size of {size} bytes cannot be served"):
        opened(tmp_path)
    library.size = SIZE
    source = opened(tmp_path)
    source.prepare([])
    library.size = size
    with pytest.raises(ImageError, match="cannot be served"):
        source.refresh_size()
    assert source.size == SIZE
    source.close()


def test_all_of_it_is_closed_if_a_part_cannot_be(library: FakeLibrary, source: RbdSource) -> None:
    whole = library.call

    def failing(name: str, *arguments: Any) -> int:
        whole(name, *arguments)
        if name in ("rbd_update_unwatch", "rbd_close"):
            raise OSError(108, "Cannot send after transport endpoint shutdown")
        return 0

    library.call = failing  # type: ignore[method-assign]
    source.close()
    wait_until(lambda: library.calls[-1] == "rados_shutdown")
    assert library.calls[-4:] == ["rbd_update_unwatch", "rbd_close", "rados_ioctx_destroy", "rados_shutdown"]
    wait_until(lambda: source not in rbd._closing)


def test_it_is_closed_without_fds(library: FakeLibrary, source: RbdSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is closed on the thread that wants it, however long that takes."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", refuse)
        source.close()
    assert library.calls[-4:] == ["rbd_update_unwatch", "rbd_close", "rados_ioctx_destroy", "rados_shutdown"]
    assert source not in rbd._closing
