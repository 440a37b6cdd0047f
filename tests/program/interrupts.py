"""Starts of `ringplane serve` that are interrupted at random moments: each ends with status 0 and leaves nothing.

test_start.py runs some. More run by hand, also with an empty cache of compiled code:

    cd tests && python -m program.interrupts --starts 300
    cd tests && python -m program.interrupts --starts 30 --cold
    cd tests && python -m program.interrupts --image rbd:POOL/IMAGE:conf=PATH
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ringplane.driver.frontend import FrontEnd
from unit.nbd_server import NbdServer
from unit.waiting import wait_until as wait_until

SOON = 120.0
# How much longer than an undisturbed start it may take until the signal is sent.
LONGEST = 1.2
SERVE = (sys.executable, "-m", "ringplane", "serve")
SCRIPT = (str(Path(sys.executable).with_name("ringplane-vhost-user-blk")),)
DISKS = """
[[disk]]
image = "a.img"
socket-path = "a.sock"
create = "1M"
[[disk]]
image = "b.img"
socket-path = "b.sock"
create = "64M"
zoned = "1M"
"""
# What a start may log beside its end.
USUAL = ("compiling the data plane", "created")


def disk(folder: Path) -> list[str]:
    return ["--blk-file", str(folder / "disk.img"), "--create", "16M", "--socket-path", str(folder / "disk.sock")]


def as_command(folder: Path) -> list[str]:
    return [*SERVE, *disk(folder)]


def as_script(folder: Path) -> list[str]:
    return [*SCRIPT, *disk(folder)]


def zoned(folder: Path) -> list[str]:
    return [*SERVE, *disk(folder), "--zoned", "1M"]


def several(folder: Path) -> list[str]:
    config = folder / "disks.toml"
    config.write_text(DISKS)
    return [*SERVE, "--config", str(config)]


def with_everything(folder: Path) -> list[str]:
    """Beside the disk: the API, metrics over TCP, a state, and the process that opens files."""
    (folder / "allowed").mkdir(exist_ok=True)
    more = ["--api-socket", folder / "api.sock", "--allow-folder", folder / "allowed", "--state", folder / "state"]
    return [*as_command(folder), *map(str, more), "--metrics", "127.0.0.1:0"]


def of_image(address: str, folder: Path) -> list[str]:
    """An image elsewhere."""
    return [*SERVE, "--image", address, "--socket-path", str(folder / "disk.sock")]


Command = Callable[[Path], list[str]]

FRESH: tuple[Command, ...] = (as_command, as_script, zoned, several, with_everything)
UPGRADED: tuple[Command, ...] = (as_command, with_everything)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("\nSigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    """Those that the main thread has started (proc(5))."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def interrupted(command: list[str], number: int, moment: float, environment: dict[str, str]) -> bool:
    """Start, send the signal after so many seconds; whether the disks were served."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        # Not SIGINT, which Python itself catches from its own first moment on.
        wait_until(lambda: catches(process.pid, signal.SIGTERM))
        time.sleep(moment)
        process.send_signal(number)
        out, log = process.communicate(timeout=SOON)
    assert process.returncode == 0, (process.returncode, out, log)
    served = "listening on" in out
    usual = (*USUAL, "front end") if served else USUAL
    lines = [line for line in log.splitlines() if not any(text in line for text in usual) or "stopped" in line]
    assert len(lines) == 1, log
    assert f"stopped by {signal.Signals(number).name}" in lines[0]
    assert served != ("while starting" in lines[0])
    assert served or out == ""
    return served


def check_fresh(command: Command, number: int, moment: float, environment: dict[str, str]) -> bool:
    """Interrupt a start that makes an image; whether it was served."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = command(folder)
        before = set(folder.iterdir())
        served = interrupted(words, number, moment, environment)
        left = set(folder.iterdir()) - before
        assert not [path for path in left if path.is_socket()], left
        assert served or not left, left
    return served


def check_upgrade(command: Command, number: int, moment: float, environment: dict[str, str]) -> bool:
    """Interrupt a start that takes over: the running process continues, or the new one has served."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = command(folder)
        with running(words, environment) as process, contextlib.closing(FrontEnd(folder / "disk.sock")) as front_end:
            before = front_end.get_features()
            taken = interrupted([*words, "--upgrade"], number, moment, environment)
            if taken:
                assert process.wait(SOON) == 0
            else:
                assert front_end.get_features() == before
                process.terminate()
                assert process.wait(SOON) == 0
        assert {path.name for path in folder.iterdir()} <= {"disk.img", "allowed", "state", "state~"}
    return taken


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            while not process.stdout.readline().startswith("listening on"):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def start_seconds(cold: bool) -> float:
    """What an undisturbed start takes on this machine."""
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        environment = os.environ | ({"RINGPLANE_CACHE_DIR": name} if cold else {})
        with running(as_command(Path(name)), environment):
            return time.monotonic() - began


@contextlib.contextmanager
def nbd_server() -> Iterator[str]:
    """The address of its export."""
    with tempfile.TemporaryDirectory() as folder:
        server = NbdServer(Path(folder, "nbd"), bytearray(16 << 20))
        yield server.uri
        server.stop()


def interrupt_starts(starts: int, seed: int, cold: bool = False, image: str = "") -> list[bool]:
    """Of each start, whether the disks were served when it ended; `image`: the address of the only image."""
    if image:
        return _interrupt_starts(starts, seed, cold, [partial(of_image, image)], [])
    with nbd_server() as address:
        return _interrupt_starts(starts, seed, cold, [*FRESH, partial(of_image, address)], [] if cold else UPGRADED)


def _interrupt_starts(
    starts: int, seed: int, cold: bool, fresh: Sequence[Command], upgraded: Sequence[Command]
) -> list[bool]:
    randomness = random.Random(seed)
    longest = LONGEST * start_seconds(cold)
    results = []
    for _ in range(starts):
        number = randomness.choice([signal.SIGTERM, signal.SIGINT])
        moment = randomness.uniform(0, longest)
        chosen = randomness.randrange(len(fresh) + len(upgraded))
        with tempfile.TemporaryDirectory() as name:
            environment = os.environ | {"TMPDIR": name}
            if cold:
                # Nobody can write there: the cache is a temporary folder.
                environment["RINGPLANE_CACHE_DIR"] = os.devnull
            if chosen < len(fresh):
                results.append(check_fresh(fresh[chosen], number, moment, environment))
            else:
                results.append(check_upgrade(upgraded[chosen - len(fresh)], number, moment, environment))
            assert list(Path(name).iterdir()) == []
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--image", default="", help="address of an image elsewhere")
    options = parser.parse_args()
    results = interrupt_starts(options.starts, options.seed, options.cold, options.image)
    print(f"{len(results)} starts interrupted, {sum(results)} of them when the disks were served already")
