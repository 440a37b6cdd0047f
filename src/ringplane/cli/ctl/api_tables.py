"""Answers of the API for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import click

from ringplane.api.schemas import Disk, EventData, IoThreadState, NotServed, Policy
from ringplane.log.logs import CONTROL_CHARACTERS
from ringplane.options.counted import counted
from ringplane.options.cpus import format_cpus
from ringplane.options.sizes import format_size
from ringplane.options.toml_text import toml

# Columns that narrow terminals break into several lines; all others are whole.
FOLDED = ("IMAGE", "SOCKET", "DISKS", "POLICY", "PARAMETERS", "COUNTERS")

# Where nobody looks at the end of lines, they are as long as they need to be.
UNLIMITED = 10_000


def print_disks(disks: Iterable[Disk], not_served: Sequence[NotServed] = ()) -> None:
    """A line for each, and why some are not served."""
    rows = [(disk.name, _state(disk), format_size(disk.size), disk.image, disk.socket or "inherited") for disk in disks]
    rows += [(each.name, "not served", "", each.image, each.socket) for each in not_served]
    if rows:
        _print_table(("NAME", "STATE", "SIZE", "IMAGE", "SOCKET"), rows)
    else:
        click.echo("there is no disk; ringplane ctl add adds one", err=True)
    for each in not_served:
        remark = f"{each.name}: not served: {each.why}; the next start tries again, ringplane ctl remove gives it up"
        click.echo(_printable(remark), err=True)


def print_disk(disk: Disk) -> None:
    """A line for each property, and the counters and rings."""
    for name, value in _properties(disk):
        click.echo(f"{name:<12}{_printable(value)}".rstrip())
    if counted_kinds := [(kind, each) for kind, each in disk.counters.items() if each.requests]:
        click.echo()
        rows = [
            (kind, f"{each.requests:,}", f"{each.errors:,}", format_size(each.bytes) if each.bytes else "")
            for kind, each in counted_kinds
        ]
        _print_table(("REQUESTS", "COMPLETED", "ERRORS", "BYTES"), rows, right=(1, 2, 3))
    if disk.rings:
        click.echo()
        rings = [(str(ring.queue), ring.state, str(ring.in_flight)) for ring in disk.rings]
        _print_table(("RING", "STATE", "IN FLIGHT"), rings, right=(2,))


def print_io_threads(threads: Iterable[IoThreadState]) -> None:
    """A line for each."""
    rows = [
        (
            thread.name,
            thread.engine,
            "all" if thread.cpus is None else format_cpus(frozenset(thread.cpus)),
            "always" if thread.poll_us is None else str(thread.poll_us),
            str(thread.queues),
            ", ".join(thread.disks) or "-",
        )
        for thread in threads
    ]
    _print_table(("NAME", "ENGINE", "CPUS", "POLL-US", "QUEUES", "DISKS"), rows, right=(3, 4))


def print_policies(policies: Iterable[Policy]) -> None:
    """A line for each."""
    rows = [
        (
            each.name,
            "on" if each.enabled else "off",
            each.policy,
            pairs_text(each.parameters),
            pairs_text(each.counters),
        )
        for each in policies
    ]
    if rows:
        _print_table(("NAME", "STATE", "POLICY", "PARAMETERS", "COUNTERS"), rows)
    else:
        click.echo("the disk has no policy; ringplane ctl policy add adds one", err=True)


def pairs_text(pairs: Mapping[str, object]) -> str:
    """As users write them."""
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def limits_text(limits: dict[str, int | str]) -> str:
    """As `ringplane ctl limit` takes them."""
    return pairs_text(limits) or "none"


def event_text(event: EventData) -> str:
    """A line, with the time as in log lines."""
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = (
        f"{key}={'none' if value == {} else toml(value)}"
        for key, value in event.fields.items()
        if value not in (None, "")
    )
    return _printable(" ".join([when, event.disk or "-", event.kind, *fields]))


def _properties(disk: Disk) -> Iterator[tuple[str, str]]:
    yield "name", disk.name
    yield "image", disk.image
    yield "socket", disk.socket or "inherited"
    yield "state", _state(disk)
    yield "front end", disk.front_end or "none"
    yield "size", f"{format_size(disk.size)} ({disk.size} bytes)"
    yield "blocks", f"{disk.block_size} bytes{', read-only' if disk.read_only else ''}"
    yield "serial", disk.serial
    yield "I/O", disk.how
    yield "queues", f"{disk.queues} on {', '.join(dict.fromkeys(disk.io_threads))}"
    yield "in flight", counted(disk.in_flight, "request")
    yield "limits", limits_text(disk.limits)
    if disk.throttled_seconds:
        yield "at limit", f"{disk.throttled_seconds:.1f} seconds"


def _state(disk: Disk) -> str:
    remarks = [("paused", disk.paused), ("flush failed", disk.flush_failed)]
    trouble = [disk.trouble] if disk.trouble else []
    return ", ".join([disk.state, *(remark for remark, holds in remarks if holds), *trouble])


def _print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    # rich takes a while to import, and not each command prints a table.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else UNLIMITED, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, heading in enumerate(headings):
        justify = "right" if position in right else "left"
        whole = heading not in FOLDED
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=whole)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _printable(text: str) -> str:
    """A path can contain what a terminal would obey."""
    return text.translate(CONTROL_CHARACTERS)
