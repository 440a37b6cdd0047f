"""Disks on NBD servers, added to and removed from a confined process, over an upgrade and a crash."""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ringplane.block.sources.nbd import protocol as nbd
from ringplane.cli.ctl import ctl as ctl_command
from unit.nbd_server import EVERYTHING, NbdServer
from unit.rig import PATIENCE, eventually, pattern

from .served import ServedApi, needs_all, refused, starter

SIZE = 1 << 20
Serve = Callable[..., ServedApi]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    yield from starter(ServedApi, tmp_path)


@pytest.fixture(params=["one connection", "several"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NbdServer]:
    flags = EVERYTHING & ~nbd.FLAG_CAN_MULTI_CONN if request.param == "one connection" else EVERYTHING
    made = NbdServer(tmp_path / "nbd", bytearray(pattern(SIZE)), flags=flags)
    yield made
    made.stop()


def arguments(server: NbdServer, *more: str) -> tuple[str, ...]:
    """Of a process to which disks of this server can be added."""
    folders = ("--api-socket", "api.sock", "--allow-folder", ".", "--io-threads", "2")
    return (*folders, "--allow-server", f"nbd+unix:///?socket={server.path.name}", *more)


def body(server: NbdServer, **more: Any) -> dict[str, Any]:
    disk = {"image": server.uri, "socket-path": str(server.path.with_name("n.sock")), "name": "n", "num-queues": 2}
    return {**disk, "nbd-reconnect-delay": 60, **more}


@needs_all
def test_a_disk_comes_and_goes(serve: Serve, server: NbdServer) -> None:
    """Any call that the filter does not allow ends the process. A lost server is connected to again."""
    served = serve(*arguments(server), strict=True)
    for _ in range(2):
        disk = served.api.post("/v1/disks", body(server), status=201)
        assert (disk["image"], disk["size"], disk["name"]) == (server.uri, SIZE, "n")
        with served.attach("n.sock") as driver:
            assert driver.read(0, 4096) == server.content[:4096]
            driver.write(0, pattern(4096, 3))
            server.stop()
            server.start()
            assert driver.read(0, 4096) == pattern(4096, 3)
            served.api.post("/v1/disks/n/pause")
            served.api.post("/v1/disks/n/flush")
            assert server.commands()[-1] == nbd.CMD_FLUSH
            served.api.post("/v1/disks/n/resume")
            assert driver.read(512, 512) == pattern(4096, 3)[512:1024]
            for wanted, words in ((None, "the size of an export cannot"), ({"size": 2 * SIZE}, "NBD cannot change")):
                error = served.api.request("POST", "/v1/disks/n/resize", wanted).error
                assert words in error["what"]
                assert error["what"].endswith("restart ringplane")
        assert eventually(lambda: served.api.disk("n")["state"] == "listening")
        served.api.delete("/v1/disks/n")
        server.content[:4096] = pattern(4096)
    served.end()


@needs_all
@pytest.mark.parametrize("server", ["several"], indirect=True)
@pytest.mark.parametrize("kind", ["UNIX", "TCP"])
def test_a_disk_from_the_start(serve: Serve, server: NbdServer, kind: str) -> None:
    """The process itself connects, and connects again; any other call than for that ends it."""
    if kind == "TCP":
        server.stop()
        server.port = 0
        server.start()
    options = ("--image", server.uri, "--socket-path", "n.sock", "--nbd-reconnect-delay", "60", "--num-queues", "2")
    served = serve("--api-socket", "api.sock", *options, "--io-threads", "2", strict=True)
    with served.attach("n.sock") as driver:
        for number in range(2):
            driver.write(0, pattern(65536, number))
            driver.flush()
            driver.discard(4096, 4096)
            driver.write_zeroes(8192, 4096)
            assert driver.read(12288, 4096) == pattern(65536, number)[12288:16384]
            server.stop()
            server.start()
    served.end()


@needs_all
def test_what_runs_outlasts_the_process(serve: Serve, server: NbdServer, tmp_path: Path) -> None:
    """An upgrade, and a kill; and the written configuration makes the same disk."""
    (tmp_path / "state").mkdir()
    served = serve(*arguments(server, "--state", "state/disks"), strict=True)
    served.api.post("/v1/disks", body(server), status=201)
    [table] = tomllib.loads(served.api.request("GET", "/v1/config").data.decode())["disk"]
    with served.attach("n.sock") as driver:
        driver.write(512, pattern(512, 4))
        new = serve(*arguments(server, "--state", "state/disks", "--upgrade"), strict=True)
        assert served.process.wait(PATIENCE) == 0, served.errors.read_text()
        assert driver.read(512, 512) == pattern(512, 4)
        # The next process connects to the server by itself.
        server.stop()
        server.start()
        assert driver.read(512, 512) == pattern(512, 4)
        new.process.kill()
        new.process.wait()
        newest = serve(*arguments(server, "--state", "state/disks"), strict=True)
        driver.reconnect()
        assert driver.read(512, 512) == pattern(512, 4)
        server.stop()
        server.start()
        assert driver.read(512, 512) == pattern(512, 4)
    assert newest.api.disk("n")["image"] == server.uri
    assert eventually(lambda: newest.api.disk("n")["state"] == "listening")
    newest.api.delete("/v1/disks/n")
    newest.api.post("/v1/disks", {**table, "io-threads": ["ringplane-io-0", "ringplane-io-1"]}, status=201)
    newest.end()


@needs_all
@pytest.mark.parametrize("server", ["several"], indirect=True)
def test_a_server_that_was_not_named(serve: Serve, server: NbdServer, tmp_path: Path) -> None:
    """The line has what to do now, which was tried."""
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", strict=True)
    error = served.api.request("POST", "/v1/disks", body(server)).error
    option, address = error["right"].removeprefix("start ringplane with ").partition(", or with")[0].split(" ", 1)
    served.end()
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", option, address.strip("'"), strict=True)
    served.api.post("/v1/disks", body(server), status=201)
    other = NbdServer(tmp_path / "other", bytearray(SIZE))
    error = served.api.request(
        "POST", "/v1/disks", body(other, name="o", **{"socket-path": f"{tmp_path}/o.sock"})
    ).error
    assert "this process may not connect to its server any more" in error["what"]
    other.stop()
    # What it stores names no other server.
    assert "other" not in served.end()


@pytest.mark.parametrize("server", ["several"], indirect=True)
def test_a_state_names_only_servers_that_were_named(serve: Serve, server: NbdServer, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    served = serve(*arguments(server, "--state", "state/disks"))
    served.api.post("/v1/disks", body(server), status=201)
    served.end()
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", "--state", "state/disks")
    answer = served.api.get("/v1/disks")
    [kept] = answer["not_served"]
    assert (answer["disks"], kept["name"], kept["image"], kept["socket"]) == ([], "n", server.uri, f"{tmp_path}/n.sock")
    shown = served.api.request("GET", "/v1/disks/n")
    assert shown.status == 404
    assert shown.error["what"] == f"was added at run time and is not served: {kept['why']}"
    assert b'ringplane_disk_not_served{disk="n"} 1' in served.api.request("GET", "/metrics").data
    listed = CliRunner().invoke(ctl_command, ["--api-socket", str(tmp_path / "api.sock"), "list"])
    assert listed.stdout.splitlines()[1].split() == ["n", "not", "served", server.uri, kept["socket"]]
    assert f"n: not served: {kept['why']}; the next start tries again" in listed.stderr
    assert f"n: was added at run time and is not served: {server.uri}: is not on a server of" in served.end()
    # When it is named again, the disk is there.
    served = serve(*arguments(server, "--state", "state/disks"))
    assert served.api.disk("n")["image"] == server.uri
    served.end()


@needs_all
@pytest.mark.parametrize("server", ["several"], indirect=True)
def test_a_server_that_cannot_be_found_stops_no_other_disk(serve: Serve, server: NbdServer) -> None:
    # No name server is asked for this one: a part of a name has at most 63 characters.
    address = f"nbd://{'a' * 64}"
    served = serve(*arguments(server, "--allow-server", address), strict=True)
    served.api.post("/v1/disks", body(server), status=201)
    other = body(server, name="o", image=f"{address}/x", **{"socket-path": str(server.path.with_name("o"))})
    error = served.api.request("POST", "/v1/disks", other).error
    assert error["what"] == f"{address}/x: its server could not be reached at the start"
    assert error["right"] == "restart ringplane when it answers"
    assert f"{address}/: cannot be found: " in served.end()


@needs_all
@pytest.mark.parametrize("server", ["several"], indirect=True)
def test_a_disk_whose_server_has_gone_is_given_up(serve: Serve, server: NbdServer, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    served = serve(*arguments(server, "--state", "state/disks"), strict=True)
    served.api.post("/v1/disks", body(server), status=201)
    served.end()
    server.stop()
    served = serve(*arguments(server, "--state", "state/disks"), strict=True)
    assert served.api.get("/v1/disks")["disks"] == []
    served.api.delete("/v1/disks/n")
    assert served.api.request("DELETE", "/v1/disks/n").status == 404
    served.end()
    server.start()
    served = serve(*arguments(server, "--state", "state/disks"), strict=True)
    assert served.api.get("/v1/disks")["disks"] == []
    served.end()


@needs_all
@pytest.mark.parametrize("server", ["several"], indirect=True)
def test_the_end_of_the_process_that_connects(serve: Serve, server: NbdServer, tmp_path: Path) -> None:
    """A disk that was added is served as long as its connection lasts, and no other one can be added."""
    served = serve(*arguments(server), strict=True)
    served.api.post("/v1/disks", body(server), status=201)
    os.kill(served.opener, signal.SIGKILL)
    assert eventually(lambda: "NBD disks that were added cannot connect again" in served.errors.read_text())
    image = server.uri.replace("/disk?", "/other?")
    other = body(server, image=image, name="o", **{"socket-path": f"{tmp_path}/o.sock"})
    answer = served.api.request("POST", "/v1/disks", other)
    assert (answer.status, "restart ringplane" in answer.error["what"]) == (503, True)
    with served.attach("n.sock") as driver:
        assert driver.read(0, 4096) == server.content[:4096]
        server.drop_connections()
        words = "cannot connect again: the server cannot be reached: the process that opens files has ended"
        assert eventually(lambda: words in served.errors.read_text())
    served.end()


def test_servers_that_make_no_sense() -> None:
    for address, words in (
        ("nbd://host/export", "names an export; nbd://host/ is the server with all its exports"),
        ("rbd:rbd/vm1", "names an image; the form of a cluster is rbd::id=USER:conf=PATH"),
        ("rbd::key=AQCsecret", "neither a key nor an encryption can be given here"),
        ("/run/nbd.sock", "is not the address of a server; examples: nbd://"),
    ):
        assert words in refused("--api-socket", "s", "--allow-folder", ".", "--allow-server", address)
    assert "--allow-server needs --allow-folder" in refused("--api-socket", "s", "--allow-server", "nbd://host")
    assert "--allow-server is for the socket of --api-socket" in refused("--allow-server", "nbd://host")
