"""RBD disks of a process that is confined, operated over its API: added, resized, paused, removed, kept."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ceph import CephCluster
from program.served import ServedApi, needs_all, starter
from unit.rig import eventually, pattern

from .serving import PATIENCE

MIB = 1 << 20
Serve = Callable[..., ServedApi]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    yield from starter(ServedApi, tmp_path)


@pytest.fixture
def image(cluster: CephCluster) -> str:
    return cluster.new_image()


def arguments(cluster: CephCluster, *more: str) -> tuple[str, ...]:
    """Of a process to which images of this cluster can be added."""
    folders = ("--api-socket", "api.sock", "--allow-folder", ".", "--io-threads", "2")
    return (*folders, "--allow-server", f"rbd::conf={cluster.conf}", *more)


def body(image: object, folder: Path, **more: Any) -> dict[str, Any]:
    return {"image": image, "socket-path": str(folder / "r.sock"), "name": "r", "num-queues": 2, **more}


@needs_all
def test_a_disk_comes_and_goes(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """Any call that the filter does not allow ends the process."""
    served = serve(*arguments(cluster), strict=True)
    for size in (64 * MIB, 96 * MIB):
        disk = served.api.post("/v1/disks", body(cluster.address(image), tmp_path), status=201)
        assert (disk["image"], disk["size"]) == (f"rbd:{image}", size)
        with served.attach("r.sock") as driver:
            driver.write(4096, pattern(MIB))
            driver.flush()
            driver.discard(32 * MIB, 4 * MIB)
            served.api.post("/v1/disks/r/pause")
            served.api.post("/v1/disks/r/flush")
            cluster.rbd("snap", "create", f"{image}@at-{size}")
            served.api.post("/v1/disks/r/resume")
            resized = served.api.post("/v1/disks/r/resize", {"size": size + 32 * MIB})
            assert resized == {"before": size, "size": size + 32 * MIB}
            assert driver.read(4096, MIB) == pattern(MIB)
        assert eventually(lambda: served.api.disk("r")["state"] == "listening")
        served.api.delete("/v1/disks/r")
    # A snapshot, an image in a table, and one that is created.
    snapshot = served.api.post("/v1/disks", body(cluster.address(f"{image}@at-{64 * MIB}"), tmp_path), status=201)
    assert (snapshot["size"], snapshot["read_only"]) == (64 * MIB, True)
    served.api.delete("/v1/disks/r")
    pool, name = image.split("/")
    table = {"pool": pool, "image": f"{name}-new", "conf": str(cluster.conf)}
    new = {**body(None, tmp_path, create="8M"), "rbd": table}
    del new["image"]
    assert served.api.post("/v1/disks", new, status=201)["size"] == 8 * MIB
    with served.attach("r.sock") as driver:
        driver.write(0, pattern(512))
    assert f"{name}-new" in cluster.rbd("ls")
    served.end()


@needs_all
def test_what_runs_outlasts_the_process(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """An upgrade, and a kill; and the written configuration makes the same disk."""
    (tmp_path / "state").mkdir()
    served = serve(*arguments(cluster, "--state", "state/disks"), strict=True)
    served.api.post("/v1/disks", body(cluster.address(image), tmp_path), status=201)
    [table] = tomllib.loads(served.api.request("GET", "/v1/config").data.decode())["disk"]
    with served.attach("r.sock") as driver:
        driver.write(512, pattern(512, 4))
        new = serve(*arguments(cluster, "--state", "state/disks", "--upgrade"), strict=True)
        assert served.process.wait(PATIENCE) == 0, served.errors.read_text()
        assert driver.read(512, 512) == pattern(512, 4)
        new.process.kill()
        new.process.wait()
        newest = serve(*arguments(cluster, "--state", "state/disks"), strict=True)
        driver.reconnect()
        assert driver.read(512, 512) == pattern(512, 4)
    assert newest.api.disk("r")["image"] == f"rbd:{image}"
    assert eventually(lambda: newest.api.disk("r")["state"] == "listening")
    newest.api.delete("/v1/disks/r")
    newest.api.post("/v1/disks", table, status=201)
    newest.end()


@needs_all
def test_a_cluster_that_was_not_named(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """The line has what to do now, which was tried. A disk of the cluster from the start is enough too."""
    request = body(cluster.address(image), tmp_path)
    served = serve("--api-socket", "api.sock", "--allow-folder", ".")
    right = served.api.request("POST", "/v1/disks", request).error["right"]
    served.end()
    option, address = right.removeprefix("start ringplane with ").partition(", or with")[0].split(" ", 1)
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", option, address.strip("'"))
    served.api.post("/v1/disks", request, status=201)
    wrong = {**request, "name": "s", "socket-path": str(tmp_path / "s.sock")}
    wrong["image"] = cluster.address(cluster.new_image(), ":id=other")
    assert "this process may not connect" in served.api.request("POST", "/v1/disks", wrong).error["what"]
    served.end()
    first = ("--image", cluster.address(cluster.new_image()), "--socket-path", "first.sock")
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", *first)
    served.api.post("/v1/disks", request, status=201)
    served.end()


@needs_all
def test_a_buffered_disk(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """Its server is named, so the line has something else to do now, and both ways of it were tried."""
    request = body(cluster.address(image), tmp_path, direct=False)
    served = serve(*arguments(cluster))
    error = served.api.request("POST", "/v1/disks", request).error
    assert "a buffered disk needs a connection of its own" in error["what"]
    assert error["right"] == "leave out buffered (direct = false), or start ringplane with this disk"
    served.api.post("/v1/disks", {**request, "direct": True}, status=201)
    served.end()
    first = ("--image", cluster.address(cluster.new_image()), "--buffered", "--socket-path", "first.sock")
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", *first)
    served.api.post("/v1/disks", request, status=201)
    served.end()


def test_the_key_is_shown_nowhere(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """Nor in the state for others. It is in the address of the disk, and the user has no other one."""
    (tmp_path / "state").mkdir()
    key = cluster.ceph("auth", "get-or-create-key", "client.hidden", "mon", "profile rbd", "osd", "profile rbd").strip()
    address = cluster.address(image, f":id=hidden:keyring=/dev/null:key={key}")
    disk = ("--image", address, "--socket-path", "first.sock")
    common = ("--api-socket", "api.sock", "--state", "state/disks", "--log-level", "debug")
    served = serve(*common, *disk, "--no-sandbox")
    other = cluster.address(cluster.new_image(), f":id=hidden:keyring=/dev/null:key={key}")
    events = served.api.events()
    added = served.api.post("/v1/disks", body(other, tmp_path), status=201)
    seen = [json.dumps(added), json.dumps(next(events))]
    wrong = {**body(other, tmp_path), "name": "again"}
    for request in (wrong, {**wrong, "image": f"{other}:colour=red"}, {**wrong, "image": f"{other}x"}):
        seen.append(json.dumps(served.api.request("POST", "/v1/disks", request).error))
    for path in ("/v1/disks", "/v1/disks/r", "/v1/config", "/v1/statistics", "/metrics", "/v1/io-threads"):
        seen.append(served.api.request("GET", path).data.decode())
    seen.append(Path(f"/proc/{served.process.pid}/cmdline").read_bytes().decode())
    assert key in (tmp_path / "state/disks").read_text()
    for file in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # Restored, and taken over.
    served.process.kill()
    served.process.wait()
    served = serve(*common, *disk, "--no-sandbox")
    new = serve(*common, *disk, "--no-sandbox", "--upgrade")
    assert served.process.wait(PATIENCE) == 0, served.errors.read_text()
    assert [disk["name"] for disk in new.api.get("/v1/disks")["disks"]][1:] == ["r"]
    seen += [new.end(), *iter(new.next_line, "")]
    assert not [text for text in seen if key in text]


@needs_all
def test_an_encrypted_image_is_not_added(serve: Serve, cluster: CephCluster, image: str, tmp_path: Path) -> None:
    """librbd could not open what it needs for it; nothing of that is tried."""
    served = serve(*arguments(cluster), strict=True)
    address = cluster.address(image, f":encrypt-format=luks2:encrypt-key-file={tmp_path}/key")
    answer = served.api.request("POST", "/v1/disks", body(address, tmp_path))
    assert (answer.status, answer.error["what"]) == (
        409,
        f"rbd:{image}: librbd opens files to decrypt it, and this process may open none; start ringplane with "
        "this disk, or with --no-sandbox",
    )
    served.end()
