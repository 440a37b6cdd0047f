"""Recordings over the API: each operation on a disk that a guest uses, and what cannot be done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringplane.api.http import HttpApi
from ringplane.control.start import serve_all
from ringplane.options.api_options import ApiOptions
from ringplane.options.thread_options import IoThread
from ringplane.recordings import entries
from ringplane.recordings.reader import open_recording

from .test_api import Served, config, described

RECORDING = "/v1/disks/a/recording"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "b.img").write_bytes(bytes(1 << 20))
    disks = [config(tmp_path, "a"), config(tmp_path, "b", create=None, read_only=True)]
    with serve_all(disks, [IoThread("io0")], interface=HttpApi(ApiOptions(tmp_path / "api.sock"))) as server:
        yield Served(tmp_path, server)


def refused(served: Served, method: str, path: str, body: object, status: int) -> str:
    """Where something is wrong, what, and what would be right."""
    before = sorted(served.folder.iterdir())
    answer = served.api.request(method, path, body)
    assert answer.status == status, answer.data
    assert sorted(served.folder.iterdir()) == before
    error = answer.error
    assert "\n" not in "".join(error.values())
    return f"{error['where']}: {error['what']}; {error['right']}"


def test_a_recording_from_the_beginning_to_the_end(served: Served) -> None:
    """Each answer comes when it is in force."""
    api, path, stream = served.api, served.folder / "a.rec", served.api.events()
    with served.attach("a") as driver:
        driver.write(0, b"0" * 512)
        begun = api.post(RECORDING, {"file": str(path)})
        assert (begun["file"], begun["entries"], begun["failed"]) == (str(path), 0, None)
        driver.write(0, b"1" * 512)
        assert api.request("POST", f"{RECORDING}/marks", {"text": "here \N{SNOWMAN}"}).status == 204
        driver.write(512, f"{begun['token']}there\n".encode().ljust(512, b"!"))
        driver.flush()
        assert api.get(RECORDING)["entries"] == 5
        assert api.request("DELETE", RECORDING).json == begun | {"entries": 5}
        driver.write(0, b"2" * 512)
    recording = open_recording(path)
    assert (recording.complete, recording.header.token, recording.header.disk) == (True, begun["token"], "a")
    kinds = [entry.kind for entry in recording]
    assert kinds == [entries.WRITE, entries.MARK, entries.WRITE, entries.MARK, entries.FLUSH]
    assert (recording[0].data[0], recording[1].text, recording[3].text) == (ord("1"), "here \N{SNOWMAN}", "there")
    kinds_of_events = (kind for _, kind, data in stream if data["disk"] == "a")
    assert "recording-started" in itertools.takewhile(lambda kind: kind != "detached", kinds_of_events)


def test_one_recording_after_the_other(served: Served) -> None:
    """The same request each time: the name of the file has the moment."""
    wanted = {"file": str(served.folder / "{name}-{time}.rec")}
    files = []
    for _ in range(3):
        files.append(served.api.post(RECORDING, wanted)["file"])
        assert served.api.get(RECORDING)["file"] == files[-1]
        assert served.api.request("DELETE", RECORDING).status == 200
    assert sorted(map(str, served.folder.glob("a-*Z.rec"))) == files
    assert all(open_recording(file).complete for file in files)


def test_a_disk_that_is_added_is_recorded(served: Served) -> None:
    path = served.folder / "c.rec"
    served.api.post("/v1/disks", described(served.folder, "c", record=str(path)), status=201)
    assert served.api.get("/v1/disks/c/recording")["file"] == str(path)
    served.api.delete("/v1/disks/c")
    assert open_recording(path).complete


FILE = {"file": "FOLDER/x.rec"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", RECORDING, {"file": "x.rec"}, 400, "file: 'x.rec' is not an absolute path; an absolute path"),
        ("POST", RECORDING, {"file": "FOLDER/none/x.rec"}, 409, "a: FOLDER/none/x.rec: No such file or directory"),
        ("POST", RECORDING, {"file": "FOLDER/b.img"}, 409, "a: FOLDER/b.img: exists already, and no recording is"),
        ("POST", RECORDING, {"file": "FOLDER/{pid}"}, 400, "file: file: {pid} is unknown; {name} and {time} are"),
        ("POST", RECORDING, {}, 400, ": Object missing required field `file`"),
        ("POST", RECORDING, FILE | {"text": ""}, 400, ": Object contains unknown field `text`"),
        ("POST", "/v1/disks/b/recording", FILE, 409, "file: record and read_only exclude each other"),
        ("POST", "/v1/disks/none/recording", FILE, 404, "none: no disk has this name"),
        ("GET", RECORDING, None, 409, ": the disk is not recorded"),
        ("DELETE", RECORDING, None, 409, ": the disk is not recorded"),
        ("POST", f"{RECORDING}/marks", {"text": "here"}, 409, ": the disk is not recorded"),
        ("POST", f"{RECORDING}/marks", {"text": "x" * 1001}, 400, "text: Expected `str` of length <= 1000"),
    ],
)
def test_what_cannot_be_done(
    served: Served, method: str, path: str, body: dict[str, Any] | None, status: int, error: str
) -> None:
    folder = str(served.folder)
    body = body and {name: value.replace("FOLDER", folder) for name, value in body.items()}
    found = refused(served, method, path, body, status)
    assert found.startswith(error.replace("FOLDER", folder)), found


def test_a_disk_has_one_recording_at_a_time(served: Served) -> None:
    served.api.post(RECORDING, {"file": str(served.folder / "1.rec")})
    found = refused(served, "POST", RECORDING, {"file": str(served.folder / "2.rec")}, 409)
    assert found.startswith(f"a: it is recorded already, to {served.folder}/1.rec; end that recording before"), found
    found = refused(served, "POST", "/v1/disks/a/resize", {"size": 64 << 20}, 409)
    assert "a disk that is recorded cannot get another size" in found
