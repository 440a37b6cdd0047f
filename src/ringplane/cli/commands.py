"""The command line: one file for each command, imported when it runs, so that each starts quickly."""

from __future__ import annotations

import importlib
from typing import Any

import click

from ringplane import __version__
from ringplane.system.signals import CaughtSignals

COMMANDS = ("serve", "ctl", "top", "trace", "policy", "export", "replay", "crash", "check", "demo", "bench", "compile")
# These commands check for signals themselves; a signal ends the others at any point: they leave nothing half made.
INTERRUPTIBLE = ("serve", "top", "trace", "replay", "crash", "demo", "bench", "compile")


class Commands(click.Group):
    """The group of COMMANDS: each is a function with the name of its file."""

    def __init__(self, **options: Any) -> None:
        # Only names, from which click suggests one for a mistyped command; `get_command` imports the commands.
        super().__init__(commands=[click.Command(name) for name in COMMANDS], **options)

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
@click.pass_context
def main(context: click.Context) -> None:
    """Virtual disks for virtual machines: a vhost-user-blk back end."""
    if context.invoked_subcommand not in INTERRUPTIBLE and isinstance(context.obj, CaughtSignals):
        context.obj.end_at_once()
