"""`ringplane top`: its layout at many sizes, its keys, and a real process that is watched, restarted and upgraded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from guest.terminal import Terminal
from ringplane.cli.top import ORDERS as OFFERED
from ringplane.cli.top import ending
from ringplane.cli.top import top as top_command
from ringplane.cli.top.disk_columns import COLUMNS, ORDERS, TIERS, chosen, ordered
from ringplane.cli.top.figures import ASCII_BARS, count, latency, percent, sparkline, spread
from ringplane.cli.top.keyboard import pressed
from ringplane.cli.top.known import Known, View
from ringplane.cli.top.lines import plain, shortened
from ringplane.cli.top.table_layout import last_first, listing, screen
from ringplane.client.rates import CounterRates, DiskRates, IoThreadRates, OperationRates, PolicyRates, Rates
from ringplane.driver.driver import Driver
from ringplane.system.signals import Interrupted
from unit.rig import eventually

from .served import DISK, MEMORY_SIZE, SOON, ServedApi

WIDTHS = (1, 20, 40, 60, 80, 100, 120, 160, 200, 240)
HEIGHTS = (1, 5, 24, 50)
DISKS = (0, 1, 8, 40)

READ = OperationRates(12345.6, 50.5e6, 90.0, 85.2, 1234.5)
WRITE = OperationRates(3.2, 13e3, 9.0, 8.5, 12_345_678.0)


def a_disk(name: str, **changes: object) -> DiskRates:
    disk = DiskRates(
        name=name, state="attached", paused=False, flush_failed=False, in_flight=3, iops=12348.8,
        bytes_per_second=50.6e6, depth=3.25, busy=0.75, limited=0.455, errors=0, new_errors=0,
        operations={"read": READ, "write": WRITE},
    )  # fmt: skip
    return replace(disk, **changes)


def a_thread(name: str, busy: float = 0.5) -> IoThreadRates:
    return IoThreadRates(name, busy, 0.1, 0.9 - busy, 1000.0)


def some(disks: int, threads: int = 2) -> Known:
    return Known(
        "api.sock",
        Rates(
            1.0, [a_disk(f"disk-{number:02}") for number in range(disks)], [a_thread(f"io{n}") for n in range(threads)]
        ),
        {
            (f"disk-{number:02}",): [(float(second), 1.0, float(second)) for second in range(1, 61)]
            for number in range(disks)
        },
        60.0,
    )


def a_policy(name: str, enabled: bool = True, **counters: tuple[int, float]) -> PolicyRates:
    return PolicyRates(name, enabled, {key: CounterRates(*counted) for key, counted in counters.items()})


def with_policies(known: Known, *policies: PolicyRates) -> Known:
    """Each disk has these."""
    assert known.rates is not None
    return replace(
        known, rates=replace(known.rates, disks=[replace(disk, policies=policies) for disk in known.rates.disks])
    )


ERROR = a_policy("error", requests=(1_234_567, 12345.6), failed=(17, 0.5))
SLOW = a_policy("slow", False, requests=(0, 0.0))
AT_POLICIES = View(policies=True)


def texts(known: Known, width: int, height: int, view: View | None = None) -> list[str]:
    return [plain(line) for line in screen(known, view or View(), width, height)]


# The layout


@pytest.mark.parametrize("view", [View(), AT_POLICIES], ids=["disks", "policies"])
@pytest.mark.parametrize("disks", DISKS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_size_is_filled_and_not_more(width: int, height: int, disks: int, view: View) -> None:
    of_policies = with_policies(some(disks), ERROR, SLOW)
    for known in (
        some(disks),
        some(disks, 64),
        replace(of_policies, trouble="not connected"),
        replace(of_policies, bars=""),
        Known("api.sock"),
    ):
        lines = screen(known, view, width, height)
        assert len(lines) == height
        assert all(sum(len(text) for text, _ in line) <= width for line in lines)


def test_80_columns() -> None:
    known = some(2)
    known = replace(known, rates=replace(known.rates, disks=[a_disk("data"), a_disk("disk-01", errors=7)]))
    assert texts(known, 80, 24)[:9] == [
        "api.sock: 2 disks, 2 attached, 24698 IOPS, 101 MB/s",
        "I/O thread  busy  poll sleep   I/O thread  busy  poll sleep",
        "io0          50%   10%   40%   io1          50%   10%   40%",
        "",
        "                     --- read -- -- write --",
        "disk      IOPS  MB/s   p50   p99   p50   p99 depth limit  err         IOPS, 60 s",
        "data     12349    51  85us 1.2ms 8.5us   12s   3.2   46%    0",
        "disk-01  12349    51  85us 1.2ms 8.5us   12s   3.2   46%    7 ▂▂▂▂▃▃▄▄▄▅▅▆▆▆▇▇██",
        "",
    ]


def test_policies_at_80_columns() -> None:
    """They follow the order of the disks, and repeat the names, so that each line can be understood alone."""
    known = with_policies(some(2), ERROR, SLOW)
    known = replace(known, samples={("disk-01", "error", "failed"): [(60.0, 30.0, 1.0)]})
    keys = "q quit, p disks, sort: iops mb read write flush depth limit errors name"
    assert texts(known, 80, 24, View("name", reverse=True, policies=True))[3:] == [
        "",
        "disk    policy     counter  per s   total                            per s, 60 s",
        "disk-01 error      requests 12346 1234567",
        "disk-01 error      failed     0.5      17                    ███████████████████",
        "disk-01 slow (off) requests     0       0",
        "disk-00 error      requests 12346 1234567",
        "disk-00 error      failed     0.5      17",
        "disk-00 slow (off) requests     0       0",
        *[""] * 12,
        keys.replace("sort", "reversed"),
    ]
    assert texts(known, 80, 24)[0].endswith(" MB/s, 4 policies")
    assert texts(known, 80, 24)[-1] == keys.replace("p disks", "p policies")
    assert "no disk has a policy; ringplane ctl policy add adds one" in texts(some(2), 80, 24, AT_POLICIES)


def test_long_names_of_policies_are_cut_while_there_is_no_room() -> None:
    """Sparklines give way only to the last characters."""
    known = with_policies(some(1), a_policy("p" * 64, **{"c" * 30 + str(number): (1, 1.0) for number in range(2)}))
    narrow, wide = (texts(known, width, 24, AT_POLICIES)[5] for width in (80, 200))
    assert len(narrow.split()[1]) == len(narrow.split()[2])
    assert narrow.split()[2].endswith("c0")
    assert wide.split() == ["disk-00", "p" * 64, "c" * 30 + "0", "1.0", "1"]
    assert "60 s" in texts(known, 80, 24, AT_POLICIES)[4]
    lines = [line for line in texts(known, 40, 24, AT_POLICIES) if line.startswith("disk-00")]
    assert [name[-2:] for name in (line.split()[2] for line in lines)] == ["c0", "c1"]


def test_more_counters_than_lines() -> None:
    known = with_policies(some(40), ERROR)
    assert texts(known, 80, 24, AT_POLICIES)[22] == "and 63 more"
    last = last_first(known, AT_POLICIES, 80, 24)
    lines = texts(known, 80, 24, replace(AT_POLICIES, first=last))
    assert lines[21].split()[:3] == ["disk-39", "error", "failed"]
    assert len(listing(known, AT_POLICIES, 80)) == 5 + 80


def test_columns_appear_as_there_is_room() -> None:
    before: set[str] = set()
    for room in range(300):
        names = set(chosen(room))
        assert before <= names
        before = names
    assert before == set(COLUMNS) == {name for tier in TIERS for name in tier}
    assert "flush p99" not in texts(some(1), 80, 24)[6]
    for width, groups in ((80, ["read", "write"]), (160, ["read", "write", "flush"])):
        assert re.findall(r"[a-z]+", texts(some(1), width, 24)[4]) == groups


def test_long_names_are_cut_while_there_is_no_room() -> None:
    name = "n" * 62 + "07"
    known = replace(some(0), rates=Rates(1.0, [a_disk(name)], []))
    rows = [line for width in (80, 200) for line in texts(known, width, 24) if "nnn" in line]
    assert [row.split()[0] for row in rows] == ["nnnnnnn~nnnnnn07", name]
    assert [shortened("abcdef", width) for width in (6, 5, 4, 2, 1)] == ["abcdef", "ab~ef", "a~ef", "~f", "~"]


def test_more_disks_than_lines() -> None:
    lines = texts(some(40), 80, 24)
    shown = [line for line in lines if line.startswith("disk-")]
    assert (len(shown), lines[22]) == (16, "and 24 more")
    last = last_first(some(40), View(), 80, 24)
    lines = texts(some(40), 80, 24, View(first=last))
    assert lines[21].startswith("disk-39")
    assert lines[22] == "the end; 24 are above"
    assert texts(some(40), 80, 24, View(first=1000)) == lines
    assert [plain(line) for line in listing(some(40), View(), 80)][-1].startswith("disk-39")


def test_as_many_disks_as_lines() -> None:
    assert last_first(some(17), View(), 80, 24) == 0
    assert texts(some(17), 80, 24)[22].startswith("disk-16")


def test_more_threads_than_room() -> None:
    known = some(1, 64)
    threads = [a_thread(f"io{number}", busy=(number + 1) / 100) for number in range(64)]
    known = replace(known, rates=Rates(1.0, known.rates.disks, threads))
    lines = texts(known, 80, 24)
    assert lines[2].startswith("io63")
    assert lines[5].endswith("and 57 more")
    assert sum(line.count("%") // 3 for line in map(plain, listing(known, View(), 80)) if line.startswith("io")) == 64


def test_without_sparklines_there_is_room_for_more_figures() -> None:
    assert "flush" not in texts(some(1), 83, 24)[4]
    assert "flush" in texts(replace(some(1), bars=""), 83, 24)[4]
    # It is not in the place of a sparkline.
    assert texts(replace(some(1), bars=""), 80, 24)[5].split()[1] == "state"
    assert "60 s" not in texts(replace(some(1), bars=""), 200, 24)[5]


def test_states() -> None:
    disks = [
        a_disk("a", state="listening", iops=0.0), a_disk("b", paused=True), a_disk("c", flush_failed=True),
        a_disk("d", state="stopped", iops=0.0),
    ]  # fmt: skip
    known = replace(some(0), rates=Rates(1.0, disks, []))
    lines = texts(known, 100, 24, View("name"))
    remarks = ["listening", "paused", "flush failed", "stopped"]
    assert [line for line in lines if line.endswith(tuple(remarks))] == lines[5:9]
    # The same words in the column that there is room for in wide terminals.
    wide = [line.split()[1] for line in texts(known, 200, 24, View("name"))[5:9]]
    assert wide == ["listening", "paused", "attached", "stopped"]
    assert "there is no disk; ringplane ctl add adds one" in texts(some(0), 80, 24)


def test_trouble_replaces_the_summary() -> None:
    known = replace(some(1), trouble="not connected, trying again")
    lines = texts(known, 80, 24)
    assert lines[0] == "api.sock: not connected, trying again"
    assert any(line.startswith("disk-00") for line in lines)


def test_orders() -> None:
    disks = [a_disk("b", iops=1.0), a_disk("a", iops=1.0), a_disk("c", iops=5.0, operations={}, errors=2)]
    assert [disk.name for disk in ordered(disks, "iops", False)] == ["c", "a", "b"]
    assert [disk.name for disk in ordered(disks, "iops", True)] == ["b", "a", "c"]
    assert [disk.name for disk in ordered(disks, "name", False)] == ["a", "b", "c"]
    assert [disk.name for disk in ordered(disks, "read", False)] == ["a", "b", "c"]
    numbers = [a_disk(name, iops=1.0) for name in ("vm-10", "vm-9-b", "vm-9", "vm", "9", "a1b2", "a1b10", "vm-²")]
    names = ["9", "a1b2", "a1b10", "vm", "vm-9", "vm-9-b", "vm-10", "vm-²"]
    assert [disk.name for disk in ordered(numbers, "iops", False)] == names
    assert ordered(disks, "errors", False)[0].name == "c"
    assert tuple(ORDERS) == OFFERED
    assert len({name[0] for name in ORDERS} | {"q", "p", "j", "k", "g"}) == len(ORDERS) + 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.04, "0"), (0.96, "1.0"), (9.94, "9.9"), (9.96, "10"), (99999, "99999"), (99999.6, "100k"),
        (999_499, "999k"), (999_600, "1.00M"), (12.3e6, "12M"),
    ],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (None, "-"),
        (0.01, "<1us"),
        (0.5, "0.5us"),
        (9.96, "10us"),
        (999.4, "999us"),
        (999.6, "1.0ms"),
        (999_600, "1.0s"),
        (1e9, "1000s"),
    ],
)
def test_latencies(microseconds: float | None, text: str) -> None:
    assert latency(microseconds) == text


def test_shares() -> None:
    assert [percent(share) for share in (0, 0.001, 0.455, 1)] == ["-", "<1%", "46%", "100%"]


def test_sparklines() -> None:
    assert sparkline([None, 0, 1, 4, 8]) == " ▁▂▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 8], ASCII_BARS) == "_#"


def test_samples_are_spread_over_cells() -> None:
    samples = [(10.0, 1.0, 4.0), (9.0, 1.0, 2.0), (8.0, 2.0, 6.0)]
    assert spread(samples, 10.0, 4.0, 4) == [6.0, 6.0, 2.0, 4.0]
    assert spread(samples, 10.0, 4.0, 2) == [6.0, 3.0]
    assert spread(samples, 10.0, 8.0, 4) == [None, None, 6.0, 3.0]
    assert spread([(5.0, 1.0, 1.0)], 100.0, 60.0, 6) == [None] * 6


def test_keys() -> None:
    assert pressed(b"\x1b[Aj\x1b[6~qG\x1bOB") == ["up", "down", "page down", "q", "end", "down"]
    assert pressed(b"\xc3\xa4") == ["\xc3", "\xa4"]


def test_signals_that_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    """q and Ctrl-C are how it is ended; there is nobody to read of the end of the terminal."""
    with ending():
        raise Interrupted(signal.SIGINT)
    for error, status in ((Interrupted(signal.SIGTERM), 143), (OSError(errno.EIO, "terminal"), 129)):
        with pytest.raises(SystemExit) as exit, ending():
            raise error
        assert exit.value.code == status
    assert capsys.readouterr() == ("", "interrupted by SIGTERM\n")


# A real process

ARGUMENTS = (*DISK, "--api-socket", "api.sock", "--no-sandbox")

Serve = Callable[..., ServedApi]


def run(*arguments: str, status: int = 0, **environment: str) -> str:
    done = CliRunner(env=environment).invoke(top_command, arguments)
    assert done.exit_code == status, (done.output, done.exception)
    return done.output


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Reads of 4 KiB, one after the other, meanwhile."""
    ended = threading.Event()
    with Driver(folder / "a.sock", memory_size=MEMORY_SIZE, timeout=SOON) as driver, ThreadPoolExecutor(1) as pool:

        def read() -> None:
            while not ended.is_set():
                driver.read(0, 4096)

        done = pool.submit(read)
        try:
            yield
        finally:
            ended.set()
            done.result()


def test_once(serve: Serve, tmp_path: Path) -> None:
    """For people, and as JSON."""
    served, path = serve(*ARGUMENTS), str(tmp_path / "api.sock")
    lines = run("--once", "--interval", "0.1", "--api-socket", path, COLUMNS="120").splitlines()
    assert lines[0] == f"{path}: 1 disk, 0 attached, 0 IOPS, 0 MB/s"
    assert lines[-1].startswith("a ")
    assert " state " in lines[-2]
    assert not any("\x1b" in line for line in lines)
    found: list[Any] = []

    def completed() -> bool:
        found.append(json.loads(run("--once", "--json", "--interval", "0.2", "--api-socket", path)))
        return bool(found[-1]["disks"][0]["iops"])

    with reading(tmp_path):
        assert eventually(completed)
    (disk,), (thread,) = found[-1]["disks"], found[-1]["io_threads"]
    assert (disk["name"], disk["state"], disk["errors"]) == ("a", "attached", 0)
    read = disk["operations"]["read"]
    assert disk["iops"] == pytest.approx(read["per_second"])
    assert disk["bytes_per_second"] == pytest.approx(disk["iops"] * 4096)
    assert 0 < read["p50_us"] <= read["p99_us"]
    assert disk["depth"] > 0
    assert thread["busy"] + thread["polling"] + thread["asleep"] == pytest.approx(1)
    served.end()


def test_policies_of_a_process(serve: Serve, tmp_path: Path) -> None:
    """Their counters in lines, and in JSON."""
    policies = ("--policy", "error,operation=read,every=2", "--policy", "delay,enabled=no,name=slow")
    served, path = serve(*ARGUMENTS, *policies), str(tmp_path / "api.sock")
    with served.attach() as driver:
        for failed in (False, True):
            with pytest.raises(OSError, match="read") if failed else contextlib.nullcontext():
                driver.read(0, 4096)
    at = ("--once", "--interval", "0.1", "--api-socket", path)
    lines = [line.split() for line in run("--policies", *at, COLUMNS="120").splitlines()]
    heading = lines.index(["disk", "policy", "counter", "per", "s", "total"])
    assert lines[heading + 1 : heading + 4] == [
        ["a", "error", "requests", "0", "2"],
        ["a", "error", "matched", "0", "2"],
        ["a", "error", "failed", "0", "1"],
    ]
    assert ["a", "slow", "(off)", "delayed", "0", "0"] in lines
    error, slow = json.loads(run("--json", *at))["disks"][0]["policies"]
    assert (error["name"], error["enabled"]) == ("error", True)
    assert error["counters"]["failed"] == {"total": 1, "per_second": 0.0}
    assert (slow["name"], slow["enabled"]) == ("slow", False)
    served.end()


def test_statistics_are_those_of_the_metrics(serve: Serve, tmp_path: Path) -> None:
    served = serve(*ARGUMENTS)
    assert served.api.get("/v1/statistics")["disks"][0]["operations"] == {}
    with served.attach() as driver:
        for _ in range(5):
            driver.read(0, 4096)
        driver.flush()
    operations = served.api.get("/v1/statistics")["disks"][0]["operations"]
    assert operations.keys() == {"read", "flush"}
    read = operations["read"]
    assert (read["requests"], read["bytes"], read["errors"]) == (5, 5 * 4096, 0)
    assert sum(requests for _, requests in read["latencies"]) == 5
    whole = sum(nanoseconds * requests for nanoseconds, requests in read["latencies"]) / 1e9
    assert whole == pytest.approx(read["seconds"], rel=0.07)
    served.end()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--api-socket", "none.sock"), 3, "Error: none.sock: no such socket; is ringplane running"),
        (("--once", "--api-socket", "none.sock"), 3, "Error: none.sock: no such socket; is ringplane running"),
        ((), 2, "Error: give the socket of the API with --api-socket PATH, or in RINGPLANE_API_SOCKET"),
        (("--interval", "0.01"), 2, "'0.01' is not a number of seconds from 0.1 to 86400"),
        (("--sort", "size"), 2, "'size' is not one of 'iops', "),
    ],
)
def test_errors(arguments: tuple[str, ...], status: int, words: str) -> None:
    assert words in run(*arguments, status=status)


# A terminal

TOP = f"{sys.executable} -m ringplane top --api-socket api.sock"
ALTERNATE, NORMAL, HIDDEN, SHOWN = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    terminal = Terminal(tmp_path, {**environment, "TERM": "xterm-256color"})
    terminal.run("stty rows 24 cols 80")
    yield terminal
    terminal.close()


def start(terminal: Terminal, command: str = TOP) -> int:
    """Returns where its output begins."""
    at = len(terminal.text)
    terminal.type(f"{command}\n")
    terminal.wait_for("IOPS, 60 s", at)
    return at


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_the_terminal_is_restored(serve: Serve, terminal: Terminal, key: str) -> None:
    """The status 0 is what `finish` requires."""
    served = serve(*ARGUMENTS)
    before = terminal.run("stty -g").splitlines()[0]
    at = start(terminal)
    terminal.type(key)
    text = terminal.finish(at)
    assert text.index(ALTERNATE) < text.index(NORMAL)
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    assert "\x1b[1m" in text
    assert terminal.run("stty -g").splitlines()[0] == before
    served.end()


def test_keys_on_a_terminal(serve: Serve, terminal: Terminal) -> None:
    served = serve(*ARGUMENTS)
    at = start(terminal)
    terminal.type("n")
    terminal.wait_for(r"\x1b\[1;7mdisk", at)
    terminal.type("n")
    terminal.wait_for("reversed:", at)
    terminal.type("\x1b[A\x1b[6~zq")
    terminal.finish(at)
    served.end()


def test_policies_on_a_terminal(serve: Serve, terminal: Terminal) -> None:
    """p shows them and the disks again, --policies has them first."""
    served = serve(*ARGUMENTS, "--policy", "error,every=100")
    at = start(terminal)
    terminal.type("p")
    terminal.wait_for(r"per s, 60 s", at)
    terminal.wait_for(r"matched", at)
    terminal.type("p")
    terminal.wait_for(r"(?s)matched.*IOPS, 60 s", at)
    terminal.type("q")
    terminal.finish(at)
    at = len(terminal.text)
    terminal.type(f"{TOP} --policies\n")
    terminal.wait_for(r"per s, 60 s", at)
    terminal.type("q")
    terminal.finish(at)
    served.end()


def test_another_size(serve: Serve, terminal: Terminal, tmp_path: Path) -> None:
    served = serve(*ARGUMENTS)
    at = start(terminal)
    # From another program, as a window does it.
    fcntl.ioctl(terminal.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    terminal.wait_for("flush", at)
    terminal.wait_for("state", at)
    terminal.type("q")
    terminal.finish(at)
    served.end()


def test_it_survives_an_upgrade_and_a_restart(serve: Serve, terminal: Terminal) -> None:
    serve(*ARGUMENTS)
    at = start(terminal, f"{TOP} --interval 0.1")
    new = serve(*ARGUMENTS, "--upgrade")
    now = len(terminal.text)
    terminal.wait_for("1 disk, 0 attached", now)
    new.end()
    now = len(terminal.text)
    terminal.wait_for("not connected, trying again", now)
    again = serve(*ARGUMENTS)
    now = len(terminal.text)
    terminal.wait_for("1 disk, 0 attached", now)
    terminal.type("q")
    terminal.finish(at)
    again.end()


def test_without_colours(serve: Serve, terminal: Terminal) -> None:
    served = serve(*ARGUMENTS)
    at = start(terminal, f"NO_COLOR=1 {TOP}")
    terminal.type("q")
    assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.finish(at))
    served.end()


@pytest.mark.parametrize("command", [f"TERM=dumb {TOP} --interval 0.1", f"{TOP} --interval 0.1 | (trap '' INT; cat)"])
def test_lines_without_a_terminal_that_moves_its_cursor(serve: Serve, terminal: Terminal, command: str) -> None:
    served = serve(*ARGUMENTS)
    at = start(terminal, command)
    terminal.wait_for(r"(?s)IOPS, 60 s.*IOPS, 60 s", at)
    terminal.type("\x03")
    assert "\x1b" not in terminal.finish(at)
    served.end()
