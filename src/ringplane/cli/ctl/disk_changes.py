"""`ringplane ctl remove`, `resize`, `pause`, `resume`, `flush`, `limit`: changes of a disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ringplane.cli.ctl.targets import as_json, asking, disk_name
from ringplane.cli.types import SIZE, Parsed
from ringplane.options.limit_options import KEYS, parse_limit
from ringplane.options.sizes import format_size

if TYPE_CHECKING:
    from ringplane.client.client import Client

NONE = "none"

# What the API has for --detach.
DETACH = "detach=true"


@click.command("remove", short_help="Remove a disk.")
@disk_name
@click.option("--detach", is_flag=True, help="Also if a front end is attached: its guest loses the disk.")
@as_json
@asking
def remove_disk(client: Client, name: str, detach: bool, as_json: bool) -> None:
    """Stop serving the disk NAME. Its image is left as it is.

    It is removed when its requests in flight have completed, and not while a front end is attached, but for --detach.
    """
    from ringplane.client.api_errors import Refused
    from ringplane.client.client import disk_path

    try:
        client.ask("DELETE", disk_path(name) + (f"?{DETACH}" if detach else ""))
    except Refused as error:
        raise click.ClickException(str(error).replace(DETACH, "--detach")) from None
    # The answer of the API has no body.
    if not as_json:
        click.echo(f"{name}: removed")


@click.command("resize", short_help="Serve a new size of the image.")
@disk_name
@click.argument("size", type=SIZE, required=False)
@as_json
@asking
def resize_disk(client: Client, name: str, size: int | None, as_json: bool) -> None:
    """Make the image of the disk NAME SIZE bytes long, for example 20G, and serve this size.

    Without SIZE, serve the size that the image has now. The guest sees it at once. A file is only ever made longer.
    """
    from ringplane.api.schemas import Resized
    from ringplane.client.client import disk_path

    data = client.ask("POST", disk_path(name, "resize"), {"size": size})
    if as_json:
        click.echo(data)
        return
    resized = client.decode(data, Resized)
    same = "still " if resized.before == resized.size else f"{format_size(resized.before)}, now "
    click.echo(f"{name}: {same}{format_size(resized.size)}")


@click.command("pause", short_help="Let the requests of a disk wait.")
@disk_name
@as_json
@asking
def pause_disk(client: Client, name: str, as_json: bool) -> None:
    """Fetch no more requests of the disk NAME, until `ringplane ctl resume`.

    Returns when all that were fetched have completed: the image can be copied then. The guest's requests wait.
    """
    _act(client, name, "pause", "paused, no request is in flight", as_json)


@click.command("resume", short_help="End a pause.")
@disk_name
@as_json
@asking
def resume_disk(client: Client, name: str, as_json: bool) -> None:
    """Fetch requests of the disk NAME again, after `ringplane ctl pause`."""
    _act(client, name, "resume", "resumed", as_json)


@click.command("flush", short_help="Make all completed requests stable.")
@disk_name
@as_json
@asking
def flush_disk(client: Client, name: str, as_json: bool) -> None:
    """Make all completed requests of the disk NAME stable, as a flush of its guest does."""
    _act(client, name, "flush", "flushed", as_json)


def _act(client: Client, name: str, action: str, done: str, as_json: bool) -> None:
    from ringplane.client.client import disk_path

    data = client.ask("POST", disk_path(name, action))
    click.echo(data if as_json else f"{name}: {done}")


def _parse_change(text: str) -> tuple[str, Any] | None:
    """`total-iops-sec=20000`; `total-iops-sec=none` removes this limit, and `none` all: None."""
    if text == NONE:
        return None
    key, _, value = text.partition("=")
    return (key, None) if value == NONE and key in KEYS else parse_limit(text)


def _complete_change(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in (*(f"{key}=" for key in KEYS), NONE) if word.startswith(incomplete)]


@click.command("limit", short_help="Change or show the limits of a disk.")
@disk_name
@click.argument(
    "changes", type=Parsed("limit", _parse_change), nargs=-1, metavar="[KEY=VALUE...|none]",
    shell_complete=_complete_change,
)  # fmt: skip
@as_json
@asking
def limit_disk(client: Client, name: str, changes: Sequence[tuple[str, Any] | None], as_json: bool) -> None:
    """Change limits of the disk NAME, for example total-iops-sec=20000 or read-bytes-sec=100M.

    docs/limits.md lists the keys. KEY=none removes a limit, and with it its burst; none removes all. Without a change,
    shows the limits that hold now.
    """
    from ringplane.api.schemas import Disk
    from ringplane.cli.ctl.api_tables import limits_text
    from ringplane.client.client import disk_path

    if None in changes and len(changes) > 1:
        raise click.UsageError("none removes all limits; give it alone, or KEY=none for one of them")
    data = client.ask("GET", disk_path(name))
    if changes:
        limits = dict(filter(None, changes)) or dict.fromkeys(client.decode(data, Disk).limits)
        data = client.ask("PATCH", disk_path(name), {"limits": limits})
    click.echo(data if as_json else f"{name}: {limits_text(client.decode(data, Disk).limits)}")
