"""Guests that operate their own disk: user-mode Linux leaves requests to the API in a folder of the host (hostfs)."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringplane.api.schemas import Policies
from ringplane.client.api_errors import ApiError
from ringplane.client.client import Client, disk_path
from unit.waiting import repeating

from .back_end_processes import BackendFactory
from .machines import UmlGuest
from .workloads import Workload, script

# Each returns when the API has answered: the change is in force then.
FUNCTIONS = """\
mkdir /host
mount -t hostfs hostfs /host -o {folder} || give_up "the folder of the host cannot be mounted"
asked=0
api() {{ # method, target below the disk, body: the answer is in /tmp/answer
    asked=$((asked + 1))
    printf '%s\\n' "$@" > /host/request
    mv /host/request /host/request-$asked
    until [ -e /host/answer-$asked ]; do usleep 10000; done
    cp /host/answer-$asked /tmp/answer
    if grep -q '^refused' /tmp/answer; then give_up "$*: $(cat /tmp/answer)"; fi
}}
enable() {{ api PATCH "policies/$1" '{{"enabled": true}}'; }}
disable() {{ api PATCH "policies/$1" '{{"enabled": false}}'; }}
count() {{ # policy, counter: its value is in $count
    api GET "policies/$1"
    count=$(sed "s/.*\\"$2\\": *\\([0-9]*\\).*/\\1/" /tmp/answer)
}}
"""

# Of each policy, by its name.
Counters = dict[str, dict[str, int]]


@dataclass(frozen=True)
class ProgrammedDisk:
    """A guest's disk with policies, which the guest can change."""

    backend: BackendFactory
    guest: UmlGuest
    image: Path

    def run(
        self, policies: Sequence[str], body: str, programs: tuple[str, ...] = (), extra: Sequence[str] = ()
    ) -> Counters:
        """Run a script; returns what the policies have counted."""
        with tempfile.TemporaryDirectory(prefix="guest-api-") as folder:
            socket, shared = Path(folder, "api.sock"), Path(folder, "shared")
            shared.mkdir()
            given = [word for policy in policies for word in ("--policy", policy)]
            disk = self.backend(self.image, num_queues=1, extra=["--api-socket", str(socket), *given, *extra])
            client = Client(socket)
            with answering(shared, client, self.image.stem):
                self.guest.run(disk, Workload(script(FUNCTIONS.format(folder=shared) + body), programs))
            found = client.read(disk_path(self.image.stem, "policies"), Policies)
            disk.stop()
        return {policy.name: policy.counters for policy in found.policies}


@contextlib.contextmanager
def answering(folder: Path, client: Client, disk: str) -> Iterator[None]:
    """Carry out the requests in a folder, in order."""
    numbers = itertools.count(1)
    request = folder / f"request-{next(numbers)}"

    def answer() -> None:
        nonlocal request
        if request.exists():
            complete = folder / "answer"
            complete.write_bytes(asked(client, disk, request.read_text()))
            complete.rename(folder / request.name.replace("request", "answer"))
            request = folder / f"request-{next(numbers)}"

    with repeating(answer, pause=0.01):
        yield


def asked(client: Client, disk: str, request: str) -> bytes:
    """What the API answers."""
    method, target, *body = request.splitlines()
    try:
        return client.ask(method, disk_path(disk, target), json.loads(body[0]) if body else None)
    except (ApiError, ValueError) as error:
        return f"refused: {error}".encode()
