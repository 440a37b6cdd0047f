"""A planned restart keeps what was changed at run time: disks, names, limits, pauses, counters, events, sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.layers.layer import Layer
from ringplane.control.changes import Changes, plan, refuse
from ringplane.control.changing import Changing
from ringplane.control.handed_counters import resume_counters, resume_thread_counters
from ringplane.control.handover import VERSION, Channel, HandoverError, socket_beside
from ringplane.control.listener import Listener
from ringplane.control.operation_errors import Unavailable
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.driver import Driver, Load, run_load
from ringplane.driver.content import Model
from ringplane.options.declare import WrongOptions
from ringplane.options.delay_options import Delay
from ringplane.options.policy_options import PolicyUse
from ringplane.options.thread_options import IoThread
from unit.policy_texts import own_policy
from unit.rig import PATIENCE, eventually
from unit.test_operations import Idle, add, disk, do

from .served import MEMORY_SIZE, SOON, ServedApi, body, disk_table, needs_all, starter

Serve = Callable[..., ServedApi]

CONFIG = f"""
[api]
socket = "api.sock"
allow-folders = ["."]
[[io-thread]]
name = "io0"
[[io-thread]]
name = "io1"
{disk_table("a")}
[disk.limits]
total-iops-sec = 100000
{disk_table("b")}
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    (tmp_path / "disks.toml").write_text(CONFIG)
    yield from starter(ServedApi, tmp_path)


def upgrade(serve: Serve, old: ServedApi, *arguments: str, strict: bool = False) -> ServedApi:
    """The process that has taken over."""
    new = serve(*(arguments or ("--config", "disks.toml")), "--upgrade", strict=strict)
    assert old.process.wait(SOON) == 0, old.errors.read_text()
    return new


def attach(folder: Path, name: str, queues: int = 1) -> Driver:
    return Driver(folder / f"{name}.sock", queues=queues, memory_size=MEMORY_SIZE, timeout=SOON)


def shown(served: ServedApi) -> dict[str, Any]:
    """What the API shows of all disks that does not change by itself."""
    disks = served.api.get("/v1/disks")["disks"]
    return {each["name"]: {key: value for key, value in each.items() if key not in ("rings",)} for each in disks}


@needs_all
def test_changes_last(serve: Serve, tmp_path: Path) -> None:
    """With a filter that ends the process at any call that is not allowed; twice, because they are handed on."""
    served = serve("--config", "disks.toml", strict=True)
    api = served.api
    c = body(tmp_path, "c", name="data", serial="C-1", direct=False, **{"num-queues": 2, "io-threads": ["io1"]})
    group = {"group-name": "tenant", "total-iops-sec": 50000}
    api.post("/v1/disks", c, status=201)
    api.post("/v1/disks", body(tmp_path, "d", limits=group), status=201)
    api.post("/v1/disks", body(tmp_path, "e", limits={"total-iops-sec": 7}), status=201)
    api.delete("/v1/disks/b")
    api.patch("/v1/disks/a", {"limits": {"total-iops-sec": 90000, "read-bytes-sec": 10**9}})
    api.patch("/v1/disks/data", {"limits": {"group-name": "tenant", "weight": 3}})
    api.patch("/v1/disks/e", {"limits": {"total-iops-sec": 0}})
    with attach(tmp_path, "a") as first, attach(tmp_path, "c") as second:
        first.write(0, b"a" * 512)
        second.write(0, b"c" * 512)
        api.post("/v1/disks/data/pause")
        before = shown(served)
        assert (before.keys(), before["data"]["paused"]) == ({"a", "data", "d", "e"}, True)
        for _ in range(2):
            served = upgrade(serve, served, strict=True)
            assert shown(served) == before
            first.read(0, 512)
            before["a"]["counters"]["read"] = shown(served)["a"]["counters"]["read"]
        assert before["a"]["counters"]["read"]["requests"] == 2
        served.api.post("/v1/disks/data/resume")
        assert second.read(0, 512) == b"c" * 512
    served.api.post("/v1/disks", body(tmp_path, "f"), status=201)
    served.api.delete("/v1/disks/e")
    served.end()
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".img")
    assert left == ["disks.toml", "errors"]


def test_a_disk_belongs_to_the_file_that_describes_it(serve: Serve, tmp_path: Path) -> None:
    """One that was added, and is written into the file afterwards; a limit that was not changed is the file's too."""
    served = serve("--config", "disks.toml")
    served.api.post("/v1/disks", body(tmp_path, "c", serial="C-1"), status=201)
    text = served.api.request("GET", "/v1/config").data.decode()
    (tmp_path / "disks.toml").write_text(text.replace("100000", "3000"))
    served = upgrade(serve, served)
    assert shown(served)["a"]["limits"] == {"total-iops-sec": 3000}
    (tmp_path / "disks.toml").write_text(text.partition("[[disk]]")[0])
    assert "is served by only one of the two processes" in refused_upgrade(serve, tmp_path)
    served.end()


def refused_upgrade(serve: Serve, folder: Path) -> str:
    """What a process logs that cannot take over."""
    (folder / "errors").write_text("")
    with pytest.raises(AssertionError, match="Error: "):
        serve("--config", "disks.toml", "--upgrade")
    return (folder / "errors").read_text()


def test_io_threads_that_do_not_exist_any_more(serve: Serve, tmp_path: Path) -> None:
    served = serve("--config", "disks.toml")
    served.api.post("/v1/disks", body(tmp_path, "c", **{"io-threads": ["io1"]}), status=201)
    (tmp_path / "disks.toml").write_text(CONFIG.replace("io1", "other"))
    served = upgrade(serve, served)
    assert set(served.api.disk("c")["io_threads"]) == {"io0", "other"}
    served.end()


def test_the_socket_of_a_disk_that_was_removed_is_not_needed(serve: Serve, tmp_path: Path) -> None:
    """A successor finds the process, although its first disk has gone, and is not described any more."""
    served = serve("--config", "disks.toml")
    served.api.delete("/v1/disks/a")
    (tmp_path / "disks.toml").write_text(re.sub(r"\[\[disk\]\]\nimage = .a.*?\n(?=\[\[)", "", CONFIG, flags=re.DOTALL))
    served = upgrade(serve, served)
    assert shown(served).keys() == {"b"}
    served.end()


def test_names_last(serve: Serve, tmp_path: Path) -> None:
    """Also those that were given by default, which depended on disks that have gone."""
    (tmp_path / "disks.toml").write_text(CONFIG.replace("b.img", "more/a.img"))
    (tmp_path / "more").mkdir()
    served = serve("--config", "disks.toml")
    assert shown(served).keys() == {"a", "a-2"}
    served.api.delete("/v1/disks/a")
    served.api.post("/v1/disks", body(tmp_path, "c", name="a"), status=201)
    served = upgrade(serve, served)
    assert shown(served).keys() == {"a", "a-2"}
    served.end()


def test_events_continue(serve: Serve, tmp_path: Path) -> None:
    served = serve("--config", "disks.toml")
    stream = served.api.events()
    served.api.post("/v1/disks/a/pause")
    last, kind, _ = next(stream)
    assert kind == "paused"
    served.api.post("/v1/disks/a/resume")
    served = upgrade(serve, served)
    assert [kind for _, kind, _ in stream] == ["resumed"]
    following = served.api.events(last)
    assert [next(following)[1] for _ in range(2)] == ["resumed", "upgraded"]
    served.end()


# Under load.

SAMPLE = re.compile(r"^(ringplane_(?:disk|io_thread)_\w+(?:_total|_bucket|_sum|_count)\{[^}]*\}) (\S+)$", re.MULTILINE)


class Scraper(threading.Thread):
    """Scrapes both sockets all the time; no connection may fail, and no counter may become less."""

    def __init__(self, served: ServedApi, address: tuple[str, int]) -> None:
        super().__init__()
        self._paths: list[Any] = [served.api.path, address]
        self._samples: dict[str, float] = {}
        self._stop_now = False
        self.scrapes = 0
        self.problem = ""

    def run(self) -> None:
        try:
            while not self._stop_now:
                for where in self._paths:
                    self._compare(scrape(where))
                self.scrapes += 1
        except BaseException as error:
            self.problem = self.problem or repr(error)

    def _compare(self, text: str) -> None:
        found = {name: float(value) for name, value in SAMPLE.findall(text)}
        less = [name for name, value in self._samples.items() if found.get(name, 0.0) < value]
        assert not less, less
        self._samples = found

    def finish(self) -> dict[str, float]:
        self._stop_now = True
        self.join()
        assert not self.problem
        return self._samples


def scrape(where: Any) -> str:
    """A connection of its own, as Prometheus has it at first."""
    with socket.socket(socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET) as sock:
        sock.settimeout(SOON)
        sock.connect(str(where) if isinstance(where, Path) else where)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
    assert text.startswith("HTTP/1.1 200 "), text[:200]
    return text


class VerifiedLoad(threading.Thread):
    """Reads and writes until it is told to stop; everything that is read is compared."""

    def __init__(self, driver: Driver, seed: int) -> None:
        super().__init__()
        self.driver = driver
        region = (0, driver.capacity)
        self._load = Load(
            block_size=(512, 4096), depth=16, read_percent=50, flush_every=50, requests=500, verify=True,
            seed=seed, model=Model(region, seed),
        )  # fmt: skip
        self._stop_now = False
        self.requests = 0
        self.problem = ""

    def run(self) -> None:
        try:
            while not self._stop_now:
                result = run_load(self.driver, self._load, backend_pid=0)
                assert (result.errors, result.mismatches, result.wrong_lengths) == (0, 0, 0), result
                self.requests += result.requests
        except BaseException as error:
            self.problem = repr(error)

    def does_some(self) -> bool:
        before = self.requests
        return eventually(lambda: self.requests > before + 500 or bool(self.problem)) and not self.problem

    def finish(self) -> None:
        self._stop_now = True
        self.join()
        assert not self.problem


@needs_all
def test_ten_upgrades_under_load(serve: Serve, tmp_path: Path) -> None:
    """Disks added at run time, with limits: no request fails, and no sample of a counter is less than before."""
    arguments = ("--config", "disks.toml", "--metrics", "127.0.0.1:0")
    served = serve(*arguments, strict=True)
    address = ("127.0.0.1", int(served.next_line().rpartition(":")[2].partition("/")[0]))
    for name, limits in (("c", {"total-iops-sec": 40000}), ("d", {"total-iops-sec": 5000, "read-bytes-sec": 10**9})):
        served.api.post("/v1/disks", body(tmp_path, name, limits=limits), status=201)
    served.api.patch("/v1/disks/c", {"limits": {"total-iops-sec": 30000}})
    loads = [VerifiedLoad(attach(tmp_path, name), seed) for seed, name in enumerate("acd", 1)]
    scraper = Scraper(served, address)
    for each in (scraper, *loads):
        each.start()
    try:
        for _ in range(10):
            assert all(load.does_some() for load in loads), [load.problem for load in loads]
            before = scraper.scrapes
            assert eventually(lambda before=before: scraper.scrapes > before or bool(scraper.problem))
            served = upgrade(serve, served, *arguments, strict=True)
    finally:
        for load in loads:
            load.finish()
        samples = scraper.finish()
    for load in loads:
        load.driver.close()
    for load, name in zip(loads, "acd", strict=True):
        counters = served.api.disk(name)["counters"]
        assert sum(counters[kind]["requests"] for kind in ("read", "write", "flush")) == load.requests
    assert samples['ringplane_disk_throttled_seconds_total{disk="d"}'] > 0
    assert shown(served)["c"]["limits"] == {"total-iops-sec": 30000}
    assert "could not take over" not in served.end()


# Inside of one process.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    interface = Idle(tmp_path / "interface")
    with serve_all([disk(tmp_path, "a")], [IoThread("io0")], interface=interface, upgradable=True) as served:
        yield served


class Following(Idle):
    """The interface of a successor; it knows its server."""

    server: Server

    def prepare(self, inherited: Listener | None) -> None:
        assert inherited is not None
        self.listener = inherited

    def open(self, server: Server) -> None:
        self.server = server


def test_serve_returns_its_own_disk_or_takes_over_nothing(server: Server, tmp_path: Path) -> None:
    """Its disk was removed at run time, and another one was added."""
    add(server, disk(tmp_path, "b"))
    do(server, lambda: server.remove("a"))
    following = Following(tmp_path / "interface")

    def take_over() -> ringplane.Export:
        return ringplane.serve(
            tmp_path / "a.img", tmp_path / "a.sock", num_queues=2, name="a", interface=following, upgrade=True
        )

    with pytest.raises(WrongOptions, match=r"a\.sock was removed at run time from the running process; add it there"):
        take_over()
    assert not server.wait(0)
    add(server, disk(tmp_path, "a"))
    export = take_over()
    with following.server:
        assert server.wait(PATIENCE)
        assert export.name == "a"
        assert [each.name for each in following.server.exports] == ["b", "a"]


@contextlib.contextmanager
def offered(folder: Path) -> Iterator[Channel]:
    """A successor that has had its offer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(socket_beside(folder / "interface")))
    with Channel(sock) as channel:
        channel.send({"hello": VERSION})
        channel.receive("disks", PATIENCE)
        yield channel


@pytest.fixture
def successor(server: Server, tmp_path: Path) -> Iterator[Channel]:
    with offered(tmp_path) as channel:
        yield channel


def test_what_is_changed_after_the_offer_ends_the_takeover(server: Server, successor: Channel, tmp_path: Path) -> None:
    add(server, disk(tmp_path, "b"))
    successor.send({"ready": True})
    with pytest.raises(HandoverError, match="were changed meanwhile; try again"):
        successor.receive("disks", PATIENCE)
    do(server, lambda: server.remove("b"))


def test_a_pause_after_the_offer_is_handed_over(server: Server, successor: Channel) -> None:
    server.exports[0].pause()
    successor.send({"ready": True})
    assert successor.receive("disks", PATIENCE)["disks"][0]["paused"]


def test_a_process_that_stops_hands_over_nothing(server: Server, successor: Channel) -> None:
    """It was asked to stop when the other one had everything: nobody may serve disks whose sockets are removed."""
    successor.send({"ready": True})
    successor.receive("disks", PATIENCE)
    server.request_stop()
    successor.send({"taking": True})
    with pytest.raises(HandoverError, match="the running process stops"):
        successor.receive("yours", PATIENCE)
    assert server.wait(PATIENCE)


def test_a_process_that_has_handed_over_removes_no_socket(server: Server, successor: Channel, tmp_path: Path) -> None:
    """It is asked to stop right after that."""
    server.at_takeover = lambda _: server.request_stop()
    successor.send({"ready": True})
    successor.receive("disks", PATIENCE)
    successor.send({"taking": True})
    successor.receive("yours", PATIENCE)
    assert server.wait(PATIENCE)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == [
        "a.sock", "interface", "interface.upgrade",
    ]  # fmt: skip


def test_disks_that_are_not_served_are_kept_over_an_upgrade(server: Server, tmp_path: Path) -> None:
    """Neither process serves them; the next start tries again."""
    table = {"name": "b", "image": "nbd://storage/b", "socket-path": str(tmp_path / "b.sock")}
    unserved = server.unserved = Changes(added=[table], paused=[str(tmp_path / "b.sock")])
    server.unserved_because = {str(tmp_path / "b.sock"): "nobody answers"}
    following = Following(tmp_path / "interface")
    ringplane.serve(tmp_path / "a.img", tmp_path / "a.sock", num_queues=2, interface=following, upgrade=True)
    with following.server as successor:
        assert server.wait(PATIENCE)
        assert [each.name for each in successor.exports] == ["a"]
        assert successor.unserved == unserved
        assert [each.why for each in successor.not_served] == ["nobody answers"]
        assert do(successor, lambda: _present(successor)).added == [table]


class Failing(Layer):
    """A layer that cannot be closed."""

    def abandon(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("step", ["notify the service manager", "release the sockets", "abandon a disk"])
def test_a_step_that_fails_after_a_takeover(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """The process ends all the same, and the files of all sockets belong to the other one."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    add(server, disk(tmp_path, "b"))
    if step == "abandon a disk":
        monkeypatch.setattr(server.exports[0].disk, "layers", [Failing()])
    elif step == "release the sockets":
        monkeypatch.setattr(server.interface, "release", fail)
    else:
        server.at_takeover = fail
    with offered(tmp_path) as channel:
        channel.send({"ready": True})
        channel.receive("disks", PATIENCE)
        channel.send({"taking": True})
        channel.receive("yours", PATIENCE)
    assert server.wait(PATIENCE)
    assert "a step after a takeover failed" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == [
        "a.sock", "b.sock", "interface", "interface.upgrade",
    ]  # fmt: skip


def test_a_change_waits_while_another_process_takes_over(server: Server, successor: Channel) -> None:
    """And is made when that process ends instead."""
    successor.send({"ready": True})
    successor.receive("disks", PATIENCE)
    limits = {"total-iops-sec": 7}
    operations = server.exports[0].operations
    changed = server.threads.call(lambda: operations.change_limits(limits))
    assert not changed.done()
    assert server.exports[0].limits == {}
    successor.close()
    assert changed.result(PATIENCE) == limits
    assert server.exports[0].limits == limits


def test_no_change_is_made_after_a_takeover() -> None:
    async def change(changing: Changing) -> None:
        async with changing.one():
            pass

    async def check() -> None:
        changing = Changing()
        with changing.none() as under_way:
            assert not under_way
            waiting = asyncio.create_task(change(changing))
            await asyncio.sleep(0)
            changing.end()
        with pytest.raises(Unavailable, match="another process has taken over"):
            await waiting

    asyncio.run(check())


def test_a_change_that_is_under_way_is_noticed() -> None:
    async def check() -> None:
        changing = Changing()
        async with changing.one():
            with changing.none() as under_way:
                assert under_way

    asyncio.run(check())


OLDER = ("changes", "events", "counters", "io_threads")


def test_an_older_release_sends_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disks are taken over as they are described."""
    send = Channel.send

    def send_less(channel: Channel, message: dict[str, Any], *rest: Any) -> None:
        send(channel, {key: value for key, value in message.items() if key not in OLDER}, *rest)

    config, threads = disk(tmp_path, "a", limits={"total-iops-sec": 9}), [IoThread("io0")]
    with serve_all([config], threads, upgradable=True) as old:
        monkeypatch.setattr(Channel, "send", send_less)
        with serve_all([config], threads, upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            assert (new.exports[0].name, new.exports[0].limits) == ("a", {"total-iops-sec": 9})


def test_counters_of_another_kind_begin_at_0(caplog: pytest.LogCaptureFixture) -> None:
    resume_counters({"layout": [["read"], ["requests"], 7], "disks": [0]}, {})
    resume_thread_counters({"layout": ["busy"], "counted": {"io0": [1]}}, {})
    assert "counters of disks begin at 0" in caplog.text
    assert "counters of I/O threads begin at 0" in caplog.text


def test_counters_continue(tmp_path: Path) -> None:
    config, threads = disk(tmp_path, "a"), [IoThread("io0")]
    with serve_all([config], threads, upgradable=True) as old, attach(tmp_path, "a") as driver:
        driver.write(0, bytes(512))
        with serve_all([config], threads, upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            assert new.exports[0].counters["write"].requests == 1
            driver.write(0, bytes(512))
            assert new.exports[0].counters["write"].requests == 2
            assert new.exports[0].counters["write"].histogram.sum() == 2


def retried(take_over: Callable[[], Server]) -> Server:
    """Again while the running process has not noticed the end of the one before."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return take_over()
        except HandoverError as error:
            if "is taking over" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_a_process_that_may_be_confined_names_no_other_files_of_policies(tmp_path: Path) -> None:
    """They are those that are described, or below a folder of --allow-folder."""
    (tmp_path / "own.py").write_text(own_policy("return PASS"))
    use = PolicyUse(f"{tmp_path}/own.py:own")
    config, threads = disk(tmp_path, "a"), [IoThread("io0")]
    described = dataclasses.replace(config, policy=[use])
    with serve_all([config], threads, upgradable=True) as old:
        old.exports[0].set_policies([use])
        with pytest.raises(HandoverError, match=r"^a: policy .*own\.py:own: is neither a policy of a disk"):
            serve_all([config], threads, upgrade=True, trusted=False)
        # The process that was refused may not have left the running one yet.
        with retried(lambda: serve_all([described], threads, upgrade=True, trusted=False)) as new:
            assert [each.policy for each in new.exports[0].policies] == [use.policy]


def test_policies_continue(tmp_path: Path) -> None:
    """Those that were changed at run time are there, and all continue what they count, remember and choose."""
    config, threads = disk(tmp_path, "a", policy=[PolicyUse("bad_blocks", {"where": "0-8K"})]), [IoThread("io0")]
    half = {"operation": "flush", "probability": 0.5, "seed": 3}
    with serve_all([config], threads, upgradable=True) as old, attach(tmp_path, "a") as driver:
        present = old.exports[0].policies
        old.exports[0].set_policies([*present, PolicyUse("error", half), PolicyUse("error", half, "twin")])
        driver.write(0, bytes(4096))
        results = [flushes(driver) for _ in range(20)]
        twin = old.exports[0].disk.running_policies[2]
        with serve_all([config], threads, upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            shown = new.exports[0].disk.running_policies
            assert [(each.name, each.shown()["seed"]) for each in shown] == [
                ("bad_blocks", "0"),
                ("error", "3"),
                ("twin", "3"),
            ]
            assert sum(each.counters["failed"] for each in shown[1:]) == results.count(False)
            assert shown[2].snapshot() == twin.snapshot()
            driver.read(0, 4096)
            with pytest.raises(OSError, match="reading"):
                driver.read(4096, 4096)
            results += [flushes(driver) for _ in range(20)]
    with serve_all([config], threads) as server, attach(tmp_path, "a") as driver:
        server.exports[0].set_policies([*present, PolicyUse("error", half), PolicyUse("error", half, "twin")])
        driver.write(0, bytes(4096))
        again = [flushes(driver) for _ in range(20)]
        driver.read(0, 4096)
        with pytest.raises(OSError, match="reading"):
            driver.read(4096, 4096)
        assert again + [flushes(driver) for _ in range(20)] == results


def flushes(driver: Driver) -> bool:
    """Whether a flush succeeds."""
    try:
        driver.flush()
    except OSError:
        return False
    return True


def test_what_was_used_of_limits_is_used_in_the_next_process(tmp_path: Path) -> None:
    """So upgrades are no way to get bursts: of a group, and of a disk alone."""
    configs = [
        disk(tmp_path, "a", limits={"total-iops-sec": 1, "total-iops-sec-max": 1000}),
        disk(tmp_path, "b", limits={"group-name": "x", "total-bytes-sec": 512, "total-bytes-sec-max": 1 << 20}),
        disk(tmp_path, "c", limits={"group-name": "x"}),
    ]
    threads, started = [IoThread("io0")], time.monotonic()
    with serve_all(configs, threads, upgradable=True) as old:
        for name in "abc":
            with attach(tmp_path, name) as driver:
                for _ in range(100):
                    driver.read(0, 512)
        used = [export.used_limits() for export in old.exports]
        with serve_all(configs, threads, upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            assert [export.used_limits() for export in new.exports] == used
    assert used[1] == used[2]
    for each, seconds in zip(used, (100, 200, 200), strict=True):
        assert each is not None
        assert max(each["empty_at"].values()) > (started + seconds) * 1e9


def test_counters_of_io_threads_continue(tmp_path: Path) -> None:
    """Of those that have the same name."""
    config, threads = disk(tmp_path, "a"), [IoThread("io0")]
    with serve_all([config], threads, upgradable=True) as old, attach(tmp_path, "a") as driver:
        run_load(driver, Load(depth=8, requests=500))
        with serve_all([config], [*threads, IoThread("io1")], upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            driver.write(0, bytes(512))
            same, other = (new.threads.workers[name].counters for name in ("io0", "io1"))
            before = old.threads.workers["io0"].counters.hand_over()
            assert all(then <= now for then, now in zip(before, same.hand_over(), strict=True))
            assert same.read()["completed"] == same.read()["fetched"] == 501
            assert other.read()["completed"] == 0


def test_counters_of_io_threads_continue_when_no_process_takes_over(server: Server, successor: Channel) -> None:
    """They stand still only while another process may continue them."""
    counters = server.threads.workers["io0"].counters
    successor.send({"ready": True})
    successor.receive("disks", PATIENCE)
    asleep = counters.read()["asleep"]
    assert asleep == counters.read()["asleep"]
    successor.close()
    assert eventually(lambda: counters.read()["asleep"] > asleep)


def test_the_time_with_requests_in_flight_continues(tmp_path: Path) -> None:
    config, threads = disk(tmp_path, "a", delay=Delay(read=20)), [IoThread("io0")]
    with serve_all([config], threads, upgradable=True) as old, attach(tmp_path, "a") as driver:
        driver.read(0, 512)
        assert old.exports[0].disk.device.busy_ticks > 0
        with serve_all([config], threads, upgradable=True, upgrade=True) as new:
            assert old.wait(PATIENCE)
            before = new.exports[0].disk.device.busy_ticks
            assert before >= old.exports[0].disk.device.busy_ticks
            driver.read(0, 512)
            assert new.exports[0].disk.device.busy_ticks > before


# What is said of changes.


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {"added": {}},
        {"added": [1]},
        {"removed": [1]},
        {"limits": {"a": 1}},
        {"names": {"a": 1}},
        {"paused": 7},
    ],
)
def test_changes_that_are_none(saved: object) -> None:
    with pytest.raises(ValueError, match="not a"):
        Changes.from_json(saved)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "image is missing"),
        ({"image": "/i", "socket-path": "/s", "colour": 1}, 'unknown key "colour"'),
        ({"image": "/i", "socket-path": "/s", "num-queues": 0}, "num-queues: 0 is not a whole number"),
        ({"image": "i", "socket-path": "/s"}, '"i" is not an absolute path'),
    ],
)
def test_an_added_disk_that_makes_no_sense(table: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongOptions, match=re.escape(words)):
        plan([], Changes(added=[table]), [IoThread("io0")], refuse)


def test_changes_are_json(server: Server, tmp_path: Path) -> None:
    add(server, disk(tmp_path, "b", features={"packed": False}, serial="S"))
    changes = do(server, lambda: _present(server))
    assert Changes.from_json(json.loads(json.dumps(changes.as_json()))) == changes


async def _present(server: Server) -> Changes:
    from ringplane.control.present_changes import changes_of

    return changes_of(server)
