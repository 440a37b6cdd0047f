"""What Linux sees of the faults that policies make."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import ringplane
from ringplane.control.export import Export
from ringplane.options.policy_options import PolicyUse, parse_policy
from unit.waiting import eventually

from .back_end_processes import STAND_IN
from .machines import UmlGuest, when
from .workloads import Workload, script

POLICIES = [
    parse_policy(text)
    for text in (
        "read_only_after,errors=0,name=worn,enabled=no",
        "error,operation=read,where=16M-17M",
        "bad_blocks,where=32M-32772K",
        "no_space,space=5M",
        "hang,operation=write,where=128M-129M,name=stuck",
    )
]

# Places are in MiB. Five of them are written, so there is no space for the sixth.
SEES = """\
read_at() { dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=$(($1 * 256)) iflag=direct 2> /tmp/dd.txt; }
write_at() { dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=$(($1 * 256)) oflag=direct 2> /tmp/dd.txt; }
works() { "$@" || { cat /tmp/dd.txt; give_up "$*"; }; }
fails() {
    if "$@"; then give_up "$* does not fail"; fi
    grep -q "Input/output error" /tmp/dd.txt || give_up "$*: $(cat /tmp/dd.txt)"
}
say "errors"
works read_at 15
fails read_at 16
works write_at 16
say "a bad block heals"
fails read_at 32
works write_at 32
works read_at 32
say "a write hangs"
write_at 128 &
until [ "$(awk '{ print $2 }' /sys/block/vda/inflight)" = 1 ]; do usleep 10000; done
works read_at 15
echo "RELEASE-ME"
wait $! || give_up "what was released has failed"
say "no space"
works write_at 64
works write_at 65
fails write_at 66
works write_at 64
say "read-only"
echo "WEAR-OUT"
tries=0
while write_at 64; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || give_up "it can still be written"
    usleep 100000
done
fails write_at 64
works read_at 64
say "done"
"""


class Served:
    """A disk of this process."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def check_alive(self) -> None:
        """It is."""


def switched(**switches: bool) -> list[PolicyUse]:
    return [replace(use, enabled=switches.get(use.name, use.enabled)) for use in POLICIES]


def release(export: Export) -> None:
    """What hangs, once something does."""
    assert eventually(lambda: counters(export)["stuck"]["hung"] == 1)
    export.set_policies(switched(stuck=False))


def counters(export: Export) -> dict[str, dict[str, int]]:
    return {policy.name: policy.counters for policy in export.disk.running_policies}


@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
def test_linux_sees_what_policies_do(uml: UmlGuest, disk_image: Path, tmp_path: Path) -> None:
    console = tmp_path / "console-1.txt"
    with tempfile.TemporaryDirectory(prefix="policies-") as folder:
        socket = Path(folder) / "disk.sock"
        with ringplane.serve(disk_image, socket, num_queues=1, policy=POLICIES) as export:
            when(console, "RELEASE-ME", lambda: release(export))
            when(console, "WEAR-OUT", lambda: export.set_policies(switched(stuck=False, worn=True)))
            uml.run(Served(socket), Workload(script(SEES)))  # type: ignore[arg-type]
            counted = counters(export)
    assert counted["error"]["failed"] == 1
    assert (counted["bad_blocks"]["failed"], counted["bad_blocks"]["healed"]) == (1, 1)
    assert counted["stuck"]["hung"] == 1
    assert counted["no_space"]["failed"] == 1
    assert counted["worn"]["rejected"] >= 2
