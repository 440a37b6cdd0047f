"""`ringplane top`: a live table of the disks of a running process. What it shows comes from GET /v1/statistics."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ringplane.cli.ctl.targets import api_errors, api_socket, api_socket_of
from ringplane.cli.types import Parsed
from ringplane.options.durations import parse_seconds
from ringplane.system.signals import Interrupted
from ringplane.system.signals import of as signals_of

# The names of disk_columns.py, repeated here because `ringplane --help` shall be quick.
ORDERS = ("iops", "mb", "read", "write", "flush", "depth", "limit", "errors", "name")

SHORTEST = 0.1
INTERVAL = Parsed("seconds", lambda text: parse_seconds(text, SHORTEST))

# Seconds that an answer may take.
PATIENCE = 5.0


@click.command(short_help="Watch the disks of a running process.")
@api_socket
@click.option("--interval", type=INTERVAL, default="1", show_default=True, help="Seconds between updates.")
@click.option(
    "--sort", type=click.Choice(ORDERS), default=ORDERS[0], show_default=True,
    help="The disk with the largest figure comes first; read, write, flush: the 99th percentile of their latency.",
)  # fmt: skip
@click.option("--policies", is_flag=True, help="Show the policies of the disks and their counters; p does, too.")
@click.option("--once", is_flag=True, help="Print the figures of one interval, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per interval.")
@click.pass_context
def top(
    context: click.Context,
    api_socket: Path | None,
    interval: float,
    sort: str,
    policies: bool,
    once: bool,
    as_json: bool,
) -> None:
    """Show what each disk and each I/O thread of a running process does, as it happens: docs/ctl.md explains the table.

    p shows the policies of the disks, and the disks again; q or Ctrl-C ends it. On what is not a terminal, or with
    TERM=dumb, it prints one table after the other.

    The exit status is 0 after q or Ctrl-C, 1 if the API refused it, 2 for wrong options, 3 if nobody answers at the
    start, and 128 plus the number of another signal that ended it.
    """
    # rich takes a while to import, and `ringplane --help` imports this file.
    from rich.console import Console

    from ringplane.cli.top.known import View
    from ringplane.cli.top.live_screen import LiveScreen
    from ringplane.cli.top.plain_output import PlainOutput
    from ringplane.client.client import Client

    client, console = Client(api_socket_of(context), PATIENCE), Console(highlight=False)
    what = (client, interval, View(sort, policies=policies), signals_of(context.obj), console)
    with api_errors(), ending():
        if once or as_json or not sys.stdin.isatty() or not console.is_terminal or console.is_dumb_terminal:
            PlainOutput(*what).run(once=once, as_json=as_json)
        else:
            LiveScreen(*what).run()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ctrl-C is how people end it; other signals, and the end of the terminal, give their exit status."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.number != signal.SIGINT:
            click.echo(interrupted, err=True)
            raise SystemExit(interrupted.status) from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise SystemExit(Interrupted(signal.SIGHUP).status) from None
