"""`ringplane ctl`: operates a running process over its API. One file per kind of command."""

from __future__ import annotations

from pathlib import Path

import click

from ringplane.cli.ctl.disk_adding import add_disk
from ringplane.cli.ctl.disk_changes import flush_disk, limit_disk, pause_disk, remove_disk, resize_disk, resume_disk
from ringplane.cli.ctl.disk_policies import policy
from ringplane.cli.ctl.following_events import follow_events, wait_for
from ringplane.cli.ctl.reading import list_disks, list_io_threads, show_config, show_disk
from ringplane.cli.ctl.recording_disks import end_recording, mark_recording, record_disk
from ringplane.cli.ctl.targets import EXIT_STATUS, api_socket

COMMANDS = (
    *(list_disks, show_disk, add_disk, remove_disk, resize_disk, pause_disk, resume_disk, flush_disk, limit_disk),
    policy,
    *(record_disk, mark_recording, end_recording),
    *(list_io_threads, show_config, follow_events, wait_for),
)


class InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=InOrder, commands=COMMANDS, short_help="Control a running process.",
    epilog=f"{EXIT_STATUS} docs/ctl.md shows each command.",
)  # fmt: skip
@api_socket
def ctl(api_socket: Path | None) -> None:
    """List, add, change and remove disks of a running `ringplane serve --api-socket PATH`, while guests use them."""
