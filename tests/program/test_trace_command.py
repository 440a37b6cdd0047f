"""`ringplane trace`: what is in its file, how it ends, and what it says of what is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ringplane.dataplane.trace_layout import EVENT_SIZE
from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.driver.virtqueue import poke
from unit.chrome_format import Trace, check_depth
from unit.rig import eventually, small_tmpfs
from unit.waiting import wait_until

from .served import DISK, SOON, needs_all
from .test_serve_api import ServedApi
from .test_trace_stream import API, Serve, attach, begins

RINGPLANE = [sys.executable, "-m", "ringplane"]


def trace(served: ServedApi, *arguments: str) -> subprocess.Popen[str]:
    """Once it records: nothing is missed from now on."""
    command = [*RINGPLANE, "trace", *API, *arguments]
    process = subprocess.Popen(command, cwd=served.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("recording "), line + process.stderr.read()
    return process


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """The last line of its output."""
    out, err = process.communicate(timeout=SOON)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out.strip()


@needs_all
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_a_load_is_traced(serve: Serve, tmp_path: Path, engine: str) -> None:
    """Of a confined process: each request of the load is in the file, with what the driver knows of it."""
    served = serve(*DISK, *API, "--num-queues", "2", "--engine", engine, strict=True)
    with attach(served, queues=2) as driver:
        tracing = trace(served, "--seconds", "3600", "--requests", "4000")
        load = Load(depth=8, queues=2, read_percent=50, flush_every=10, requests=4000, block_size=[4096, 8192])
        result = run_load(driver, load)
        assert not result.errors
        line = finish(tracing)
    written = Trace(tmp_path / "trace.json")
    groups = [written.groups[f"a queue {number}"] for number in (0, 1)]
    requests = [request for group in groups for request in group.requests]
    assert len(requests) == result.requests == written.other["requests"]
    assert re.fullmatch(rf"trace.json: {result.requests} requests of 2 queues; open it at \S+", line)
    assert {request.args["result"] for request in requests} == {"ok"}
    assert {request.name for request in requests} == {"read", "write", "flush"}
    assert sum(request.args["length"] for request in requests) == result.bytes
    assert written.other["trace events lost"] == 0
    for group in groups:
        check_depth(group)
        assert max(depth for _, depth in group.counters["requests in flight"]) <= 8
        assert all(request.stages[-1].end == request.end for request in group.requests if request.stages)
    assert served.end()


@needs_all
def test_a_disk_with_layers(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API, "--delay", "read=2", strict=True)
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600", "--disk", "a", "--requests", "2")
        driver.read(0, 4096)
        driver.write(0, bytes(4096))
        finish(tracing)
    requests = {each.name: each for each in Trace(tmp_path / "trace.json").groups["a queue 0"].requests}
    read = {each.name: each.end - each.begin for each in requests["read"].stages if each.name != "in layers"}
    assert read["in engine"] > 0
    assert requests["read"].stages[0].end - requests["read"].stages[0].begin >= 2_000_000
    served.end()


def test_it_ends_by_itself(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API)
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600", "--requests", "100", "--out", "few.json")
        run_load(driver, Load(depth=4, requests=400))
        assert "requests of 1 queue" in finish(tracing)
        tracing = trace(served, "--seconds", "0.2", "--out", "short.json")
        assert finish(tracing) == "short.json: 0 requests of 0 queues; open it at https://ui.perfetto.dev"
    assert 100 <= Trace(tmp_path / "few.json").other["requests"] <= 400
    assert Trace(tmp_path / "short.json").other["complete"]
    served.end()


def test_ctrl_c_ends_it_earlier(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API)
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600")
        run_load(driver, Load(depth=4, requests=1000))
        tracing.send_signal(signal.SIGINT)
        assert re.fullmatch(r"trace.json: [0-9]+ requests? of . queues?; open it at \S+", finish(tracing))
    written = Trace(tmp_path / "trace.json")
    assert written.other["complete"]
    served.end()


@pytest.mark.parametrize("how", ["ctrl-c", "requests", "time"])
def test_requests_that_hang_are_in_it(serve: Serve, tmp_path: Path, how: str) -> None:
    """However the recording ends: one hangs since before it, one since then."""
    served = serve(*DISK, *API, "--delay", "read=3600000")
    with attach(served) as driver:
        buffers = [driver.memory.allocate(8192) for _ in range(2)]
        hang(driver, buffers[0], sector=8)
        assert eventually(lambda: served.api.disk("a")["in_flight"] == 1)
        options = {"time": ("--seconds", "1"), "requests": ("--seconds", "3600", "--requests", "1")}
        tracing = trace(served, *options.get(how, ("--seconds", "3600")))
        hang(driver, buffers[1], sector=16)
        driver.write(0, bytes(512))
        assert how == "time" or eventually(lambda: served.api.disk("a")["in_flight"] == 2)
        if how == "ctrl-c":
            tracing.send_signal(signal.SIGINT)
        finish(tracing)
        served.process.kill()
    written = Trace(tmp_path / "trace.json")
    group = written.groups["a queue 0"]
    in_flight = [each.args["sector"] for each in group.requests if each.args["result"] == "in flight"]
    assert in_flight == [8, 16]
    assert written.other["requests in flight at the end"] == 2
    assert written.other["complete"]
    check_depth(group)


def hang(driver: Driver, buffer: int, sector: int) -> None:
    """Begin a read."""
    poke(buffer, struct.pack("<IIQ", 0, 0, sector))
    driver.submit([(buffer, 16, False), (buffer + 4096, 512, True), (buffer + 4096 + 512, 1, True)])


def test_one_at_a_time(serve: Serve, tmp_path: Path) -> None:
    """And when its client has gone, the next one can begin."""
    served = serve(*DISK, *API)
    tracing = trace(served, "--seconds", "3600")
    answer = served.api.request("POST", "/v1/trace?seconds=1")
    assert (answer.status, answer.error["what"]) == (409, "a trace is being recorded already")
    assert "a trace is being recorded already; wait for its end" in failed(served, 1)
    tracing.kill()
    tracing.communicate()
    assert eventually(lambda: begins(served))
    served.end()


def failed(served: ServedApi, status: int, *arguments: str) -> str:
    """The last line of a trace that cannot be made, which leaves nothing."""
    before = set(served.folder.iterdir())
    command = [*RINGPLANE, "trace", *(arguments or API)]
    done = subprocess.run(command, cwd=served.folder, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert set(served.folder.iterdir()) == before
    return done.stderr.splitlines()[-1]


def test_errors_are_one_line_each(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API)
    (tmp_path / "folder").mkdir()
    assert "no such socket" in failed(served, 3, "--api-socket", "none.sock")
    assert "give the socket of the API" in failed(served, 2, "--seconds", "1")
    assert "no disk has this name; the disks are: a" in failed(served, 1, *API, "--disk", "b")
    assert "none/t.json: cannot be written: No such file" in failed(served, 1, *API, "--out", "none/t.json")
    assert "folder: is not a regular file" in failed(served, 1, *API, "--out", "folder")
    assert "seconds" in failed(served, 2, *API, "--seconds", "0")
    for query, where in (("seconds=x", "seconds"), ("seconds=nan", "seconds"), ("disk=b", "b")):
        answer = served.api.request("POST", f"/v1/trace?{query}")
        assert (answer.status, answer.error["where"]) == (404 if where == "b" else 400, where)
    served.end()


class Relay:
    """A socket in front of the API's. `sent`: how many bytes the API has sent to its clients, who can read them."""

    def __init__(self, path: Path, target: Path) -> None:
        self.sent = 0
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._accept, args=[str(target)], daemon=True).start()

    def _accept(self, target: str) -> None:
        while True:
            client, server = self._listening.accept()[0], socket.socket(socket.AF_UNIX)
            try:
                server.connect(target)
            except ConnectionRefusedError:
                client.close()
                continue
            for arguments in ((client, server, 0), (server, client, 1)):
                threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, to: socket.socket, counted: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(data)
                self.sent += counted * len(data)
            to.shutdown(socket.SHUT_WR)


def test_the_process_ends_during_a_trace(serve: Serve, tmp_path: Path) -> None:
    """What was recorded until then is written; it is reported that the end is missing."""
    served = serve(*DISK, *API)
    relay = Relay(tmp_path / "relay.sock", tmp_path / "api.sock")
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600", "--api-socket", "relay.sock")
        run_load(driver, Load(depth=4, requests=1000))
        # Events are sent some time after they were recorded.
        wait_until(lambda: relay.sent > 1000 * EVENT_SIZE)
    served.process.kill()
    assert "requests of 1 queue; the process has ended meanwhile; open" in finish(tracing)
    written = Trace(tmp_path / "trace.json")
    assert not written.other["complete"]
    check_depth(written.groups["a queue 0"])


def test_the_process_is_upgraded_during_a_trace(serve: Serve, tmp_path: Path) -> None:
    """What was recorded until then is written, all of it; the guest is served by the next process."""
    served = serve(*DISK, *API)
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600")
        result = run_load(driver, Load(depth=4, requests=1000))
        new = serve(*DISK, *API, "--upgrade")
        line = finish(tracing)
        driver.read(0, 512)
    assert f" {result.requests} requests of 1 queue; the process has ended meanwhile; open" in line
    written = Trace(tmp_path / "trace.json")
    assert written.other["complete"]
    assert written.groups["a queue 0"].instants == ["ring: stop"]
    new.end()


def test_a_disk_with_limits(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API, "--limit", "total-iops-sec=10")
    with attach(served) as driver:
        tracing = trace(served, "--seconds", "3600", "--requests", "5")
        run_load(driver, Load(depth=5, requests=5))
        finish(tracing)
    group = Trace(tmp_path / "trace.json").groups["a queue 0"]
    assert len(group.requests) == 5
    held = [each for each in group.slices if each.name == "held by limits"]
    assert sum(each.end - each.begin for each in held) > 0
    served.end()


def test_no_space_for_the_file(serve: Serve, tmp_path: Path) -> None:
    """It says so, and leaves nothing."""
    served = serve(*DISK, *API)
    with small_tmpfs(tmp_path / "small", 1) as small, attach(served) as driver:
        tracing = trace(served, "--seconds", "3600", "--requests", "4000", "--out", f"{small}/trace.json")
        run_load(driver, Load(depth=8, requests=4000))
        _, err = tracing.communicate(timeout=SOON)
        assert tracing.returncode == 1
        assert "Traceback" not in err
        assert f"{small}/trace.json: cannot be written: No space left on device; name another one" in err
        assert not list(small.iterdir())
    served.end()


def test_an_existing_file_is_replaced_only_by_a_complete_one(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API)
    (tmp_path / "trace.json").write_text("before")
    tracing = trace(served, "--seconds", "3600")
    assert (tmp_path / "trace.json").read_text() == "before"
    tracing.kill()
    tracing.communicate()
    assert (tmp_path / "trace.json").read_text() == "before"
    os.umask(mask := os.umask(0))
    finish(trace(served, "--seconds", "0.1"))
    Trace(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_mode & 0o777 == 0o666 & ~mask
    served.end()
