"""Files of policies that are named by a state or by a running process: which of them a new process reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ringplane.options.disk_config import DiskConfig
from ringplane.options.policy_options import PolicyUse
from ringplane.options.toml_text import absolute


class AllowedPolicies:
    """Those of disks that are described, and files that the process beside this one may open.

    A confined process could use no others, so if one is named, a guest may have done it.
    """

    def __init__(self, disks: Sequence[DiskConfig], allows: Callable[[Path], bool], *, trusted: bool) -> None:
        """`trusted`: whoever names files has all rights of this process."""
        self._described = {absolute(use.path) for disk in disks for use in disk.policy if use.path is not None}
        self._allows, self._trusted = allows, trusted

    def refused(self, uses: Iterable[PolicyUse]) -> str:
        """Why one of these is not allowed; empty: all are."""
        for use in uses if not self._trusted else ():
            if use.path is not None and absolute(use.path) not in self._described and not self._allows(use.path):
                return (
                    f"policy {use.policy}: is neither a policy of a disk that is described nor below a folder of "
                    "--allow-folder"
                )
        return ""


def none(_: Path) -> bool:
    """That of a process without the one beside it."""
    return False
