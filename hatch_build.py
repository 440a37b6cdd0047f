"""A step of building the wheel: man pages, made from the definitions of the command line."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# click keeps the line breaks of a paragraph that follows this mark; groff calls that "no fill".
VERBATIM = re.compile(r"^\x08\n(.*?)\n(?=\.PP$|\.SH)", re.DOTALL | re.MULTILINE)


class ManPages(BuildHookInterface):
    """Adds share/man/man1."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ringplane-man-")
        sys.path.insert(0, str(Path(self.root) / "src"))
        write(Path(self._folder.name))
        for page in Path(self._folder.name).iterdir():
            build_data["shared_data"][str(page)] = f"share/man/man1/{page.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._folder.cleanup()


def write(folder: Path) -> None:
    """One page for each command, and one for the program under its other name."""
    import click
    from click_man.core import write_man_pages

    from ringplane import __version__
    from ringplane.cli.commands import main
    from ringplane.cli.serve import serve

    context = click.Context(main)
    # click-man looks for all commands in the group's table.
    main.commands = {name: main.get_command(context, name) for name in main.list_commands(context)}
    for name, command in (("ringplane", main), ("ringplane-vhost-user-blk", serve)):
        write_man_pages(name, command, version=__version__, target_dir=str(folder))
    for page in folder.iterdir():
        page.write_text(VERBATIM.sub(r".nf\n\1\n.fi\n", page.read_text()))
