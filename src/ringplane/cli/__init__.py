"""The command line: one file for each command; each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import click

from ringplane import __version__
from ringplane.cli.demo import demo
from ringplane.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Virtual disks for virtual machines: a vhost-user-blk back end."""


main.add_command(serve)
main.add_command(demo)


def vhost_user_blk() -> None:
    """Entry point `ringplane-vhost-user-blk`: `ringplane serve` under the name that QEMU's conventions want."""
    serve(prog_name="ringplane-vhost-user-blk")
