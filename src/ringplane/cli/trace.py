"""`ringplane trace`: records what happens to each request of a running process, for Perfetto."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from ringplane.cli.ctl.targets import api_errors, api_socket, client_of, complete_disks
from ringplane.cli.demo import interruptible
from ringplane.cli.types import FILE, SECONDS
from ringplane.options.counted import counted
from ringplane.system.signals import CaughtSignals, Interrupted, Signals, end_line
from ringplane.system.signals import of as signals_of

if TYPE_CHECKING:
    from ringplane.client.chrome_trace import Summary
    from ringplane.client.client import Client
    from ringplane.client.trace_receiver import Receiver, Recorded

# Requests after which a trace ends: a file of some 300 MB, which Perfetto opens in some seconds.
MOST = 500_000


@click.command(short_help="Record requests for Perfetto.")
@api_socket
@click.option("--seconds", type=SECONDS, default="5", show_default=True, help="How long to record.")
@click.option("--out", type=FILE, default="trace.json", show_default=True, help="The file to write; it is replaced.")
@click.option(
    "--disk",
    "disks",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_disks,
    help="Only this disk; may be repeated [default: all].",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    default=MOST,
    show_default=True,
    help="End earlier, after this many requests.",
)
@click.pass_context
def trace(
    context: click.Context,
    api_socket: Path | None,
    seconds: float,
    out: Path,
    disks: Sequence[str],
    requests: int,
) -> None:
    """Record what happens to each request of a running `ringplane serve --api-socket PATH`, and write it to a file that
    https://ui.perfetto.dev opens.

    Ctrl-C ends the recording early, and the file is written nevertheless.

    The exit status is 0 if the file was written, 1 if the API refused it or the file cannot be written, 2 for wrong
    options, 3 if nobody answers, and 128 plus the number of the signal that came while the file was written.
    """
    from ringplane.client.chrome_trace import write_chrome_trace

    signals = signals_of(context.obj)
    with api_errors(), interruptible(f"{out} was not written"), replaced(out) as file:
        recorded = record(client_of(context), seconds, disks, requests, signals)
        click.echo(f"writing {counted(recorded.requests, 'request')} ...", err=True)
        summary = write_chrome_trace(recorded, file, signals.check)
    report(out, recorded, summary)


def record(client: Client, seconds: float, disks: Sequence[str], requests: int, signals: Signals) -> Recorded:
    """Record until the time is over, or a signal comes, which is used up then. Raises ApiError, Interrupted."""
    from ringplane.client.trace_receiver import Receiver

    query = urlencode([("seconds", f"{seconds:g}"), *(("disk", name) for name in disks)])
    request = client.send("POST", f"/v1/trace?{query}")
    try:
        signals.wait(request.fileno())
        receiver = Receiver(client, request, requests)
    except BaseException:
        request.close()
        raise
    click.echo(f"recording for {seconds:g} s; Ctrl-C ends it earlier ...", err=True)
    try:
        wait_for_end(receiver, signals)
    finally:
        recorded = receiver.stop()
    return recorded


def wait_for_end(receiver: Receiver, signals: Signals) -> None:
    try:
        signals.wait(receiver.ended_fd)
    except Interrupted as interrupted:
        end_line(interrupted.number)
        # The next one ends the command.
        if isinstance(signals, CaughtSignals):
            signals.next(0)


def report(out: Path, recorded: Recorded, summary: Summary) -> None:
    """Print what is in the file."""
    what = f"{counted(summary.requests, 'request')} of {counted(summary.queues, 'queue')}"
    lost = f"; {counted(summary.lost, 'trace event')} lost" if summary.lost else ""
    ended = "; the process has ended meanwhile" if recorded.cut_off or recorded.process_ended else ""
    click.echo(f"{out}: {what}{lost}{ended}; open it at https://ui.perfetto.dev")


@contextlib.contextmanager
def replaced(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file that appears at the path when it is complete. Raises ClickException."""
    try:
        if path.exists() and not path.is_file():
            raise click.ClickException(f"{path}: is not a regular file; name another one with --out")
        with tempfile.NamedTemporaryFile(mode, dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file
                file.flush()
                os.chmod(file.name, 0o666 & ~umask())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise click.ClickException(
            f"{path}: cannot be written: {error.strerror}; name another one with --out"
        ) from None


def check_writable(path: Path) -> None:
    """Raises ClickException if `replaced` would now; nothing is left there."""

    class NotNow(Exception):
        pass

    with contextlib.suppress(NotNow), replaced(path):
        raise NotNow


def umask() -> int:
    """Of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
