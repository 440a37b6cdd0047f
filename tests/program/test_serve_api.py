"""`ringplane serve --api-socket`: with and without disks, under confinement, and across a planned restart."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ringplane.cli.check import check
from ringplane.virtio.blk_zones import VIRTIO_BLK_T_ZONE_APPEND, VIRTIO_BLK_T_ZONE_RESET
from unit.policy_texts import own_policy
from unit.rig import eventually, loop_device

from .served import DISK, SOON, ServedApi, needs_all, refused

Serve = Callable[..., ServedApi]


def operate(served: ServedApi) -> None:
    """Everything that can be done with a disk, with a front end and without."""
    api = served.api
    stream = api.events()
    for _ in range(2):
        for operation in ("pause", "resume", "flush", "resize"):
            api.post(f"/v1/disks/a/{operation}")
    with served.attach() as driver:
        driver.write(0, b"a" * 512)
        for operation in ("pause", "resume", "flush"):
            api.post(f"/v1/disks/a/{operation}")
        assert api.post("/v1/disks/a/resize", {"size": 8 << 20})["size"] == 8 << 20
        assert driver.read(0, 512) == b"a" * 512
    assert eventually(lambda: api.disk("a")["state"] == "listening")
    for path in ("/v1/disks", "/v1/io-threads", "/v1/statistics"):
        api.get(path)
    assert b"ringplane_disk_attached" in api.request("GET", "/metrics").data
    assert b"[[disk]]" in api.request("GET", "/v1/config").data
    assert api.request("POST", "/v1/disks", {"image": 7}).status == 400
    assert 'did you mean "image"?' in api.request("POST", "/v1/disks", {"imag": "/a"}).error["what"]
    assert api.request("PUT", "/none").status == 404
    assert next(stream)[1] == "paused"


@needs_all
def test_one_disk_with_a_filter_that_ends_the_process(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, "--api-socket", "api.sock", strict=True)
    operate(served)
    served.api.delete("/v1/disks/a")
    assert served.api.get("/v1/disks") == {"disks": [], "not_served": []}
    assert "Traceback" not in served.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "errors"]


@needs_all
def test_a_confined_process_says_why_it_adds_no_disk(serve: Serve, tmp_path: Path) -> None:
    served = serve("--api-socket", "api.sock", strict=True)
    assert served.api.get("/v1/disks") == {"disks": [], "not_served": []}
    body = {"image": str(tmp_path / "a.img"), "socket-path": str(tmp_path / "a.sock"), "create": "4M"}
    answer = served.api.request("POST", "/v1/disks", body)
    assert (answer.status, answer.error["where"]) == (409, "image")
    assert "--allow-folder" in answer.error["right"]
    assert "stopped by SIGTERM: no disk" in served.end()


@needs_all
def test_disks_are_added_under_confinement(serve: Serve, tmp_path: Path) -> None:
    """With a filter that ends the process at any call that is not allowed."""
    served = serve("--api-socket", "api.sock", "--io-threads", "2", "--allow-folder", ".", strict=True)
    body = {"image": str(tmp_path / "a.img"), "socket-path": str(tmp_path / "a.sock"), "create": "4M"}
    for buffered in (False, True):
        added = served.api.post("/v1/disks", body | {"direct": not buffered, "num-queues": 2}, status=201)
        assert (added["name"], added["size"], added["state"]) == ("a", 4 << 20, "listening")
        operate(served)
        served.api.delete("/v1/disks/a")
        assert not (tmp_path / "a.sock").exists()
        (tmp_path / "a.img").unlink()
    assert "Traceback" not in served.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors"]


@needs_all
def test_policies_under_confinement(serve: Serve, tmp_path: Path) -> None:
    """A policy that was there at the start, switched off, is for any disk, whatever its file is now."""
    own = tmp_path / "own.py"
    own.write_text(own_policy("return fail(EIO) if io.operation == FLUSH else PASS"))
    served = serve(
        *(*DISK, "--api-socket", "api.sock", "--allow-folder", ".", "--policy", "own.py:own,enabled=no"), strict=True
    )
    api = served.api
    b = {"image": str(tmp_path / "b.img"), "socket-path": str(tmp_path / "b.sock"), "create": "4M"}
    api.post("/v1/disks", b, status=201)
    with served.attach() as first, served.attach("b.sock") as second:
        first.flush()
        api.patch("/v1/disks/a/policies/own", {"enabled": True})
        second.flush()
        assert api.post("/v1/disks/b/policies", {"policy": f"{own}:own"}, status=201)["enabled"]
        for driver in (first, second):
            with pytest.raises(OSError, match="flush"):
                driver.flush()
        api.delete("/v1/disks/b/policies/own")
        second.flush()
    c = {"image": str(tmp_path / "c.img"), "socket-path": str(tmp_path / "c.sock"), "create": "4M"}
    api.post("/v1/disks", c | {"policy": [{"policy": f"{own}:own"}]}, status=201)
    with served.attach("c.sock") as driver, pytest.raises(OSError, match="flush"):
        driver.flush()
    assert "Traceback" not in served.end()


@needs_all
def test_a_disk_in_memory_with_limits_is_added_under_confinement(serve: Serve, tmp_path: Path) -> None:
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", "--allow-folder", "/dev/shm", strict=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        body = {
            "image": f"{folder}/a.img",
            "socket-path": str(tmp_path / "a.sock"),
            "create": "4M",
            "limits": {"total-iops-sec": 100_000, "group-name": "g"},
        }
        added = served.api.post("/v1/disks", body, status=201)
        assert added["how"] == "engine memory"
        operate(served)
        assert "Traceback" not in served.end()


@needs_all
@pytest.mark.skipif(os.getuid() != 0, reason="only root can make devices")
def test_a_block_device_is_added_under_confinement(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "storage").write_bytes(bytes(4 << 20))
    with loop_device(tmp_path / "storage") as device:
        served = serve("--api-socket", "api.sock", "--allow-folder", ".", "--allow-folder", "/dev", strict=True)
        body = {"image": str(device), "socket-path": str(tmp_path / "a.sock"), "name": "a"}
        assert served.api.post("/v1/disks", body, status=201)["size"] == 4 << 20
        with served.attach() as driver:
            driver.write(0, b"a" * 4096)
            driver.discard(4096, 4096)
            driver.flush()
            os.truncate(tmp_path / "storage", 8 << 20)
            subprocess.run(["losetup", "--set-capacity", device], check=True)
            assert served.api.post("/v1/disks/a/resize")["size"] == 8 << 20
        with served.attach() as driver:
            driver.write((8 << 20) - 4096, b"b" * 4096)
        answer = served.api.request("POST", "/v1/disks/a/resize", {"size": 16 << 20})
        assert (answer.status, "is a block device; change its size elsewhere" in answer.error["what"]) == (409, True)
        served.end()
        assert device.read_bytes()[-4096:] == b"b" * 4096
        assert device.read_bytes()[:4096] == b"a" * 4096


@needs_all
def test_a_zoned_disk_is_added_under_confinement(serve: Serve, tmp_path: Path) -> None:
    """The file of its write pointers is opened and created by the other process too."""
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", strict=True)
    body = {
        "image": str(tmp_path / "a.img"),
        "socket-path": str(tmp_path / "a.sock"),
        "create": "4M",
        "zoned": "1M,conventional=1",
    }
    for written in range(2):
        served.api.post("/v1/disks", body, status=201)
        with served.attach() as driver:
            appended = driver.request(VIRTIO_BLK_T_ZONE_APPEND, 2048, b"y" * 4096, read=8)
            assert (appended.status, int.from_bytes(appended.data, "little")) == (0, 2048 + 8 * written)
            driver.flush()
            assert driver.request(VIRTIO_BLK_T_ZONE_RESET, 4096).status == 0
        for operation in ("pause", "resume", "flush"):
            served.api.post(f"/v1/disks/a/{operation}")
        assert eventually(lambda: served.api.disk("a")["state"] == "listening")
        served.api.delete("/v1/disks/a")
    plain = {key: value for key, value in body.items() if key != "zoned"}
    assert "this is a zoned disk" in served.api.request("POST", "/v1/disks", plain).error["what"]
    served.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "a.img.zones", "errors"]


@needs_all
@pytest.mark.parametrize("image", ["nbd://localhost/x", "rbd:pool/image"])
def test_an_image_elsewhere_is_not_added_under_confinement(serve: Serve, tmp_path: Path, image: str) -> None:
    """The address is read, which needs a module of its own; but the process may not connect."""
    served = serve("--api-socket", "api.sock", "--allow-folder", ".", strict=True)
    body = {"image": image, "socket-path": str(tmp_path / "a.sock")}
    answer = served.api.request("POST", "/v1/disks", body)
    assert (answer.status, answer.error["where"]) == (409, "image")
    assert "may not connect" in answer.error["what"]
    assert "Traceback" not in served.end()


@needs_all
def test_disks_that_cannot_be_added_under_confinement(serve: Serve, tmp_path: Path) -> None:
    allowed, elsewhere = tmp_path / "allowed", tmp_path / "elsewhere"
    for folder in (allowed, elsewhere):
        folder.mkdir()
        (folder / "image").write_bytes(bytes(1 << 20))
    (allowed / "link").symlink_to(elsewhere / "image")
    (allowed / "used.sock").touch()
    served = serve("--api-socket", "api.sock", "--allow-folder", "allowed", strict=True)
    for image, socket, more, words in (
        ("elsewhere/image", "allowed/s", {}, "it is not below a folder of --allow-folder"),
        ("allowed/../elsewhere/image", "allowed/s", {}, "it is not below a folder of --allow-folder"),
        ("allowed/link", "allowed/s", {}, "there is a symbolic link in its path"),
        ("allowed/none", "allowed/s", {}, "no such file"),
        ("allowed/image", "elsewhere/s", {}, "it is not below a folder of --allow-folder"),
        ("allowed/image", "allowed/used.sock", {}, "exists already"),
        ("allowed/new", "elsewhere/s", {"create": "1M", "zoned": "64K"}, "it is not below a folder of --allow-folder"),
        ("allowed/new", "elsewhere/s", {"create": "1M"}, "it is not below a folder of --allow-folder"),
    ):
        body = {"image": str(tmp_path / image), "socket-path": str(tmp_path / socket), **more}
        answer = served.api.request("POST", "/v1/disks", body)
        assert answer.status == 409, answer.data
        assert words in answer.error["what"]
    assert sorted(path.name for path in allowed.iterdir()) == ["image", "link", "used.sock"]
    served.end()


@needs_all
def test_the_end_of_the_process_that_opens_files(serve: Serve, tmp_path: Path) -> None:
    """Disks are served as before, one line is logged, and the API says why no disk can be added."""
    served = serve(*DISK, "--api-socket", "api.sock", "--allow-folder", ".", strict=True)
    os.kill(served.opener, signal.SIGKILL)
    assert eventually(lambda: "the process that opens files has ended" in served.errors.read_text())
    body = {"image": str(tmp_path / "b.img"), "socket-path": str(tmp_path / "b.sock"), "create": "4M"}
    answer = served.api.request("POST", "/v1/disks", body)
    assert (answer.status, "restart ringplane" in answer.error["what"]) == (503, True)
    operate(served)
    assert served.end().count("the process that opens files has ended") == 1


# In place of waiting for a signal. The file is opened before the sandbox closes.
WRITE_MODULES = """
import sys
from ringplane.cli import foreground, serve
with open(sys.argv.pop(1), "w") as file:
    foreground.attend = lambda *_: print(*sys.modules, file=file)
    serve.serve(standalone_mode=False)
"""


def imported(folder: Path, *arguments: str) -> set[str]:
    """The modules of a process that serves a disk, and has compiled or loaded its code."""
    for _ in range(2):
        command = [sys.executable, "-c", WRITE_MODULES, "modules", *DISK, *arguments]
        subprocess.run(command, cwd=folder, capture_output=True, timeout=SOON, check=True)
    return set((folder / "modules").read_text().split())


def test_nothing_is_imported_that_takes_memory_without_need(tmp_path: Path) -> None:
    """`ssl` and `hashlib` load OpenSSL, and asyncio imports the first one wherever it is."""
    of_the_api = {"uvicorn", "starlette", "msgspec", "anyio", "ringplane.control.trace_recording"}
    others = {
        "ssl",
        "hashlib",
        "difflib",
        "numba",
        "fractions",
        "ringplane.control.taking_over",
        "ringplane.control.state_file",
    }
    found = imported(tmp_path)
    assert "ringplane.control.start" in found
    assert found & (of_the_api | others | {"ringplane.opener.remote_opener"}) == set()
    assert imported(tmp_path, "--api-socket", "api.sock") >= of_the_api


def test_disks_are_added_without_a_sandbox(serve: Serve, tmp_path: Path) -> None:
    served = serve("--no-sandbox", "--api-socket", "api.sock", "--io-threads", "2", "--trace")
    body = {"image": str(tmp_path / "a.img"), "socket-path": str(tmp_path / "a.sock"), "create": "4M"}
    served.api.post("/v1/disks", body, status=201)
    operate(served)
    other = {"name": "b", "image": str(tmp_path / "b.img"), "socket-path": str(tmp_path / "b")}
    served.api.post("/v1/disks", body | other, status=201)
    err = served.end()
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "b.img", "errors"]


def test_a_file_with_an_api(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    config.write_text('[api]\nsocket = "api.sock"\nsocket-mode = "0660"\nallow-folders = [".", "/dev/shm"]\n')
    served = serve("--config", "disks.toml")
    assert stat.S_IMODE((tmp_path / "api.sock").stat().st_mode) == 0o660
    written = served.api.request("GET", "/v1/config").data.decode()
    assert 'socket-mode = "0660"' in written
    assert f'allow-folders = ["{tmp_path}", "/dev/shm"]' in written
    assert f"{config} has a table [api] already" in refused("--config", config, "--api-socket", "x")
    assert "another process is listening there" in CliRunner().invoke(check, [str(config)]).output
    text = config.read_text()
    config.write_text(text.replace("/dev/shm", "none"))
    assert "none: files cannot be opened below this folder" in CliRunner().invoke(check, [str(config)]).output
    config.write_text(text)
    served.end()
    assert CliRunner().invoke(check, [str(config)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-socket-mode", "0600"], "--api-socket-mode is for the socket of --api-socket"),
        (
            ["--api-socket", "x", "--serial", "S", "--record", "r"],
            "--serial, --record: only for a disk that is described",
        ),
        (["--api-socket", "x", "--cpus", "0", "--cpus", "0", "--io-threads", "3"], "--cpus is given 2 times"),
        ([], "or --api-socket PATH to add disks later"),
        (["--allow-folder", "."], "--allow-folder is for the socket of --api-socket"),
        (["--api-socket", "x", "--allow-folder", "none"], "none: files cannot be opened below this folder"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_a_table_that_is_not_right(tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    for text, words in (
        ("[api]\n", "[api]: socket is missing"),
        ("api = 1\n", "api: is not a table"),
        ('[api]\nsocket = "a"\nmode = "0600"\n', '[api]: unknown key "mode"'),
        ('[api]\nsocket = "a"\nsocket-mode = 600\n', "[api]: socket-mode: 600 is not a file mode"),
        ('[api]\nsocket = "a"\nallow-folders = "b"\n', '[api]: allow-folders: "b" is not a list'),
        ('[api]\nsocket = "a"\nallow-folders = ["none"]\n', "none: files cannot be opened below this folder"),
    ):
        config.write_text(text)
        assert words in refused("--config", config)


def test_a_planned_restart_keeps_the_api_and_a_paused_disk(serve: Serve, tmp_path: Path) -> None:
    arguments = (*DISK, "--api-socket", "api.sock")
    old = serve(*arguments)
    with old.attach() as driver:
        driver.write(0, b"a" * 512)
        old.api.post("/v1/disks/a/pause")
        stream = old.api.events()
        new = serve(*arguments, "--upgrade")
        assert old.process.wait(SOON) == 0, old.errors.read_text()
        assert list(stream) == []
        assert new.api.disk("a")["paused"]
        # All events, because nobody knows this one; with those of the old process.
        stream = new.api.events("of-another-process-1")
        assert [next(stream)[1] for _ in range(3)] == ["attached", "paused", "upgraded"]
        new.api.post("/v1/disks/a/resume")
        assert driver.read(0, 512) == b"a" * 512
    new.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.img", "errors"]
