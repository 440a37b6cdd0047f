"""`ringplane ctl record`, `mark`, `end-recording`: recordings of a disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringplane.cli.ctl.targets import as_json, asking, disk_name
from ringplane.cli.types import FILE
from ringplane.options.counted import counted

if TYPE_CHECKING:
    from ringplane.client.client import Client


@click.command("record", short_help="Record all changes of a disk.")
@disk_name
@click.argument("file", type=FILE)
@as_json
@asking
def record_disk(client: Client, name: str, file: Path, as_json: bool) -> None:
    """Record all that the guest changes on the disk NAME to the new FILE (docs/recordings.md).

    When the recording begins, no request is in flight. Prints the text with which marks of the guest begin.
    """
    from ringplane.api.schemas import Recording
    from ringplane.client.client import disk_path

    data = client.ask("POST", disk_path(name, "recording"), {"file": str(file.absolute())})
    if as_json:
        click.echo(data)
        return
    recording = client.decode(data, Recording)
    click.echo(f"{name}: recording to {recording.file}; a block that begins with {recording.token} is a mark")


@click.command("mark", short_help="Add a mark to a recording.")
@disk_name
@click.argument("text")
@as_json
@asking
def mark_recording(client: Client, name: str, text: str, as_json: bool) -> None:
    """Add a mark with this TEXT to the recording of the disk NAME."""
    from ringplane.client.client import disk_path

    client.ask("POST", disk_path(name, "recording/marks"), {"text": text})
    # The answer of the API has no body.
    if not as_json:
        click.echo(f"{name}: marked")


@click.command("end-recording", short_help="End the recording of a disk.")
@disk_name
@as_json
@asking
def end_recording(client: Client, name: str, as_json: bool) -> None:
    """End the recording of the disk NAME. Returns when its file is complete."""
    from ringplane.api.schemas import Recording
    from ringplane.client.client import disk_path

    data = client.ask("DELETE", disk_path(name, "recording"))
    if as_json:
        click.echo(data)
        return
    recording = client.decode(data, Recording)
    failed = f"; it had ended before, because of {recording.failed}" if recording.failed else ""
    click.echo(f"{name}: {recording.file} has {counted(recording.entries, 'request')} and marks{failed}")
