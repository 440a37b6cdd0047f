"""The API: every operation over its socket, every answer against openapi.json, and disks under load meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ringplane.api.http import HttpApi
from ringplane.api.openapi import describe
from ringplane.api.routes import ROUTES
from ringplane.api.schemas import meaning
from ringplane.control.config import read_config
from ringplane.control.listener import ListenError
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.driver.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.log.event_bus import KEPT
from ringplane.options import nbd_uri, rbd_address
from ringplane.options.api_options import ApiOptions
from ringplane.options.declare import declared
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread

from .api_client import Api, UnixConnection
from .rig import eventually

MIB = 1 << 20
SIZE = 4 << 20
MEMORY_SIZE = 16 << 20
SOON = 60.0


def config(folder: Path, name: str, **options: Any) -> DiskConfig:
    options = {"create": SIZE, "num_queues": 2, **options}
    return DiskConfig(folder / f"{name}.img", ("io0",), socket_path=folder / f"{name}.sock", **options)


def described(folder: Path, file: str, **keys: Any) -> dict[str, Any]:
    """The body that adds a disk."""
    paths = {"image": str(folder / f"{file}.img"), "socket-path": str(folder / f"{file}.sock")}
    return {**paths, "create": "4M", "num-queues": 2, **keys}


class Served:
    """A server with an API, and a client of it."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.api = Api(folder / "api.sock")

    def attach(self, name: str, queues: int = 1) -> Driver:
        return Driver(self.folder / f"{name}.sock", queues=queues, memory_size=MEMORY_SIZE, timeout=SOON)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    threads = [IoThread("io0"), IoThread("io1", poll_us=0)]
    with serve_all([config(folder, "first")], threads, interface=HttpApi(ApiOptions(folder / "api.sock"))) as server:
        yield Served(folder, server)


@pytest.fixture
def added(served: Served) -> Iterator[str]:
    """The name of a disk that was added for one test."""
    served.api.post("/v1/disks", described(served.folder, "a"), status=201)
    yield "a"
    served.api.request("DELETE", "/v1/disks/a?detach=true")
    (served.folder / "a.img").unlink()


# The description


def test_the_description_is_valid_and_has_every_route() -> None:
    document = json.loads(describe(ROUTES, "1"))
    assert {(method.upper(), path) for path, methods in document["paths"].items() for method in methods} == {
        (route.method, route.path) for route in ROUTES
    }
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_the_socket_is_for_its_owner(served: Served) -> None:
    assert stat.S_IMODE((served.folder / "api.sock").stat().st_mode) == 0o600


# Disks


def test_a_disk_from_the_beginning_to_the_end(served: Served) -> None:
    api = served.api
    stream = api.events()
    shown = api.post("/v1/disks", described(served.folder, "x", name="data", serial="S"), status=201)
    assert (shown["name"], shown["state"], shown["size"], shown["serial"]) == ("data", "listening", SIZE, "S")
    assert [disk["name"] for disk in api.get("/v1/disks")["disks"]] == ["first", "data"]
    with served.attach("x") as driver:
        driver.write(0, b"x" * 4096)
        shown = api.disk("data")
        assert (shown["state"], shown["counters"]["write"]) == ("attached", {"requests": 1, "errors": 0, "bytes": 4096})
        assert shown["front_end"].startswith(f"process {os.getpid()}")
        assert shown["rings"] == [{"queue": 0, "state": "running", "in_flight": 0}]
        api.post("/v1/disks/data/flush")
        assert api.post("/v1/disks/data/resize", {"size": 2 * SIZE}) == {"before": SIZE, "size": 2 * SIZE}
        assert api.post("/v1/disks/data/resize") == {"before": 2 * SIZE, "size": 2 * SIZE}
        assert api.post("/v1/disks/data/pause")["paused"]
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(driver.read, 0, 4096)
            assert api.disk("data")["counters"]["read"]["requests"] == 0
            assert not api.post("/v1/disks/data/resume")["paused"]
            assert reading.result(SOON) == b"x" * 4096
        refused = api.request("DELETE", "/v1/disks/data")
        assert (refused.status, refused.error["where"]) == (409, "data")
        api.delete("/v1/disks/data?detach=true")
    kinds = []
    for _, kind, data in stream:
        assert data["disk"] == "data"
        kinds.append(kind)
        if kind == "removed":
            break
    assert kinds == ["added", "attached", "resized", "paused", "resumed", "detached", "removed"]
    assert api.request("GET", "/v1/disks/data").error == {
        "what": "no disk has this name",
        "where": "data",
        "right": "the disks are: first",
    }
    assert not (served.folder / "x.sock").exists()
    (served.folder / "x.img").unlink()


@pytest.mark.parametrize(
    ("keys", "status", "where", "what"),
    [
        ({"num-queues": 70}, 400, "num-queues", "num-queues: 70 is not a whole number from 1 to 64"),
        ({"num-queus": 7}, 400, "", 'unknown key "num-queus"; did you mean "num-queues"?'),
        ({"image": 5}, 400, "image", "image: 5 is not a printable text in quotation marks"),
        ({"image": "a.img"}, 400, "image", 'image: "a.img" is not an absolute path; it has to begin with /'),
        ({"name": "a/b"}, 400, "name", 'name: "a/b" cannot be the name of a disk'),
        ({"name": "first"}, 400, "name", 'name: "first" is the name of disk first already'),
        ({"io-threads": ["io7"]}, 400, "io-threads", 'io-threads: no I/O thread has the name "io7"'),
        ({"create": "huge"}, 400, "create", "create: 'huge' is not a size"),
        ({"physical-block-size": 512, "block-size": 4096}, 400, "physical-block-size", "physical-block-size: "),
        ({"image": "/none/a.img"}, 409, "", "/none/a.img: the folder /none does not exist"),
        ({"engine": "memory", "image": "/etc/passwd"}, 409, "", "/etc/passwd: "),
    ],
)
def test_disks_that_cannot_be_added(served: Served, keys: dict[str, Any], status: int, where: str, what: str) -> None:
    before = sorted(path.name for path in served.folder.iterdir())
    answer = served.api.request("POST", "/v1/disks", described(served.folder, "b") | keys)
    assert (answer.status, answer.error["where"]) == (status, where), answer.data
    assert answer.error["what"].startswith(what)
    assert "\n" not in answer.error["what"]
    assert sorted(path.name for path in served.folder.iterdir()) == before


def test_keys_that_are_missing(served: Served) -> None:
    for keys, where in (({}, "image"), ({"image": "/a"}, "socket-path")):
        error = served.api.request("POST", "/v1/disks", keys).error
        assert (error["what"], error["where"]) == (f"{where} is missing; each disk needs one", where)


def test_images_elsewhere_that_cannot_be_added(served: Served) -> None:
    """An object describes one, with the keys of a table of a file; the description of the API has all of them."""
    schemas = served.api.document["components"]["schemas"]
    assert schemas["NewDisk"]["properties"]["rbd"] == {"$ref": "#/components/schemas/NewRbdImage"}
    assert schemas["NewRbdImage"]["properties"].keys() == rbd_address.TABLE_KEYS.keys()
    assert schemas["NewRbdImage"]["required"] == ["pool", "image"]
    assert schemas["NewDisk"]["properties"]["nbd"] == {"$ref": "#/components/schemas/NewNbdImage"}
    assert schemas["NewNbdImage"]["properties"].keys() == nbd_uri.TABLE_KEYS.keys()
    assert schemas["NewNbdImage"]["required"] == ["server"]
    for table, what in (
        ({"image": "x"}, "rbd: pool is missing; each RBD image has one"),
        ({"pool": "p", "image": "x", "conf": "c"}, 'rbd: "c" is not an absolute path; it has to begin with /'),
        ({"pool": "p", "image": "x", "snap": "s"}, 'rbd: unknown key "snap"; did you mean "snapshot"?'),
        ("p/x", 'rbd: "p/x" is not a table; write it as [disk.rbd]'),
    ):
        answer = served.api.request("POST", "/v1/disks", {"rbd": table, "socket-path": str(served.folder / "r.sock")})
        assert (answer.status, answer.error["where"], answer.error["what"]) == (400, "rbd", what)
    both = {"rbd": {"pool": "p", "image": "x"}, **described(served.folder, "b")}
    assert "are both the image of the disk" in served.api.request("POST", "/v1/disks", both).error["what"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "the body is not JSON: "),
        (b"{", "the body is not JSON: "),
        (b"\xff", "the body is not JSON: "),
        (b'{"a":' + b"[" * 60000, "the body is not JSON: "),
        (b"[]", "Expected `object`, got `array`"),
        (b"null", "Expected `object`, got `null`"),
    ],
)
def test_bodies_that_are_not_right(served: Served, body: bytes, what: str) -> None:
    answer = served.api.request("POST", "/v1/disks", body)
    assert answer.status == 400
    assert answer.error["what"].startswith(what)


def test_sizes_that_are_not_right(served: Served, added: str) -> None:
    for body, status, where in (
        ({"size": 0}, 400, "size"),
        ({"size": "1G"}, 400, "size"),
        ({"sice": 1}, 400, ""),
        ({"size": 1 << 70}, 400, "size"),
        ({"size": 512}, 409, "a"),
    ):
        answer = served.api.request("POST", "/v1/disks/a/resize", body)
        assert (answer.status, answer.error["where"]) == (status, where), answer.data


def test_limits(served: Served, added: str) -> None:
    api, stream = served.api, served.api.events()
    assert (api.disk("a")["limits"], api.disk("a")["throttled_seconds"]) == ({}, 0)
    shown = api.patch("/v1/disks/a", {"limits": {"total-iops-sec": 1, "read-bytes-sec": "1M"}})
    assert shown["limits"] == {"total-iops-sec": 1, "read-bytes-sec": MIB}
    with served.attach("a") as driver, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [driver.read(0, 512) for _ in range(100)])
        assert eventually(lambda: api.disk("a")["throttled_seconds"] > 0)
        changed = {"total-iops-sec": 100_000, "total-iops-sec-max": 200_000, "read-bytes-sec": None}
        api.patch("/v1/disks/a", {"limits": changed})
        assert len(reading.result(SOON)) == 100
    present = {"total-iops-sec": 100_000, "total-iops-sec-max": 200_000}
    assert api.disk("a")["limits"] == present
    assert (
        "limits = { total-iops-sec = 100000, total-iops-sec-max = 200000 }"
        in api.request("GET", "/v1/config").data.decode()
    )
    changes = [data["fields"]["limits"] for _, kind, data in itertools.islice(stream, 4) if kind == "limits-changed"]
    assert changes[-1] == present
    assert api.patch("/v1/disks/a", {"limits": {"total-iops-sec": 0}})["limits"] == {}


def test_a_disk_that_is_added_with_limits(served: Served) -> None:
    body = described(served.folder, "l", limits={"total-iops-sec": 5, "group-name": "g", "weight": 2})
    assert served.api.post("/v1/disks", body, status=201)["limits"] == body["limits"]
    served.api.delete("/v1/disks/l")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"limits": {"total-iops": 5}}, 'unknown key "total-iops"; did you mean "total-iops-sec"?'),
        ({"limits": {"total-iops-sec": 5, "read-iops-sec": 5}}, "total-iops-sec and read-iops-sec exclude each other"),
        ({"limits": {"total-iops-sec": -5}}, "total-iops-sec: -5 is not a whole number"),
        ({"limits": {"total-iops-sec": [5]}}, "Expected `int | str | null`, got `array`"),
        ({"limit": {}}, "Object"),
        ({}, "Object missing required field `limits`"),
    ],
)
def test_limits_that_are_not_right(served: Served, body: object, what: str) -> None:
    answer = served.api.request("PATCH", "/v1/disks/first", body)
    assert answer.status == 400
    assert answer.error["what"].startswith(what)
    assert served.api.disk("first")["limits"] == {}


def test_paths_and_methods_that_do_not_exist(served: Served) -> None:
    api = served.api
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/disks/", 404),
        ("GET", "/v1/disks/%2e%2e", 404),
        ("GET", "/v1/disks/a%2fb/pause", 404),
        ("GET", "/v1/disks/none", 404),
        ("PUT", "/v1/disks", 405),
        ("GET", "/v1/disks/first/pause", 405),
        ("TRACE", "/v1/disks", 405),
    ):
        answer = api.request(method, path)
        assert (answer.status, bool(answer.error["right"])) == (status, True), (path, answer.data)
    assert api.request("PUT", "/v1/disks").headers["allow"] == "GET, POST"
    answer = api.request("DELETE", "/v1/disks/first?detach=yes")
    assert (answer.status, answer.error["where"], answer.error["right"]) == (400, "detach", "true, false")


def test_head(served: Served) -> None:
    connection = UnixConnection(served.folder / "api.sock")
    connection.request("HEAD", "/v1/disks")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_one_connection_for_many_requests(served: Served) -> None:
    connection = UnixConnection(served.folder / "api.sock")
    for _ in range(20):
        connection.request("GET", "/v1/disks/first")
        assert connection.getresponse().read().startswith(b'{"name":"first"')
    connection.close()


def test_an_internal_error_is_an_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Server, "find", lambda *_: 1 // 0)
    answer = served.api.request("GET", "/v1/disks/first")
    assert (answer.status, answer.error["what"]) == (500, "internal error")
    assert "GET /v1/disks/{name}: internal error; please report it" in caplog.text


# What runs


def test_io_threads(served: Served, added: str) -> None:
    first, second = served.api.get("/v1/io-threads")["io_threads"]
    assert (first["name"], first["disks"], first["queues"]) == ("io0", ["first", "a"], 3)
    # The new disk begins at the thread that has no queue 0 yet.
    assert (second["name"], second["disks"], second["queues"], second["poll_us"]) == ("io1", ["a"], 1, 0)
    assert served.api.disk("a")["io_threads"] == ["io1", "io0"]


def test_the_configuration_describes_what_runs(served: Served, tmp_path: Path) -> None:
    keys = {
        "serial": 'a"b\\c',
        "features": {"packed": False},
        "delay": "read=0.5",
        "socket-mode": "0660",
        "physical-block-size": "4K",
        "direct": False,
        "io-threads": ["io1"],
    }
    served.api.post("/v1/disks", described(served.folder, "full", **keys), status=201)
    zoned = {"zoned": "64K,conventional=2", "features": {}}
    served.api.post("/v1/disks", described(served.folder, "zoned", **zoned), status=201)
    path = tmp_path / "disks.toml"
    path.write_bytes(served.api.request("GET", "/v1/config").data)
    found = read_config(path)
    assert found.disks == [export.config for export in served.server.exports]
    assert list(found.io_threads) == list(served.server.threads.io_threads)
    assert found.api == ApiOptions(served.folder / "api.sock")
    for name in ("full", "zoned"):
        served.api.delete(f"/v1/disks/{name}")


# Events


def test_a_client_that_reconnects_misses_nothing(served: Served, added: str) -> None:
    api = served.api
    stream = api.events()
    api.post("/v1/disks/a/pause")
    last, kind, _ = next(stream)
    assert kind == "paused"
    api.post("/v1/disks/a/resume")
    assert [kind for _, (_, kind, _) in zip(range(1), api.events(last), strict=False)] == ["resumed"]
    # Of a process that was replaced: all that this one has.
    _, kind, data = next(api.events("f00-1"))
    assert (kind, data["disk"]) != ("resumed", "a")


def test_lost_events_are_counted(served: Served) -> None:
    last = f"{served.server.events.process}-{served.server.events.last}"
    for _ in range(KEPT + 7):
        served.server.events.emit("paused", "first")
    assert next(served.api.events(last))[1:] == ("lost", {"lost": 7})


def test_more_streams_than_possible(served: Served) -> None:
    assert eventually(lambda: served.server.events.subscribers == 0)
    streams = [UnixConnection(served.folder / "api.sock") for _ in range(17)]
    statuses = []
    for connection in streams:
        connection.request("GET", "/v1/events")
        statuses.append(connection.getresponse().status)
    assert statuses == [200] * 16 + [503]
    for connection in streams:
        connection.close()

    def again() -> bool:
        connection = UnixConnection(served.folder / "api.sock")
        connection.request("GET", "/v1/events")
        status = connection.getresponse().status
        connection.close()
        return status == 200

    assert eventually(again)


# Under load


def test_everything_beside_a_verified_load(served: Served) -> None:
    api = served.api
    failures: list[BaseException] = []

    def operate(stop: threading.Event, name: str) -> None:
        try:
            while not stop.is_set():
                api.post("/v1/disks", described(served.folder, name), status=201)
                with served.attach(name) as driver:
                    driver.write(0, name.encode() * 512)
                    for operation in ("pause", "resume", "flush", "resize"):
                        api.post(f"/v1/disks/first/{operation}")
                        api.post(f"/v1/disks/{name}/{operation}")
                    assert driver.read(0, 512) == (name.encode() * 512)[:512]
                api.delete(f"/v1/disks/{name}?detach=true")
        except BaseException as error:
            failures.append(error)

    stop = threading.Event()
    threads = [threading.Thread(target=operate, args=[stop, name]) for name in ("u", "v")]
    with served.attach("first", 2) as driver, contextlib.ExitStack() as stack:
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)
        result = run_load(driver, Load(depth=16, read_percent=50, seconds=3, verify=True))
    assert (result.errors, result.mismatches, failures) == (0, 0, [])
    assert [disk["name"] for disk in api.get("/v1/disks")["disks"]] == ["first"]


# Start and end


def test_a_socket_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "api.sock").touch()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ListenError, match="exists and is not a socket"):
        serve_all([config(tmp_path, "a")], [IoThread("io0")], interface=HttpApi(ApiOptions(tmp_path / "api.sock")))
    assert [path.name for path in tmp_path.iterdir()] == ["api.sock"]
    assert eventually(lambda: (threading.active_count(), len(os.listdir("/proc/self/fd"))) <= before)


def test_the_end_does_not_wait_for_clients(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with serve_all([], [IoThread("io0")], interface=HttpApi(ApiOptions(tmp_path / "api.sock"))) as server:
            api = Api(tmp_path / "api.sock")
            stream = api.events()
            idle = stack.enter_context(contextlib.closing(UnixConnection(tmp_path / "api.sock")))
            idle.connect()
            assert not server.wait(0)
        assert list(stream) == []
    assert list(tmp_path.iterdir()) == []


def test_meanings_of_options_have_no_links() -> None:
    found = [meaning(option) for option in declared(DiskConfig).values() if option.doc]
    assert any(" docs/features.md lists their names" in text for text in found)
    assert not any("](" in text for text in found)
