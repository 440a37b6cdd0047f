"""`ringplane ctl list`, `show`, `io-threads`, `config`: what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ringplane.cli.ctl.targets import as_json, asking, disk_name

if TYPE_CHECKING:
    from ringplane.client.client import Client


@click.command("list", short_help="List the disks.")
@as_json
@asking
def list_disks(client: Client, as_json: bool) -> None:
    """List all disks, in the order in which they were added."""
    from ringplane.api.schemas import Disks
    from ringplane.cli.ctl.api_tables import print_disks

    data = client.ask("GET", "/v1/disks")
    if as_json:
        click.echo(data)
    else:
        answer = client.decode(data, Disks)
        print_disks(answer.disks, answer.not_served)


@click.command("show", short_help="Show a disk.")
@disk_name
@as_json
@asking
def show_disk(client: Client, name: str, as_json: bool) -> None:
    """Show the disk NAME: its state, size, limits, counters and rings."""
    from ringplane.api.schemas import Disk
    from ringplane.cli.ctl.api_tables import print_disk
    from ringplane.client.client import disk_path

    data = client.ask("GET", disk_path(name))
    if as_json:
        click.echo(data)
    else:
        print_disk(client.decode(data, Disk))


@click.command("io-threads", short_help="List the I/O threads.")
@as_json
@asking
def list_io_threads(client: Client, as_json: bool) -> None:
    """List the I/O threads, and the disks that they serve."""
    from ringplane.api.schemas import IoThreads
    from ringplane.cli.ctl.api_tables import print_io_threads

    data = client.ask("GET", "/v1/io-threads")
    if as_json:
        click.echo(data)
    else:
        print_io_threads(client.decode(data, IoThreads).io_threads)


@click.command("config", short_help="Print the configuration file that would make what runs.")
@click.option("--json", "as_json", is_flag=True, help="Print its tables as JSON.")
@asking
def show_config(client: Client, as_json: bool) -> None:
    """Print the configuration file (TOML) with which `ringplane serve --config` would make what runs now."""
    text = client.ask("GET", "/v1/config").decode()
    if as_json:
        import json
        import tomllib

        text = json.dumps(tomllib.loads(text)) + "\n"
    click.echo(text, nl=False)
