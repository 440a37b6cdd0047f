"""`ringplane serve --record`, `export` and `replay`, and the programs that read what is exported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ringplane.driver import Driver
from ringplane.driver.load import Load, run_load
from ringplane.recordings import entries
from ringplane.recordings.entries import Header
from ringplane.recordings.reader import Recording, open_recording
from ringplane.recordings.writer import RecordingWriter
from unit.rig import eventually

from .served import DISK, MEMORY_SIZE, SOON, ServedApi, body, disk_table, needs_all, refused

Serve = Callable[..., ServedApi]
API = ("--api-socket", "api.sock")
RECORD = ("--record", "a.rec")
SIZE = 4 << 20


def ringplane(folder: Path, *arguments: object, status: int = 0) -> str:
    """The last line that the command prints; it ends with this status."""
    command = [sys.executable, "-m", "ringplane", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return (done.stderr if status else done.stdout).strip().splitlines()[-1]


def need(program: str, package: str) -> str:
    """The path of a program; in CI it is there."""
    path = shutil.which(program)
    if path is None:
        assert os.environ.get("CI") != "true", "CI must not skip this test"
        pytest.skip(f"{program} is missing (Debian: {package})")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recording `a.rec` of a load, and the image `a.img` after it."""
    folder = tmp_path_factory.mktemp("recorded")
    served = ServedApi(folder, ["-m", "ringplane", "serve"], *DISK, *RECORD, *API, "--num-queues", "2")
    try:
        with Driver(folder / "a.sock", queues=2, memory_size=MEMORY_SIZE, timeout=SOON) as driver:
            run_load(driver, Load(depth=4, queues=2, read_percent=20, flush_every=10, requests=300))
            driver.write_zeroes(8192, 4096)
            driver.discard(1 << 20, 65536)
            driver.write(0, open_recording(folder / "a.rec").header.token.encode().ljust(512, b"!"))
        assert "recording to a.rec; a block that begins with RINGPLANE-MARK-" in served.end()
    finally:
        served.process.kill()
        served.process.wait()
    return folder


@pytest.fixture
def recording(folder: Path) -> Recording:
    return open_recording(folder / "a.rec")


@needs_all
def test_a_confined_process_records(serve: Serve, tmp_path: Path) -> None:
    """With a filter that ends the process at any call that is not allowed; also a disk that is added."""
    served = serve(*DISK, *RECORD, *API, "--allow-folder", ".", strict=True)
    added = body(tmp_path, "b", record=str(tmp_path / "b.rec"))
    assert served.api.post("/v1/disks", added, status=201)["name"] == "b"
    again = served.api.request("POST", "/v1/disks", body(tmp_path, "c", record=str(tmp_path / "b.rec")))
    assert again.status == 409
    assert "exists already, and no recording is overwritten" in again.error["what"]
    for name in ("a", "b"):
        with served.attach(f"{name}.sock") as driver:
            for place in range(20):
                driver.write(4096 * place, os.urandom(4096))
            driver.flush()
    assert eventually(lambda: served.api.disk("b")["state"] == "listening")
    served.api.delete("/v1/disks/b")
    assert open_recording(tmp_path / "b.rec").complete
    served.end()
    for name in ("a", "b"):
        recording = open_recording(tmp_path / f"{name}.rec")
        assert (recording.complete, len(recording), recording.header.disk) == (True, 21, name)
        (tmp_path / "copy.img").write_bytes(bytes(SIZE))
        assert "verified" in ringplane(tmp_path, "replay", f"{name}.rec", "copy.img", "--fast")
        assert (tmp_path / "copy.img").read_bytes() == (tmp_path / f"{name}.img").read_bytes()


def test_a_confined_process_begins_a_recording(serve: Serve, tmp_path: Path) -> None:
    """It was started without one. Over the API and by `ringplane ctl`, and only below the folders that were named."""
    (tmp_path / "here").mkdir()
    served = serve(*DISK, *API, "--allow-folder", "here", strict=True)
    of_disk = "/v1/disks/a/recording"
    assert served.api.request("POST", of_disk, {"file": str(tmp_path / "a.rec")}).status == 409
    assert not (tmp_path / "a.rec").exists()
    with served.attach("a.sock") as driver:
        token = served.api.post(of_disk, {"file": str(tmp_path / "here" / "1.rec")})["token"]
        driver.write(0, b"a" * 512)
        assert served.api.request("POST", f"{of_disk}/marks", {"text": "promise"}).status == 204
        assert served.api.get(of_disk)["entries"] == 2
        assert served.api.request("DELETE", of_disk).json["failed"] is None
        assert served.api.request("GET", of_disk).status == 409
        ctl = ("ctl", "--api-socket", "api.sock")
        assert "a block that begins with" in ringplane(tmp_path, *ctl, "record", "a", "here/2.rec")
        driver.write(512, b"b" * 512)
        assert ringplane(tmp_path, *ctl, "mark", "a", "another") == "a: marked"
        assert "has 2 requests and marks" in ringplane(tmp_path, *ctl, "end-recording", "a")
    served.end()
    for number, byte, text in ((1, b"a", "promise"), (2, b"b", "another")):
        recording = open_recording(tmp_path / "here" / f"{number}.rec")
        assert recording.complete
        written, mark = recording
        assert (bytes(written.data), mark.text) == (byte * 512, text)
    assert open_recording(tmp_path / "here" / "1.rec").header.token == token


def test_a_killed_process_leaves_what_it_has_recorded(serve: Serve, tmp_path: Path) -> None:
    served = serve(*DISK, *RECORD, *API)
    with served.attach() as driver:
        for place in range(50):
            driver.write(4096 * place, bytes([place]) * 4096)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(SOON)
    recording = open_recording(tmp_path / "a.rec")
    assert [bytes(entry.data[:1]) for entry in recording] == [bytes([place]) for place in range(len(recording))]
    assert "cut off" in recording.warning
    (tmp_path / "copy.img").write_bytes(bytes(SIZE))
    ringplane(tmp_path, "replay", "a.rec", "copy.img", "--fast")


def test_an_upgrade_ends_a_recording(serve: Serve, tmp_path: Path) -> None:
    """The next process can begin another one, and has other layers."""
    old = serve(*DISK, *RECORD, *API)
    with old.attach() as driver:
        driver.write(0, b"a" * 4096)
        new = serve(*DISK, *API, "--record", "b.rec", "--delay", "0.1", "--upgrade")
        assert old.process.wait(SOON) == 0, old.errors.read_text()
        driver.write(0, b"b" * 4096)
    new.end()
    for name, byte in (("a", b"a"), ("b", b"b")):
        recording = open_recording(tmp_path / f"{name}.rec")
        assert [bytes(entry.data[:1]) for entry in recording] == [byte]
        assert recording.complete


def test_a_configuration_records_at_each_start(serve: Serve, tmp_path: Path) -> None:
    """Also after an upgrade. Without {time} the second start fails, and says so."""
    (tmp_path / "disks.toml").write_text(disk_table("a") + 'record = "{name}-{time}.rec"\n')
    for _ in range(2):
        served = serve("--config", "disks.toml", *API)
        with served.attach() as driver:
            driver.write(0, b"a" * 4096)
            new = serve("--config", "disks.toml", *API, "--upgrade")
            assert served.process.wait(SOON) == 0, served.errors.read_text()
            driver.write(0, b"b" * 4096)
        new.end()
    recordings = [open_recording(path) for path in sorted(tmp_path.glob("a-*Z.rec"))]
    assert [bytes(entry.data[:1]) for each in recordings for entry in each] == [b"a", b"b"] * 2
    assert all(each.complete and len(each) == 1 for each in recordings)
    (tmp_path / "a.rec").touch()
    assert "a.rec: exists already" in (line := refused(*DISK, "--record", tmp_path / "a.rec"))
    assert line.endswith("with {time} in its name each start makes a new one")


def test_a_recording_is_played_on_a_back_end(serve: Serve, tmp_path: Path, folder: Path) -> None:
    served = serve(*DISK, *API)
    assert "verified" in ringplane(tmp_path, "replay", folder / "a.rec", "a.sock", "--fast")
    served.end()
    assert (tmp_path / "a.img").read_bytes() == (folder / "a.img").read_bytes()


def play_with_fio(folder: Path, log: str) -> tuple[int, int]:
    """How many writes and flushes it did; it cannot discard a range of a file."""
    (folder / "copy.img").write_bytes(bytes(SIZE))
    command = [
        *(need("fio", "fio"), "--name=replay", f"--read_iolog={log}", "--replay_no_stall=1", "--replay_skip=trim"),
        *("--replay_redirect=copy.img", "--output-format=json", "--ioengine=psync"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job["write"]["total_ios"], job["sync"]["lat_ns"]["N"]


def writes_of(recording: Recording) -> int:
    return sum(entry.kind in (entries.WRITE, entries.ZERO) for entry in recording)


def test_fio_plays_an_exported_recording(tmp_path: Path, folder: Path, recording: Recording) -> None:
    ringplane(folder, "export", "fio", "a.rec", tmp_path / "log")
    flushes = sum(entry.kind == entries.FLUSH for entry in recording)
    assert play_with_fio(tmp_path, "log") == (writes_of(recording), flushes)


def test_fio_waits_as_long_as_the_guest_did(tmp_path: Path) -> None:
    """It does not wait after a request at the time 0."""
    times = (0, 300_000_000)
    with (tmp_path / "a.rec").open("wb") as file:
        writer = RecordingWriter(file, Header(SIZE))
        for time in times:
            writer.add(entries.WRITE, data=bytes(4096), begin_ns=1_000_000_000 + time, end_ns=1_000_000_000 + time)
        writer.end()
    ringplane(tmp_path, "export", "fio", "a.rec", "log")
    (tmp_path / "copy.img").write_bytes(bytes(SIZE))
    command = [
        need("fio", "fio"),
        "--name=replay",
        "--read_iolog=log",
        "--replay_redirect=copy.img",
        "--ioengine=psync",
    ]
    done = subprocess.run(
        [*command, "--output-format=json"], cwd=tmp_path, capture_output=True, text=True, timeout=SOON
    )
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert (job["write"]["total_ios"], job["job_runtime"] >= 290) == (2, True), job["job_runtime"]


def test_blkparse_and_fio_read_an_exported_trace(tmp_path: Path, folder: Path, recording: Recording) -> None:
    ringplane(folder, "export", "blktrace", "a.rec", tmp_path / "trace.blktrace.0")
    command = [need("blkparse", "blktrace"), "-i", "trace", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    # device, CPU, number, time, process, action, kind, and for ranges: sector, +, number of sectors
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("120,0")]
    changes = [entry for entry in recording if entry.kind in entries.CHANGES]
    for action in ("Q", "D", "C"):
        found = [words for words in lines if words[5] == action and "F" not in words[6]]
        places = sorted((int(words[7]), int(words[9])) for words in found)
        assert places == sorted((entry.offset // 512, entry.length // 512) for entry in changes)
    assert {words[10] for words in lines if words[5:7] == ["Q", "W"]} <= {"[queue-0]", "[queue-1]"}
    assert [words[7] for words in lines if words[5] == "m"] == ["!" * 127]
    # It counts flushes, which have no range, among the writes.
    assert play_with_fio(tmp_path, "trace.blktrace.0")[0] >= writes_of(recording)


def test_qemu_continues_an_exported_log(tmp_path: Path, folder: Path) -> None:
    """Its driver `blklogwrites` reads logs of the kernel's dm-log-writes, to append to them."""
    ringplane(folder, "export", "dm-log-writes", "a.rec", tmp_path / "log")
    shutil.copy(folder / "a.img", tmp_path / "copy.img")
    before = (tmp_path / "log").read_bytes()
    count = struct.unpack_from("<Q", before, 16)[0]
    options = "driver=blklogwrites,file.filename=copy.img,log.filename=log,log-append=on"
    command = [need("qemu-io", "qemu-utils"), "--image-opts", options, "-c", "write -P 7 4096 512", "-c", "flush"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "log").read_bytes()
    assert struct.unpack_from("<Q", after, 16)[0] == count + 2
    # The write follows what was there: its entry, and its data.
    assert after[512 : len(before)] == before[512:]
    assert struct.unpack_from("<QQQ", after, len(before)) == (8, 1, 0)
    assert after[len(before) + 512 :][:512] == bytes([7]) * 512


def test_sockets_that_a_recording_cannot_be_played_on(serve: Serve, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(SIZE))
    serve("--blk-file", "a.img", "--socket-path", "a.sock", "--read-only", *API)
    for name, words in (
        ("a.sock", "a.sock: the disk is read-only; serve it writable"),
        ("api.sock", "api.sock: this is not the socket of a vhost-user back end, or the back end broke"),
    ):
        assert words in ringplane(tmp_path, "replay", folder / "a.rec", name, status=1)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "small.img").write_bytes(bytes(512))
    (tmp_path / "text").write_text("text")
    record = folder / "a.rec"
    assert "text: this is not a recording" in ringplane(tmp_path, "replay", "text", "small.img", status=1)
    assert "none: No such file" in ringplane(tmp_path, "replay", "none", "small.img", status=1)
    assert "none.img: No such file" in ringplane(tmp_path, "replay", record, "none.img", status=1)
    assert f"had {SIZE}; take a larger one" in ringplane(tmp_path, "replay", record, "small.img", status=1)
    shutil.copy(record, tmp_path / "itself.rec")
    assert "itself.rec: is the recording itself; name the image" in ringplane(
        tmp_path, "replay", "itself.rec", "itself.rec", status=1
    )
    (tmp_path / "itself.rec").unlink()
    assert "text: exists already" in ringplane(tmp_path, "export", "fio", record, "text", status=1)
    assert "none/log: No such file" in ringplane(tmp_path, "export", "fio", record, "none/log", status=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.img", "text"]
    with (tmp_path / "odd.rec").open("wb") as file:
        writer = RecordingWriter(file, Header(SIZE))
        writer.add(entries.WRITE, data=b"odd")
    assert "odd.rec: entry 0 is not whole sectors" in ringplane(
        tmp_path, "export", "dm-log-writes", "odd.rec", "log", status=1
    )
    assert not (tmp_path / "log").exists()
