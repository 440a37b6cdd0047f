"""Policies of a disk that is served, changed while a guest uses it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.control.export import Export
from ringplane.control.operation_errors import OperationError, WrongValue
from ringplane.driver import Driver
from ringplane.options.delay_options import Delay
from ringplane.options.policy_options import PolicyUse

from .policy_texts import own_policy
from .rig import OUT, PATIENCE, eventually, pattern
from .test_policies import SAMPLES

MIB = 1 << 20
ERROR = f"{SAMPLES}/sample_error.py"


@pytest.fixture(params=[None, Delay(read=0.001)], ids=["no layer", "delay"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Export]:
    (tmp_path / "disk.img").write_bytes(pattern(MIB))
    with ringplane.serve(
        tmp_path / "disk.img", tmp_path / "socket", delay=request.param, num_queues=2, io_threads=2
    ) as export:
        yield export


@pytest.fixture
def driver(export: Export) -> Iterator[Driver]:
    assert export.socket_path is not None
    with Driver(export.socket_path) as driver:
        yield driver


def counters(export: Export) -> dict[str, dict[str, int]]:
    layer = export.disk.policies
    return {} if layer is None else {each.name: each.counters for each in layer.policies}


def test_policies_come_and_go(export: Export, driver: Driver) -> None:
    """The answer comes when they are in force. A policy that stays counts on."""
    driver.flush()
    export.set_policies([PolicyUse(ERROR, {"operation": "flush"})])
    with pytest.raises(OSError, match="flush"):
        driver.flush()
    export.set_policies([PolicyUse(ERROR, {"operation": "write"}), PolicyUse(ERROR, {"operation": "read"}, "reads")])
    driver.flush()
    with pytest.raises(OSError, match="writing"):
        driver.write(0, bytes(512))
    with pytest.raises(OSError, match="reading"):
        driver.read(0, 512)
    assert counters(export) == {
        "sample_error": {"requests": 4, "failed": 2},
        "reads": {"requests": 2, "failed": 1},
    }
    export.set_policies([PolicyUse(ERROR, {"operation": "write"}, enabled=False)])
    driver.write(0, bytes(512))
    export.set_policies([])
    assert driver.read(0, 512) == bytes(512)
    assert counters(export) == {}


def test_what_is_wrong_changes_nothing(export: Export, driver: Driver) -> None:
    export.set_policies([PolicyUse(ERROR, {"operation": "flush"})])
    for uses, words in (
        ([PolicyUse(ERROR, {"operation": "write"}), PolicyUse("eror")], "no policy eror ships"),
        ([PolicyUse(ERROR, {"operation": "wirte"})], 'operation: "wirte" is not one of any, read'),
        ([PolicyUse(ERROR), PolicyUse(ERROR, {}, "x"), PolicyUse(ERROR, {}, "x")], 'two policies have the name "x"'),
    ):
        with pytest.raises(OperationError) as error:
            export.set_policies(uses)
        assert words in str(error.value)
    driver.write(0, bytes(512))
    with pytest.raises(OSError, match="flush"):
        driver.flush()


def test_what_only_the_compiler_finds_is_one_line(tmp_path: Path, export: Export, driver: Driver) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("my.seen += int(io)\nreturn PASS"))
    with pytest.raises(WrongValue, match=rf"^{path}:\d+: .*int"):
        export.set_policies([PolicyUse(str(path))])
    driver.flush()


def test_a_path_of_a_parameter_is_absolute(tmp_path: Path, export: Export) -> None:
    """Whoever names it over the API is in another folder."""
    with pytest.raises(WrongValue, match=r'^trigger: "flag" is not an absolute path; it has to begin with /'):
        export.set_policies([PolicyUse("error", {"trigger": "flag"})])
    export.set_policies([PolicyUse("error", {"trigger": str(tmp_path / "flag")})])


def test_a_request_in_flight_does_not_notice_the_first_policy(tmp_path: Path, export: Export, driver: Driver) -> None:
    """Many are in flight all the time, on the way down and up."""
    found: list[bytes] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            found.append(driver.read(4096, 4096))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert eventually(lambda: len(found) > 5)
        path = tmp_path / "own.py"
        path.write_text(own_policy("return redirect(4096)", "my.seen += 1\nreturn PASS"))
        for number in range(20):
            export.set_policies([PolicyUse(str(path), {"number": number})] if number % 3 else [])
            count = len(found)
            assert eventually(lambda count=count: len(found) > count)  # type: ignore[misc]
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert set(found) == {pattern(MIB)[4096:8192]}


def test_a_hanging_request_continues_when_its_policy_goes(tmp_path: Path, export: Export) -> None:
    path = tmp_path / "own.py"
    path.write_text(own_policy("return HANG if io.operation == WRITE else PASS"))
    export.set_policies([PolicyUse(f"{path}:own")])
    assert export.socket_path is not None
    with Driver(export.socket_path) as driver:
        thread = threading.Thread(target=driver.write, args=(8192, bytes(512)))
        thread.start()
        assert eventually(lambda: export.in_flight == 1)
        assert counters(export) == {"own": {"requests": 1, "seen": 0, "found": 0}}
        export.set_policies([PolicyUse(f"{path}:own"), PolicyUse(ERROR, {"operation": "flush"})])
        assert export.in_flight == 1
        export.set_policies([PolicyUse(f"{path}:own", enabled=False)])
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert driver.read(8192, 512) == bytes(512)


def test_a_changed_file_is_another_policy_that_counts_on(tmp_path: Path, export: Export, driver: Driver) -> None:
    path = tmp_path / "own.py"
    for answer in ("PASS", "fail(EIO) if io.operation == FLUSH else PASS"):
        path.write_text(own_policy(f"my.found += 1\nreturn {answer}"))
        export.set_policies([PolicyUse(str(path))])
        driver.read(0, 512)
    with pytest.raises(OSError, match="flush"):
        driver.flush()
    assert counters(export) == {"own": {"requests": 3, "seen": 0, "found": 3}}


def test_a_front_end_leaves_although_a_request_of_it_hangs(tmp_path: Path, export: Export) -> None:
    """The next one is served; and the disk stops although a request hangs."""
    path = tmp_path / "own.py"
    path.write_text(own_policy("return HANG if io.operation == WRITE else PASS"))
    export.set_policies([PolicyUse(f"{path}:own")])
    assert export.socket_path is not None
    for leave in (disconnect, disconnect_while_rings_stop, disconnect):
        with Driver(export.socket_path) as driver:
            hang_write(driver)
            assert driver.read(0, 512) == pattern(MIB)[:512]
            leave(driver)
        assert eventually(lambda: export.in_flight == 0)
    with Driver(export.socket_path) as driver:
        hang_write(driver)
        export.stop()
    assert (tmp_path / "disk.img").read_bytes() == pattern(MIB)


def hang_write(driver: Driver) -> None:
    """It is in flight when this returns."""
    with pytest.raises(TimeoutError):
        driver.request(OUT, 16, bytes(512), timeout=0.2)


def disconnect(driver: Driver) -> None:
    driver.front_end.close()


def stop_in_vain(driver: Driver) -> None:
    with contextlib.suppress(Exception):
        driver.stop()


def disconnect_while_rings_stop(driver: Driver) -> None:
    """After GET_VRING_BASE, whose reply does not come."""
    stopping = threading.Thread(target=stop_in_vain, args=(driver,))
    stopping.start()
    stopping.join(0.5)
    assert stopping.is_alive()
    # shutdown(2), because the other thread reads from it.
    driver.front_end.sock.shutdown(socket.SHUT_RDWR)
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
