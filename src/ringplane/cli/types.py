"""Types of the options' values, parsed by `ringplane.options`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ringplane.options.cpus import CPUS as CPU_LIST
from ringplane.options.durations import parse_seconds
from ringplane.options.image_address import RemoteImage, parse_image
from ringplane.options.sizes import parse_size
from ringplane.options.users import parse_user
from ringplane.system.command_line import hide


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """The type of values that `parse` returns for a text; its ValueError is the error message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ImageType(click.Path):
    """A path or the address of an image; the shell completes paths and the beginnings of addresses."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        addresses = [CompletionItem(begin) for begin in BEGINNINGS if begin.startswith(incomplete)]
        if incomplete and addresses:
            return addresses
        return [*addresses, *super().shell_complete(ctx, param, incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        image = Parsed("image", parse_image).convert(value, param, ctx)
        if isinstance(image, RemoteImage) and image != image.without_secrets:
            hide(str(value).removeprefix(image.title))
        return image


BEGINNINGS = ("nbd://", "nbd+unix:///", "rbd:")

# The shell completes it; the code that opens the file checks whether it exists.
FILE = click.Path(readable=False, path_type=Path)
IMAGE_TYPE = ImageType(readable=False)
FOLDER = click.Path(file_okay=False, readable=False, path_type=Path)
SIZE = Parsed("size", parse_size)
SECONDS = Parsed("seconds", lambda text: parse_seconds(text, 0.01))
WARM_UP = Parsed("seconds", lambda text: parse_seconds(text, 0))
CPUS = Parsed("list", CPU_LIST.parse)
USER = Parsed("user", parse_user)
