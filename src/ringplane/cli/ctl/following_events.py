"""`ringplane ctl events` and `wait`: what happens to disks, as it happens."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from ringplane.cli.ctl.targets import as_json, asking, disk_name
from ringplane.cli.types import SECONDS

if TYPE_CHECKING:
    from ringplane.client.client import Client

# What is printed beside the events.
CONNECTED = "connected, waiting for events; Ctrl-C ends it"
LOST, FOUND = "not connected, trying again", "connected again"

# By what is waited for: the state of the disk.
STATES = {"attached": "attached", "detached": "listening"}


@click.command("events", short_help="Follow what happens to disks.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@asking
def follow_events(client: Client, as_json: bool) -> None:
    """Print a line for each event from now on, until Ctrl-C: docs/api.md lists them.

    After an upgrade or a restart of the process it connects again by itself. Events between the two are not missed.
    Whether it is connected is printed on standard error; at the beginning only if that is a terminal.
    """
    import msgspec

    from ringplane.cli.ctl.api_tables import event_text
    from ringplane.client.following import Followed

    def remark(text: str) -> None:
        click.echo(f"{client.path}: {text}", err=True)

    followed = Followed(client)
    followed.connect()
    if sys.stderr.isatty():
        remark(CONNECTED)
    for event in followed.read_on(lost=lambda: remark(LOST), found=lambda: remark(FOUND)):
        click.echo(msgspec.json.encode(event) if as_json else event_text(event))


@click.command("wait", short_help="Wait until a disk is attached or detached.")
@disk_name
@click.argument("state", type=click.Choice(list(STATES)))
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="Fail after this time [default: never].")
@as_json
@asking
def wait_for(client: Client, name: str, state: str, timeout: float | None, as_json: bool) -> None:
    """Wait until a front end is attached to the disk NAME, or until none is.

    The exit status is 1 if that has not happened within --timeout, or if the disk is removed.
    """
    from ringplane.api.schemas import Disk
    from ringplane.client.client import disk_path
    from ringplane.client.following import Followed

    followed, end = Followed(client), None if timeout is None else time.monotonic() + timeout
    followed.connect()
    while client.decode(data := client.ask("GET", disk_path(name)), Disk).state != STATES[state]:
        if not followed.wait(end):
            raise click.ClickException(f"{name}: was not {state} within {timeout:g} seconds")
    if as_json:
        click.echo(data)
