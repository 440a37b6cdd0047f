"""Names of hosts, looked up by a process beside this one, which is ended when that takes too long.

getaddrinfo(3) has no time limit that a program sets. A thread that is left in it would keep the rights that this
process gives up later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ringplane.opener.server_places import Place
from ringplane.system.signals import NONE, Signals, held_back

# Seconds for all names together: as many as for a server that does not answer.
PATIENCE = 10.0

# Only Python's own modules and ours, which come last.
CODE = "import sys; sys.path.append(sys.argv[1]); from ringplane.opener.host_names import main; main(sys.argv[2:])"

# A name or an address in digits, and a port.
Host = tuple[str, int]

# Where a host is, or why that is not known. OSErrors have EAI_... of getaddrinfo(3) as their numbers, too.
Found = Sequence[Place] | OSError


def look_up(hosts: Iterable[Host], signals: Signals = NONE) -> Mapping[Host, Found]:
    """Where these are now. Raises Interrupted."""
    found = {host: _found(host, socket.AI_NUMERICHOST) for host in hosts}
    names = [host for host, result in found.items() if isinstance(result, socket.gaierror)]
    return found | _look_up_apart(names, signals) if names else found


def _found(host: Host, flags: int = 0) -> Found:
    name, port = host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        # It cannot be a name.
        return OSError(errno.EINVAL, str(error))
    except OSError as error:
        return error
    return [(family, address) for family, _, _, _, address in found]


def _look_up_apart(names: Sequence[Host], signals: Signals) -> dict[Host, Found]:
    found: dict[Host, Found] = dict.fromkeys(names, _silence())
    try:
        said = _answers(names, signals)
    except OSError as error:
        return dict.fromkeys(names, error)
    for line in said.splitlines():
        number, places, code, why = json.loads(line)
        found[names[number]] = OSError(code, why) if code else [(family, tuple(place)) for family, place in places]
    return found


def _silence() -> OSError:
    return TimeoutError(errno.ETIMEDOUT, f"no name server has answered within {PATIENCE:g} s")


def _answers(names: Iterable[Host], signals: Signals) -> bytes:
    """The lines that the process has written in time. Raises OSError, Interrupted."""
    end, said = time.monotonic() + PATIENCE, b""
    with _started(names) as child, contextlib.ExitStack() as ending:
        ending.callback(child.kill)
        assert child.stdout is not None
        fd = child.stdout.fileno()
        while signals.wait(fd, max(end - time.monotonic(), 0)) and (part := os.read(fd, 65536)):
            said += part
    # The last one may not be whole.
    return said[: said.rfind(b"\n") + 1]


def _started(names: Iterable[Host]) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    package = Path(__file__).resolve().parents[2]
    arguments = [text for name, port in names for text in (name, str(port))]
    # Signals of a terminal are for us.
    with held_back():
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CODE, str(package), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            process_group=0,
        )


def main(arguments: Sequence[str]) -> None:
    """The process. Its arguments are names and ports; it writes a line for each, as soon as that has been looked up."""
    hosts = zip(arguments[::2], map(int, arguments[1::2]), strict=True)
    writing = threading.Lock()
    for number, host in enumerate(hosts):
        threading.Thread(target=partial(_answer, number, host, writing)).start()


def _answer(number: int, host: Host, writing: threading.Lock) -> None:
    found = _found(host)
    places, code, why = ([], found.errno, found.strerror) if isinstance(found, OSError) else (found, 0, "")
    line = json.dumps([number, places, code, why])
    with writing:
        print(line, flush=True)
