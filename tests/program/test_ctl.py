"""`ringplane ctl`: each command against a real process, each error line, and the shell's completion."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from ringplane.api.schemas import Disk
from ringplane.cli.ctl import ctl as ctl_command
from ringplane.cli.ctl.api_tables import print_disks
from ringplane.cli.ctl.disk_adding import add_disk
from ringplane.cli.serve import serve as serve_command
from ringplane.client.client import Client
from ringplane.client.following import Followed
from ringplane.options.declare import declared
from ringplane.options.disk_config import DiskConfig
from unit.rig import eventually

from .served import DISK, SOON, ServedApi, starter

SIZE = 4 << 20


class Ctl:
    """Runs commands for one socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *arguments: str, status: int = 0) -> str:
        """What a command prints."""
        done = CliRunner().invoke(ctl_command, ["--api-socket", str(self.path), *arguments])
        assert done.exit_code == status, (done.output, done.exception)
        return done.output

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def error(self, *arguments: str, status: int) -> str:
        """The one line that a command prints about its error."""
        (line,) = [line for line in self.run(*arguments, status=status).splitlines() if line.startswith("Error: ")]
        return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    folder = tmp_path_factory.mktemp("ctl")
    starting = starter(ServedApi, folder)
    start = next(starting)
    yield start("--no-sandbox", "--api-socket", str(folder / "api.sock"), "--io-threads", "2")
    next(starting, None)


@pytest.fixture(scope="module")
def ctl(served: ServedApi) -> Ctl:
    return Ctl(served.folder / "api.sock")


@pytest.fixture
def added(served: ServedApi, ctl: Ctl) -> Iterator[str]:
    """The name of a disk that is there for one test."""
    ctl.run("add", *options(served.folder, "a"), "--create", "4M")
    yield "a"
    served.api.request("DELETE", "/v1/disks/a?detach=true")
    (served.folder / "a.img").unlink()


def options(folder: Path, name: str) -> list[str]:
    return ["--blk-file", str(folder / f"{name}.img"), "--socket-path", str(folder / f"{name}.sock")]


def test_the_life_of_a_disk(served: ServedApi, ctl: Ctl) -> None:
    assert ctl.run("list") == "there is no disk; ringplane ctl add adds one\n"
    image, socket_path = served.folder / "life.img", served.folder / "life.sock"
    added = ctl.run(
        "add", *options(served.folder, "life"), "--create", "4M", "--name", "data", "--io-thread", "ringplane-io-1"
    )
    assert added == f"data: added, 4 MiB, listening on {socket_path}\n"
    assert served.api.disk("data")["io_threads"] == ["ringplane-io-1"]
    heading, row = ctl.run("list").splitlines()
    assert heading.split() == ["NAME", "STATE", "SIZE", "IMAGE", "SOCKET"]
    assert row.split() == ["data", "listening", "4", "MiB", str(image), str(socket_path)]
    with served.attach("life.sock") as driver:
        driver.write(0, b"a" * 4096)
        shown = ctl.run("show", "data")
        for pattern in (
            r"^state +attached$", r"^front end +process \d+", r"^size +4 MiB \(4194304 bytes\)$", r"^limits +none$",
            r"^write +1 +0 +4 KiB$", r"^0 +running +0$",
        ):  # fmt: skip
            assert re.search(pattern, shown, re.MULTILINE), shown
        assert ctl.run("resize", "data", "8M") == "data: 4 MiB, now 8 MiB\n"
        assert ctl.run("resize", "data") == "data: still 8 MiB\n"
        assert ctl.run("pause", "data") == "data: paused, no request is in flight\n"
        assert "attached, paused" in ctl.run("list")
        assert ctl.run("resume", "data") == "data: resumed\n"
        assert ctl.run("flush", "data") == "data: flushed\n"
        line = ctl.error("remove", "data", status=1)
        assert line.startswith("data: a front end (process ")
        assert line.endswith(" is attached; detach it, or add --detach")
        assert ctl.run("remove", "data", "--detach") == "data: removed\n"
    assert served.api.get("/v1/disks") == {"disks": [], "not_served": []}
    image.unlink()


def test_limits(served: ServedApi, ctl: Ctl, added: str) -> None:
    assert ctl.run("limit", "a") == "a: none\n"
    both = ["a:", "read-bytes-sec=1048576", "total-iops-sec=20000"]
    assert sorted(ctl.run("limit", "a", "total-iops-sec=20000", "read-bytes-sec=1M").split()) == both
    assert served.api.disk("a")["limits"] == {"total-iops-sec": 20000, "read-bytes-sec": 1 << 20}
    assert ctl.run("limit", "a", "read-bytes-sec=none") == "a: total-iops-sec=20000\n"
    others = ("total-iops-sec=0", "write-iops-sec=5", "write-iops-sec-max=6")
    expected = ["a:", "write-iops-sec-max=6", "write-iops-sec=5"]
    assert sorted(ctl.run("limit", "a", *others).split()) == expected
    assert ctl.json("limit", "a", "none")["limits"] == {}


def test_policies(served: ServedApi, ctl: Ctl, added: str) -> None:
    assert ctl.run("policy", "list", "a") == "the disk has no policy; ringplane ctl policy add adds one\n"
    line = ctl.run("policy", "add", "a", "error,operation=flush,name=faults")
    assert line.startswith("a: faults: added; operation=flush ")
    with served.attach("a.sock") as driver:
        with pytest.raises(OSError, match="flush"):
            driver.flush()
        assert ctl.run("policy", "disable", "a", "faults").startswith("a: faults: switched off; ")
        driver.flush()
        assert ctl.run("policy", "enable", "a", "faults").startswith("a: faults: switched on; ")
        changed = ctl.run("policy", "set", "a", "faults", "operation=write", "where=0-4096")
        assert changed.startswith("a: faults: changed; operation=write where=0-4096 ")
        driver.flush()
        with pytest.raises(OSError, match="writing"):
            driver.write(0, bytes(512))
        heading, row = ctl.run("policy", "list", "a").splitlines()
        assert heading.split() == ["NAME", "STATE", "POLICY", "PARAMETERS", "COUNTERS"]
        assert row.split()[:5] == ["faults", "on", "error", "operation=write", "where=0-4096"]
        assert "failed=2" in row
        ctl.run("policy", "add", "a", "error", "--position", "0")
        assert [each["name"] for each in ctl.json("policy", "list", "a")["policies"]] == ["error", "faults"]
        assert ctl.run("policy", "replace", "a", "error", "hang,operation=write").startswith("a: error: replaced; ")
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(driver.write, 8192, bytes(512))
            assert eventually(lambda: served.api.disk("a")["in_flight"] == 1)
            assert ctl.run("policy", "release", "a", "error").startswith("a: error: what hung continues; ")
            writing.result(SOON)
    assert ctl.run("policy", "remove", "a", "error") == "a: error: removed\n"
    assert ctl.run("policy", "remove", "a", "faults", "--json") == ""
    assert "cannot be read" in ctl.error("policy", "add", "a", "gone.py:x", status=1)
    assert "'x' is not KEY=VALUE" in ctl.error("policy", "set", "a", "faults", "x", status=2)


@pytest.mark.parametrize(
    ("command", "target"),
    [("list", "/v1/disks"), ("io-threads", "/v1/io-threads"), ("show a", "/v1/disks/a"), ("limit a", "/v1/disks/a")],
)
def test_json_is_what_the_api_answers(served: ServedApi, ctl: Ctl, added: str, command: str, target: str) -> None:
    assert ctl.json(*command.split()) == served.api.get(target)


def test_changes_print_what_the_api_answers(ctl: Ctl, added: str) -> None:
    for action, paused in (("pause", True), ("resume", False), ("flush", False)):
        assert ctl.json(action, "a")["paused"] == paused
    assert ctl.json("resize", "a") == {"before": SIZE, "size": SIZE}


def test_recordings(served: ServedApi, ctl: Ctl, added: str) -> None:
    file = served.folder / "a-{time}.rec"
    begun = ctl.json("record", "a", str(file))
    assert re.fullmatch(rf"{served.folder}/a-[0-9T.]+Z\.rec", begun["file"])
    assert ctl.run("mark", "a", "here") == "a: marked\n"
    line = ctl.error("record", "a", str(file), status=1)
    assert line == f"a: it is recorded already, to {begun['file']}; end that recording before"
    assert ctl.json("end-recording", "a") == begun | {"entries": 1}
    for command in (("mark", "a", "here"), ("end-recording", "a")):
        assert ctl.error(*command, status=1).startswith("the disk is not recorded; ")
    line = ctl.error("record", "a", begun["file"], status=1)
    assert line.startswith(f"a: {begun['file']}: exists already, and no recording is overwritten; ")
    assert ctl.run("record", "a", str(file)).startswith(f"a: recording to {served.folder}/a-")
    assert re.fullmatch(r"a: .*/a-.*Z\.rec has 0 requests and marks\n", ctl.run("end-recording", "a"))


def test_io_threads(ctl: Ctl, added: str) -> None:
    heading, *rows = ctl.run("io-threads").splitlines()
    assert heading.split() == ["NAME", "ENGINE", "CPUS", "POLL-US", "QUEUES", "DISKS"]
    assert [row.split()[0] for row in rows] == ["ringplane-io-0", "ringplane-io-1"]
    assert all(row.split()[2:] == ["all", "50", "32", "a"] for row in rows)


def test_config(served: ServedApi, ctl: Ctl, added: str) -> None:
    assert ctl.run("config").encode() == served.api.request("GET", "/v1/config").data
    (disk,) = ctl.json("config")["disk"]
    assert disk["image"] == str(served.folder / "a.img")


def test_names_are_whole_on_a_narrow_terminal(
    served: ServedApi, ctl: Ctl, added: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    disk = msgspec.convert(served.api.disk("a"), Disk)
    print_disks([msgspec.structs.replace(disk, name="a-rather-long-name-of-a-tenant-01", image="/folder" * 10)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert lines[1].split()[:2] == ["a-rather-long-name-of-a-tenant-01", "listening"]
    assert all(len(re.sub(r"\x1b\[\d*m", "", line)) <= 80 for line in lines)


# Adding


def test_add_has_the_options_of_serve_that_a_disk_has() -> None:
    known = {option for parameter in serve_command.params for option in parameter.opts}
    offered = {option for parameter in add_disk.params for option in parameter.opts}
    assert offered - known == {"--file", "--io-thread", "--json"}
    keys = {f"--{option.key}" for option in declared(DiskConfig).values() if option.doc and option.help}
    plural = {"--limits": "--limit", "--features": "--feature"}
    assert {plural.get(key, key) for key in keys} <= offered


def test_options_arrive(served: ServedApi, ctl: Ctl) -> None:
    given = (
        *("--create", "4M", "--serial", "S", "--block-size", "4096", "--num-queues", "3", "--read-only", "--buffered"),
        *("--feature", "packed=off", "--limit", "total-iops-sec=5", "--socket-mode", "0660", "--delay", "5"),
    )
    ctl.run("add", *options(served.folder, "o"), *given)
    shown = served.api.disk("o")
    names = ("serial", "block_size", "queues", "read_only", "limits")
    assert [shown[name] for name in names] == ["S", 4096, 3, True, {"total-iops-sec": 5}]
    (disk,) = ctl.json("config")["disk"]
    assert (disk["features"], disk["direct"], disk["socket-mode"]) == ({"packed": False}, False, "0660")
    assert disk["delay"].startswith("read=5")
    ctl.run("remove", "o")


def test_relative_paths_begin_at_the_folder_of_the_caller(
    served: ServedApi, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served.folder / "inner"
    folder.mkdir()
    monkeypatch.chdir(folder)
    ctl.run("add", "--image", "r.img", "--socket-path", "../r.sock", "--create", "4M")
    shown = served.api.disk("r")
    assert (shown["image"], shown["socket"]) == (str(folder / "r.img"), str(served.folder / "r.sock"))
    ctl.run("remove", "r")


def test_disks_of_a_file(served: ServedApi, ctl: Ctl) -> None:
    folder = served.folder / "file"
    folder.mkdir()
    file = folder / "disks.toml"
    table = '[[disk]]\nimage = "{0}.img"\nsocket-path = "{0}.sock"\ncreate = "4M"\n'
    file.write_text(table.format("x") + table.format("y") + "[disk.limits]\ntotal-iops-sec = 7\n")
    assert [line.partition(":")[0] for line in ctl.run("add", "--file", str(file)).splitlines()] == ["x", "y"]
    assert served.api.disk("x")["image"] == str(folder / "x.img")
    assert served.api.disk("y")["limits"] == {"total-iops-sec": 7}
    line = ctl.error("add", "--file", str(file), status=1)
    assert line.startswith(f"{file}: [[disk]] 1: ")
    for name in "xy":
        assert ctl.run("remove", name, "--json") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[disk", "is not TOML: "),
        ("", "has no disk; a line [[disk]] begins each one"),
        ("[disk]\n", "has no disk; a line [[disk]] begins each one"),
        ('[api]\nsocket = "a"\n', "only tables [[disk]] can be added; leave out api"),
        ('[[disk]]\nimagge = "a"\n', '[[disk]] 1: unknown key "imagge"; did you mean "image"?'),
        (
            '[[disk]]\nsocket-path = "a"\n[disk.nbd]\nserver.host = "h"\n[disk.rbd]\npool = "p"\nimage = "i"\n',
            "[[disk]] 1: [disk.nbd] and [disk.rbd] are both the image of the disk; leave one out",
        ),
    ],
)
def test_files_that_are_not_right(ctl: Ctl, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "disks.toml"
    file.write_text(text)
    assert ctl.error("add", "--file", str(file), status=1).startswith(f"{file}: {words}")


def test_a_file_that_does_not_exist(ctl: Ctl) -> None:
    assert ctl.error("add", "--file", "none.toml", status=1) == "none.toml: cannot be read: No such file or directory"


# Errors


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("show none", 1, "none: no disk has this name; "),
        ("show a/b", 1, "/v1/disks/a/b: there is nothing at this path"),
        ("pause none", 1, "none: no disk has this name; "),
        ("resize a 1M", 1, "a: "),
        ("resize a huge", 2, "'huge' is not a size; examples: 512M, 10G, 4096"),
        ("limit a total-iops=5", 2, 'unknown key "total-iops"; did you mean "total-iops-sec"?'),
        ("limit a fast", 2, "'fast' is not KEY=VALUE; an example: total-iops-sec=20000"),
        ("limit a none total-iops-sec=5", 2, "none removes all limits; give it alone, or KEY=none for one of them"),
        ("limit a total-iops-sec=5 read-iops-sec=5", 1, "total-iops-sec and read-iops-sec exclude each other"),
        ("add --image x", 2, "give the image with --blk-file PATH and the socket with --socket-path PATH"),
        ("add --file x --serial S", 2, "--serial cannot be given beside --file; write it into the file"),
        ("add --image x --socket-path y --num-queues 70", 2, "70 is not in the range"),
        ("add --image x --socket-path y --zoned 64M --share-rw", 2, "--zoned and --share-rw exclude each other"),
        ("add --image /none/x --socket-path y", 1, "/none/x: no such file; --create SIZE"),
        (
            "add --image x --socket-path y --io-thread io7",
            1,
            'io-threads: no I/O thread has the name "io7"',
        ),
        ("add --image x --socket-path y --num-queues 1 --io-thread a --io-thread b", 2, "--io-thread: names 2 threads"),
        ("shw a", 2, "No such command 'shw'"),
        ("wait a gone", 2, "'gone' is not one of 'attached', 'detached'"),
        ("wait a attached --timeout 0.01", 1, "a: was not attached within 0.01 seconds"),
        ("wait none attached", 1, "none: no disk has this name; "),
    ],
)
def test_errors_are_one_line(ctl: Ctl, added: str, arguments: str, status: int, words: str) -> None:
    assert words in ctl.error(*arguments.split(), status=status)


def test_a_socket_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGPLANE_API_SOCKET", raising=False)
    done = CliRunner().invoke(ctl_command, ["list"])
    assert done.exit_code == 2
    assert "Error: give the socket of the API with --api-socket PATH, or in RINGPLANE_API_SOCKET" in done.output


def test_the_socket_can_be_in_the_environment(ctl: Ctl, added: str) -> None:
    done = CliRunner(env={"RINGPLANE_API_SOCKET": str(ctl.path)}).invoke(ctl_command, ["list"])
    assert done.exit_code == 0
    assert "a.img" in done.output


def test_nobody_answers(tmp_path: Path) -> None:
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    file = tmp_path / "file"
    file.touch()
    for path, words in (
        (tmp_path / "none", "no such socket; is ringplane running with this --api-socket?"),
        (dead, "nobody listens there, the process has ended; start ringplane again"),
        (file, "this is not a socket; give the path of --api-socket"),
        (tmp_path / ("long" * 30), "the path of a socket has at most 107 bytes; give a shorter one"),
    ):
        assert Ctl(path).error("list", status=3) == f"{path}: {words}"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "the connection ended without an answer; "),
        (b"ringplane\r\n", "the connection ended without an answer; "),
        (
            b"HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnone",
            "this is not the API of ringplane, it answers",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnone", "the answer is not one of this version's API"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n{", "the connection ended without an answer; "),
    ],
)
def test_somebody_else_answers(tmp_path: Path, answer: bytes, words: str) -> None:
    path = tmp_path / "other.sock"
    with socket.create_server(str(path), family=socket.AF_UNIX) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert Ctl(path).error("list", status=3).startswith(f"{path}: {words}")
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_socket_of_a_disk(served: ServedApi, added: str) -> None:
    line = Ctl(served.folder / "a.sock").error("list", status=3)
    assert "this is the socket of a disk and not that of --api-socket" in line


# Events


class Running:
    """A command that does not end at once."""

    def __init__(self, served: ServedApi, *arguments: str, stderr: int = subprocess.PIPE) -> None:
        path = str(served.folder / "api.sock")
        command = [sys.executable, "-m", "ringplane", "ctl", "--api-socket", path, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, bufsize=0)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def event(self) -> tuple[str, str]:
        """The kind of the next event, and its disk."""
        event = json.loads(self.line())
        assert event.keys() == {"time", "kind", "disk", "fields"}
        return event["kind"], event["disk"]

    def when_following(self, cause: Callable[[], object]) -> None:
        """Cause events until it has printed something: it follows them then."""

        def printed() -> bool:
            cause()
            assert self.process.stdout is not None
            return bool(select.select([self.process.stdout], [], [], 0)[0])

        assert eventually(printed)

    def end(self) -> str:
        """End it; returns what it has printed as errors, unless that went elsewhere."""
        self.process.terminate()
        return (self.process.communicate(timeout=SOON)[1] or b"").decode()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Starts them; those that are left are ended."""
    with contextlib.ExitStack() as stack:

        def run(served: ServedApi, *arguments: str, **options: int) -> Running:
            started = Running(served, *arguments, **options)
            stack.callback(started.end)
            return started

        yield run


def test_events_are_followed_over_an_upgrade_and_a_restart(
    serve: Callable[..., ServedApi], running: Callable[..., Running], tmp_path: Path
) -> None:
    arguments = (*DISK, "--api-socket", str(tmp_path / "api.sock"), "--no-sandbox")
    old = serve(*arguments)
    following = running(old, "events", "--json")
    following.when_following(lambda: old.api.post("/v1/disks/a/resize", {"size": old.api.disk("a")["size"] + 512}))
    new = serve(*arguments, "--upgrade")
    while (event := following.event()) == ("resized", "a"):
        pass
    assert event == ("upgraded", "")
    new.api.post("/v1/disks/a/pause")
    assert following.event() == ("paused", "a")
    new.end()
    again = serve(*arguments)
    again.api.post("/v1/disks/a/pause")
    assert following.event() == ("paused", "a")
    again.end()
    errors = following.end()
    assert set(errors.splitlines()) <= {
        f"{tmp_path / 'api.sock'}: not connected, trying again",
        f"{tmp_path / 'api.sock'}: connected again",
        "interrupted by SIGTERM",
    }


def test_a_client_that_has_seen_no_event_misses_none(serve: Callable[..., ServedApi], tmp_path: Path) -> None:
    arguments = (*DISK, "--api-socket", str(tmp_path / "api.sock"), "--no-sandbox")
    serve(*arguments)
    followed = Followed(Client(tmp_path / "api.sock"))
    followed.connect()
    new = serve(*arguments, "--upgrade")
    new.api.post("/v1/disks/a/pause")
    events = followed.read_on(lost=str)
    assert [next(events).kind for _ in range(2)] == ["upgraded", "paused"]
    followed.close()
    new.end()


def test_events_for_people(served: ServedApi, running: Callable[..., Running], ctl: Ctl, added: str) -> None:
    following, rates = running(served, "events"), itertools.count(20000)
    following.when_following(lambda: ctl.run("limit", "a", f"total-iops-sec={next(rates)}"))
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(time + r" a limits-changed limits={ total-iops-sec = 2\d{4} }\n", following.line())
    ctl.run("limit", "a", "none")
    while "total-iops-sec" in (line := following.line()):
        pass
    assert line.endswith(" a limits-changed limits=none\n")


def test_a_terminal_shows_that_it_is_connected(
    served: ServedApi, running: Callable[..., Running], ctl: Ctl, added: str
) -> None:
    """Whoever has read that misses no event."""
    terminal, other = os.openpty()
    with open(other, "wb"), open(terminal, "rb", buffering=0) as shown:
        following = running(served, "events", stderr=other)
        line = f"{served.folder / 'api.sock'}: connected, waiting for events; Ctrl-C ends it\r\n"
        assert shown.read(len(line)) == line.encode()
        ctl.run("pause", "a")
        assert following.line().endswith(" a paused\n")
        ctl.run("resume", "a")


def test_waiting(served: ServedApi, running: Callable[..., Running], ctl: Ctl, added: str) -> None:
    assert ctl.json("wait", "a", "detached") == served.api.disk("a")
    waiting = running(served, "wait", "a", "attached")
    with served.attach():
        assert waiting.process.wait(SOON) == 0
        ctl.run("wait", "a", "attached")
    ctl.run("wait", "a", "detached")


# Completion


def completed(shell: str, *words: str) -> list[str]:
    """What the shell offers for the last word."""
    program = str(Path(sys.executable).with_name("ringplane"))
    text = " ".join(["ringplane", *words])
    environment = {"_RINGPLANE_COMPLETE": f"{shell}_complete", "COMP_WORDS": text, "COMP_CWORD": str(len(words))}
    if shell == "fish":
        environment["COMP_CWORD"] = words[-1]
    done = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=SOON)
    assert done.stderr == ""
    lines = done.stdout.split("\n")
    if shell == "zsh":
        return [value for kind, value, _ in zip(*[iter(lines)] * 3, strict=False) if kind == "plain"]
    return [line.partition(",")[2].partition("\t")[0] for line in lines if line.startswith("plain")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_names(ctl: Ctl, added: str, shell: str) -> None:
    to = ("ctl", "--api-socket", str(ctl.path))
    assert completed(shell, *to, "show", "") == ["a"]
    assert completed(shell, *to, "limit", "b") == []
    assert completed(shell, *to, "limit", "a", "size") == ["size-iops-sec="]
    assert completed(shell, *to, "add", "--io-thread", "") == ["ringplane-io-0", "ringplane-io-1"]
    ctl.run("policy", "add", "a", "error,name=faults")
    assert completed(shell, *to, "policy", "set", "a", "f") == ["faults"]
    assert completed(shell, *to, "policy", "set", "a", "faults", "op") == ["operation="]
    assert completed(shell, *to, "re") == ["remove", "resize", "resume", "record"]
    assert completed(shell, *to, "remove", "--d") == ["--detach"]


def test_completion_is_silent_when_nobody_answers(tmp_path: Path) -> None:
    for to in (("--api-socket", str(tmp_path / "none")), ()):
        assert completed("bash", "ctl", *to, "show", "") == []


def test_each_command_says_what_its_exit_status_means() -> None:
    commands = dict(ctl_command.commands)
    group = commands.pop("policy")
    assert isinstance(group, click.Group)
    for name, command in {**commands, **group.commands}.items():
        text = " ".join(command.get_help(click.Context(command)).split())
        assert "3 if nobody answers" in text, name
        assert "--json" in text, name
