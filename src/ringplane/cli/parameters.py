"""The options of a command that are declared in `ringplane.options`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ringplane.cli.types import FILE, IMAGE_TYPE, Parsed
from ringplane.options.declare import Option, Options, dashed, declared
from ringplane.options.image_address import IMAGE, ImageAddress
from ringplane.options.kinds import FLAG, PATH, PATHS, Kind, OneOf, Whole

# What the shell completes.
TYPES: dict[Kind, click.Path] = {PATH: FILE, PATHS: FILE, IMAGE: IMAGE_TYPE}

Function = TypeVar("Function", bound=Callable[..., Any])


def flag(name: str) -> str:
    """How the command line spells the option of this name."""
    return f"--{dashed(name)}"


def parameters(
    group: type[Options], prefix: str = "", leave_out: Collection[str] = (), **special: dict[str, Any]
) -> Callable[[Function], Function]:
    """A decorator: the command has the options of a group, with this prefix of their names, but for those to leave out.

    `special` are more of click's arguments for some of them.
    """

    def decorate(function: Function) -> Function:
        # Decorators are applied from the last to the first.
        for option in reversed(declared(group).values()):
            if option.help and option.name not in leave_out:
                name = prefix + option.name
                flags = option.flags or (flag(name),)
                more = {**_arguments(option), **special.get(option.name, {})}
                function = click.option(*flags, name, help=option.help, **more)(function)
        return function

    return decorate


def _arguments(option: Option) -> dict[str, Any]:
    """click's arguments for the values of an option."""
    kind = option.kind
    if kind is FLAG:
        return {"is_flag": True, "default": option.default}
    arguments = _of_kind(kind)
    if option.several:
        return {**arguments, "multiple": True, "callback": lambda _, __, given: option.several(given)}
    if option.default in (None, MISSING):
        return arguments
    return {**arguments, "default": str(option.default), "show_default": True}


def _of_kind(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, Whole):
        return {"type": click.IntRange(kind.lowest, kind.highest)}
    if isinstance(kind, OneOf):
        return {"type": click.Choice(list(kind.choices)), "callback": lambda _, __, given: kind.parse(given)}
    return {"type": TYPES[kind] if kind in TYPES else Parsed(kind.metavar, kind.parse), "metavar": kind.metavar}


def blk_file(function: Function) -> Function:
    """A decorator: the command has `--blk-file`, QEMU's name of an image that is a file or block device here."""
    help = "Raw image file or block device to serve; always a path."
    return click.option("--blk-file", type=FILE, metavar="PATH", help=help)(function)


def the_image(blk_file: Path | None, image_path: ImageAddress | None) -> ImageAddress | None:
    """Of `--blk-file` and `--image` the one that is given, if one is; raises UsageError for both."""
    if blk_file is not None and image_path is not None:
        raise click.UsageError("--blk-file and --image are both the image of the disk; give one of them")
    return blk_file if blk_file is not None else image_path


def on_command_line(context: click.Context, names: Collection[str]) -> list[str]:
    """The options of these names that are given, as the command line spells them."""
    return [
        "/".join([parameter.opts[0], *parameter.secondary_opts])
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
