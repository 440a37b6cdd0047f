"""The stream of a trace that the API sends, as its documentation describes it (docs/tracing.md)."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.client.client import Client
from ringplane.client.trace_receiver import Block, Receiver
from ringplane.dataplane.tracer import CAPACITY
from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from unit.api_client import UnixConnection
from unit.rig import eventually

from .served import DISK, SOON, needs_all
from .test_serve_api import ServedApi

Serve = Callable[..., ServedApi]
API = ("--api-socket", "api.sock")


def attach(served: ServedApi, queues: int = 1) -> Driver:
    return Driver(served.folder / "a.sock", queues=queues, memory_size=16 << 20, timeout=SOON)


class Stream:
    """A stream from its beginning, which has come already: nothing is missed."""

    def __init__(self, served: ServedApi, query: str) -> None:
        self._connection = UnixConnection(served.api.path)
        self._connection.request("POST", f"/v1/trace?{query}")
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        assert self._response.headers["content-type"] == "application/octet-stream"
        self.description = json.loads(self._response.readline())
        self.queues: dict[int, tuple[str, int, bool]] = {}
        self.lost = 0
        self._event: np.dtype[Any] = np.dtype([tuple(field) for field in self.description["fields"]])

    def read(self) -> Iterator[npt.NDArray[np.void]]:
        """All events."""
        while "end" not in (line := json.loads(self._response.readline())):
            for each in line["queues"]:
                self.queues[each["number"]] = each["disk"], each["queue"], each["layers"]
            self.lost += line["lost"]
            assert not line["overwritten"]
            events = np.frombuffer(self._response.read(line["events"] * self._event.itemsize), self._event)
            assert set(events["queue"]) <= self.queues.keys()
            yield events
        assert line["end"] > self.description["began"]
        self.process_ends = line["process-ends"]
        assert self._response.read() == b""

    def until(self, name: str, count: int) -> npt.NDArray[np.void]:
        """The events until there are so many of this name."""
        found = []
        for events in self.read():
            found.append(events)
            if sum(len(self.of(name, each)) for each in found) >= count:
                break
        return np.concatenate(found)

    def of(self, name: str, events: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Those of this name."""
        numbers = {name: int(number) for number, name in self.description["events"].items()}
        return events[events["event"] % (1 << self.description["event-bits"]) == numbers[name]]

    def close(self) -> None:
        self._connection.close()


def begins(served: ServedApi) -> bool:
    """Whether a stream can begin now; it has ended when this returns."""
    connection = UnixConnection(served.api.path)
    connection.request("POST", "/v1/trace?seconds=0.01")
    response: http.client.HTTPResponse = connection.getresponse()
    response.read()
    connection.close()
    return response.status == 200


@needs_all
@pytest.mark.parametrize("engine", ["io_uring", "aio"])
def test_all_requests_are_in_it(serve: Serve, engine: str) -> None:
    """With a filter that ends the process at any call that is not allowed, twice."""
    served = serve(*DISK, *API, "--num-queues", "2", "--engine", engine, strict=True)
    with attach(served, queues=2) as driver:
        for _ in range(2):
            assert eventually(lambda: begins(served))
            stream = Stream(served, "seconds=3600")
            result = run_load(driver, Load(depth=8, queues=2, read_percent=50, requests=2000))
            events = stream.until("complete", result.requests)
            stream.close()
            assert sorted(stream.queues.values()) == [("a", 0, False), ("a", 1, False)]
            assert stream.lost == 0
            assert len(events) == len(stream.of("complete", events)) == result.requests
            assert stream.of("complete", events)["length"].sum() == result.bytes
            assert (np.diff(events["time"]) >= 0).all()
    served.end()


def test_it_ends_by_itself(serve: Serve) -> None:
    served = serve(*DISK, *API)
    assert list(Stream(served, "seconds=0.01").read()) == []
    served.end()


def test_disks_of_interest(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *API, "--no-sandbox")
    body = {"image": str(tmp_path / "b.img"), "socket-path": str(tmp_path / "b.sock"), "create": "4M"}
    served.api.post("/v1/disks", body, status=201)
    stream = Stream(served, "disk=b")
    for name in ("a", "b"):
        with Driver(tmp_path / f"{name}.sock", memory_size=16 << 20, timeout=SOON) as driver:
            driver.read(0, 4096)
    events = stream.until("complete", 1)
    stream.close()
    assert list(stream.queues.values()) == [("b", 0, False)]
    assert len(stream.of("complete", events)) == 1
    served.end()


def test_it_is_ended(serve: Serve) -> None:
    """Its client gets the rest of it."""
    served = serve(*DISK, *API)
    stream = Stream(served, "seconds=3600")
    with attach(served) as driver:
        driver.read(0, 4096)
    began = stream.description["began"]
    for query, status in ((f"began={began - 1}", 409), ("began=x", 400)):
        answer = served.api.request("DELETE", f"/v1/trace?{query}")
        assert (answer.status, answer.error["where"]) == (status, "began")
    served.api.delete(f"/v1/trace?began={began}")
    (complete,) = stream.of("complete", np.concatenate(list(stream.read())))
    assert complete["length"] == 4096
    answer = served.api.request("DELETE", "/v1/trace")
    assert (answer.status, answer.error["what"]) == (409, "no trace is being recorded")
    served.end()


class Late(Receiver):
    """Reads nothing more than the first events until `go`."""

    def __init__(self, served: ServedApi) -> None:
        self.go = threading.Event()
        self.dropped = 0
        client = Client(served.folder / "api.sock")
        super().__init__(client, client.send("POST", "/v1/trace"), 1 << 62)

    def keep(self, block: Block) -> None:
        super().keep(block)
        assert self.go.wait(SOON)

    def _drop(self, block: Block, count: int) -> None:
        self.dropped += count
        super()._drop(block, count)


def test_events_are_overwritten_while_they_are_sent(serve: Serve) -> None:
    """They are dropped, and counted as lost: none is there twice, or half."""
    served = serve(*DISK, *API, "--engine", "null")
    with attach(served) as driver:
        receiver = Late(served)
        result = run_load(driver, Load(depth=64, requests=2 * CAPACITY, block_size=[4096]))
        receiver.go.set()
        recorded = receiver.stop()
    events = np.concatenate([block.events for block in recorded.blocks])
    assert receiver.dropped
    assert len(events) == recorded.requests
    assert len(events) + sum(block.lost for block in recorded.blocks) == result.requests
    assert set(events["length"]) == {4096}
    assert (np.diff(events["time"]) >= 0).all()
    served.end()


def test_one_at_a_time(serve: Serve) -> None:
    """And when its client has gone, the next one can begin."""
    served = serve(*DISK, *API)
    stream = Stream(served, "")
    answer = served.api.request("POST", "/v1/trace?seconds=1")
    assert (answer.status, answer.error["what"]) == (409, "a trace is being recorded already")
    stream.close()
    assert eventually(lambda: begins(served))
    served.end()


def test_a_process_stops_during_a_trace(serve: Serve) -> None:
    """Its client gets what was recorded until then."""
    served = serve(*DISK, *API)
    stream = Stream(served, "seconds=3600")
    with attach(served) as driver:
        driver.read(0, 4096)
    served.process.terminate()
    (complete,) = stream.of("complete", np.concatenate(list(stream.read())))
    assert complete["length"] == 4096
    assert stream.process_ends
    stream.close()
    served.end()


def test_wrong_values(serve: Serve) -> None:
    served = serve(*DISK, *API)
    for query, status, where in (("seconds=x", 400, "seconds"), ("seconds=nan", 400, "seconds"), ("disk=b", 404, "b")):
        answer = served.api.request("POST", f"/v1/trace?{query}")
        assert (answer.status, answer.error["where"]) == (status, where)
    served.end()
