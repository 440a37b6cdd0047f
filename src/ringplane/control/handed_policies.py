"""What policies count and remember, from a process to its successor; the numbers in a file in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ringplane.device.disk import Disk
from ringplane.system.fd import Fd


@contextlib.contextmanager
def saved_policies(disks: Iterable[Disk]) -> Iterator[dict[str, Any]]:
    """A part of a message; its fd is closed at the end of the `with`. Raises OSError."""
    with os.fdopen(os.memfd_create("ringplane-policies", os.MFD_CLOEXEC), "wb") as file:
        saved = []
        for number, disk in enumerate(disks):
            for policy in disk.running_policies:
                states = policy.states()
                saved.append({"disk": number, "size": len(states), **policy.snapshot()})
                file.write(states)
        file.flush()
        yield {"file": Fd(file.fileno()), "policies": saved}


def resume_policies(saved: Mapping[str, Any], disks: Mapping[int, Disk]) -> None:
    """Before anybody uses these disks, which have their numbers. Raises LookupError, TypeError, ValueError, OSError."""
    begin = 0
    for each in saved["policies"]:
        states = os.pread(saved["file"].number, each["size"], begin)
        begin += each["size"]
        for policy in disks[each["disk"]].running_policies:
            if policy.name == each["name"]:
                policy.resume_from(each, states)
