"""`ringplane ctl add`: a disk with the options of `ringplane serve`, or the disks of a file."""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringplane.cli.ctl.targets import as_json, asking, complete_io_threads
from ringplane.cli.parameters import blk_file, flag, on_command_line, parameters, the_image
from ringplane.cli.start_errors import usage_errors
from ringplane.cli.types import FILE
from ringplane.options.declare import declared
from ringplane.options.disk_config import DiskConfig, OneDisk, OwnThreads
from ringplane.options.image_address import TABLES, ImageAddress, image_of_table
from ringplane.options.sizes import format_size
from ringplane.options.toml_text import keys

if TYPE_CHECKING:
    from ringplane.client.client import Client

# The disk is served by I/O threads that there are already, at a socket of its own.
NOT_HERE = {*declared(OwnThreads), *(name for name, option in declared(DiskConfig).items() if not option.doc)}

WITH_PATHS = {option.key: option.kind for option in declared(DiskConfig).values() if option.kind.has_paths}


@click.command("add", short_help="Add a disk.")
@click.option("--file", type=FILE, metavar="FILE", help="Add the disks of this TOML file instead, its tables [[disk]].")
@blk_file
@parameters(OneDisk, leave_out=NOT_HERE)
@click.option(
    "--io-thread", "io_threads", metavar="NAME", multiple=True, shell_complete=complete_io_threads,
    help="An I/O thread that serves its queues; repeat it for the next queue [default: all].",
)  # fmt: skip
@as_json
@asking
def add_disk(client: Client, /, file: Path | None, as_json: bool, **options: Any) -> None:
    """Add a disk, with the options that it has for `ringplane serve`, and listen for its front end.

    Under the sandbox, its image and its socket must be below a folder of `ringplane serve --allow-folder`.
    """
    given = on_command_line(click.get_current_context(), options)
    if file is None:
        image = the_image(options.pop("blk_file"), options.pop("image_path"))
        _add(client, described(image, **options), as_json)
    elif given:
        raise click.UsageError(f"{', '.join(given)} cannot be given beside --file; write it into the file")
    else:
        for number, disk in enumerate(read_disks(file), 1):
            with _in_table(file, number):
                _add(client, disk, as_json)


def described(
    image: ImageAddress | None, socket_path: Path | None, io_threads: Sequence[str], **options: Any
) -> dict[str, Any]:
    """The keys of the disk that the options describe; raises UsageError."""
    if image is None or socket_path is None:
        raise click.UsageError(
            "give the image with --blk-file PATH and the socket with --socket-path PATH, or disks with --file FILE"
        )
    with usage_errors(_spelled):
        body = keys(DiskConfig(image, io_threads or ("all",), socket_path=socket_path, **options))
    return body | {"io-threads": io_threads} if io_threads else {key: body[key] for key in body if key != "io-threads"}


def _spelled(name: str) -> str:
    return "--io-thread" if name == "io_threads" else flag(name)


def read_disks(path: Path) -> list[dict[str, Any]]:
    """The tables [[disk]] of a file, with absolute paths; the API checks the rest. Raises ClickException."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.ClickException(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{path}: is not TOML: {error}") from None
    disks = document.pop("disk", None)
    if document:
        others = ", ".join(document)
        raise click.ClickException(f"{path}: only tables [[disk]] can be added; leave out {others}")
    if not isinstance(disks, list) or not all(isinstance(disk, dict) for disk in disks):
        raise click.ClickException(f"{path}: has no disk; a line [[disk]] begins each one")
    return [_absolute(disk, path.parent) for disk in disks]


def _absolute(disk: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths begin at the folder of the file, as for `ringplane serve --config`."""

    def absolute(path: Path) -> Path:
        return Path(os.path.abspath(folder / path))

    # If several keys say which image it is, all are passed on: the API reports that.
    images = disk.keys() & {"image", *TABLES}
    return dict(_with_absolute_paths(key, value, absolute, len(images) == 1) for key, value in disk.items())


def _with_absolute_paths(key: str, value: Any, absolute: Callable[[Path], Path], one_image: bool) -> tuple[str, Any]:
    # The API reports what is wrong.
    with contextlib.suppress(ValueError):
        if key in TABLES and one_image:
            return "image", image_of_table(key, value).with_paths(absolute).address
        if key in WITH_PATHS:
            kind = WITH_PATHS[key]
            return key, kind.to_toml(kind.with_paths(absolute, kind.from_toml(value)))
    return key, value


@contextlib.contextmanager
def _in_table(path: Path, number: int) -> Iterator[None]:
    """Errors name the place in the file."""
    from ringplane.client.api_errors import Refused

    try:
        yield
    except Refused as error:
        raise click.ClickException(f"{path}: [[disk]] {number}: {error}") from None


def _add(client: Client, body: Mapping[str, Any], as_json: bool) -> None:
    from ringplane.api.schemas import Disk

    data = client.ask("POST", "/v1/disks", body)
    if as_json:
        click.echo(data)
        return
    disk = client.decode(data, Disk)
    click.echo(f"{disk.name}: added, {format_size(disk.size)}, listening on {disk.socket}")
