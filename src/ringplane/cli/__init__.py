"""The command line: one file for each command, imported when it runs, so that each starts quickly."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import click

from ringplane import __version__

COMMANDS = ("serve", "check", "demo", "bench")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What can be wrong with an installation, whatever the command."""
    try:
        yield
    except ImportError as error:
        if type(error).__name__ != "UnsupportedNumba":
            raise
        raise SystemExit(f"Error: {error}") from None


class Commands(click.Group):
    """The group of COMMANDS: each is the function of its name in the file of its name."""

    def __init__(self, **options: Any) -> None:
        # Not what runs, which `get_command` imports: names from which click suggests one for a mistyped command.
        super().__init__(commands=[click.Command(name) for name in COMMANDS], **options)

    def main(self, *args: Any, **options: Any) -> Any:
        with errors_in_one_line():
            return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"ringplane.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=Commands,
    short_help="Virtual disks for virtual machines.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def main() -> None:
    """Virtual disks for virtual machines: a vhost-user-blk back end."""


def vhost_user_blk() -> None:
    """Entry point `ringplane-vhost-user-blk`: `ringplane serve` under the name that QEMU's conventions want."""
    from ringplane.cli.serve import serve

    with errors_in_one_line():
        serve(prog_name="ringplane-vhost-user-blk")
