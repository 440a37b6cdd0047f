"""`ringplane check`: check a configuration file without serving its disks."""

from __future__ import annotations

from pathlib import Path

import click

from ringplane.cli.start_errors import start_errors
from ringplane.cli.types import FILE, USER
from ringplane.options.counted import counted
from ringplane.options.users import User
from ringplane.system import open_files


@click.command(short_help="Check a configuration file.")
@click.argument("file", type=FILE)
@click.option("--user", type=USER, metavar="NAME[:GROUP]", help="The user that `ringplane serve` shall change to.")
def check(file: Path, user: User | None) -> None:
    """Check the configuration FILE of `ringplane serve --config` without serving its disks.

    Prints a line for each problem and exits with status 1, or prints "ok" and exits with status 0. Nothing is created
    or changed. Run it as the user that will start the server, with the same --user: files that this user may not open
    are problems, and so are sockets and images that are in use.
    """
    with start_errors():
        open_files.raise_limit()
        from ringplane.control.config import examine
        from ringplane.control.rehearsal import find_problems

        config, problems = examine(file)
        problems += [f"{file}: {problem}" for problem in find_problems(config, user)]
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise SystemExit(1)
    click.echo(f"ok: {counted(len(config.disks), 'disk')}, {counted(len(config.io_threads), 'I/O thread')}")
