"""What `ringplane serve` shall serve, and what the process has beside it: from its options, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ringplane.cli.parameters import flag, on_command_line, the_image
from ringplane.cli.start_errors import usage_errors
from ringplane.options.api_options import ApiOptions
from ringplane.options.declare import declared
from ringplane.options.disk_config import DiskConfig, OneDisk, OwnThreads
from ringplane.options.image_address import ImageAddress
from ringplane.options.metrics_options import MetricsOptions
from ringplane.options.thread_options import IoThread

if TYPE_CHECKING:
    from ringplane.control.config import Config

Given = TypeVar("Given")

# Disks, and the threads that serve them.
Disks = tuple[Sequence[DiskConfig], Sequence[IoThread]]


@dataclass(frozen=True, slots=True)
class Described:
    """Like a Config (control/config.py), which is imported only for a file."""

    disks: Sequence[DiskConfig]
    io_threads: Sequence[IoThread]
    api: ApiOptions | None
    metrics: MetricsOptions | None
    state: Path | None
    # Of the one disk that options describe.
    image: ImageAddress | None = None


def describe(context: click.Context, config: Path | None, options: dict[str, Any]) -> Described:
    """What these options describe, together with the file `config`. Raises ClickException."""
    image = options["image_path"] = the_image(options.pop("blk_file"), options["image_path"])
    api = _api_options(**{name: options.pop(f"api_{name}") for name in declared(ApiOptions)})
    listen, state = options.pop("metrics_listen"), options.pop("state")
    metrics = MetricsOptions(listen) if listen is not None else None
    if config is None:
        disks, io_threads = _disks(context, api is not None, options)
        return Described(disks, io_threads, api, metrics, state, image)
    _refuse_other_options(context)
    file = _read(config)
    return Described(
        file.disks,
        file.io_threads,
        _only(config, "a table [api]", file.api, api, "--api-socket"),
        _only(config, "a table [metrics]", file.metrics, metrics, "--metrics"),
        _only(config, "a key state", file.state, state, "--state"),
    )


def _disks(context: click.Context, with_api: bool, options: dict[str, Any]) -> Disks:
    """Those that the options describe: one, or none if disks can be added later. Raises UsageError."""
    if options["image_path"] is None and with_api:
        return [], _threads_alone(context, options)
    return _one_disk(**options)


def _one_disk(image_path: ImageAddress | None, **options: Any) -> Disks:
    """The one disk that the options describe; raises UsageError."""
    if image_path is None:
        raise click.UsageError(
            "give the image with --blk-file PATH or --image ADDRESS, several disks with --config FILE, or "
            "--api-socket PATH to add disks later"
        )
    with usage_errors():
        disk = OneDisk(image_path, **options)
        return [disk.config()], disk.own_threads()


def _api_options(socket: Path | None, **others: Any) -> ApiOptions | None:
    """Those of the API, if there is to be one; raises UsageError."""
    if socket is not None:
        with usage_errors(_flag_of_api):
            return ApiOptions(socket, **others)
    for name, value in others.items():
        if value not in ((), None):
            raise click.UsageError(f"{_flag_of_api(name)} is for the socket of {flag('api_socket')}")
    return None


def _flag_of_api(name: str) -> str:
    """How the command line spells an option of the API."""
    flags = declared(ApiOptions)[name].flags
    return flags[0] if flags else flag(f"api_{name}")


def _threads_alone(context: click.Context, options: dict[str, Any]) -> Sequence[IoThread]:
    """The I/O threads of a process that begins without a disk; raises UsageError for options of a disk."""
    if given := on_command_line(context, declared(OneDisk).keys() - declared(OwnThreads).keys()):
        raise click.UsageError(
            f"{', '.join(given)}: only for a disk that is described here; add its image with --blk-file or --image, or "
            "leave this out and give it to `ringplane ctl add`"
        )
    with usage_errors():
        return OwnThreads(**{name: options[name] for name in declared(OwnThreads)}).threads()


def _refuse_other_options(context: click.Context) -> None:
    """Raise UsageError for options of a single disk beside --config: they belong in the file."""
    if given := on_command_line(context, [*declared(OneDisk), "blk_file"]):
        raise click.UsageError(f"{', '.join(given)} cannot be given beside --config; write it into the file")


def _read(path: Path) -> Config:
    """The contents of a configuration file; raises ClickException if it cannot be used."""
    from ringplane.control.config import ConfigError, read_config

    try:
        return read_config(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _only(path: Path, what: str, in_file: Given | None, given: Given | None, flag: str) -> Given | None:
    """What a file has, or the command line; raises UsageError for both."""
    if in_file is not None and given is not None:
        raise click.UsageError(f"{path} has {what} already; leave out {flag}")
    return given or in_file
