"""A page of commands with their output: the commands are typed into a terminal, and their new output can be kept.

The page can have files, too: a block behind "Save this as `NAME`:".
"""

import re
from collections.abc import Callable
from pathlib import Path

from .terminal import Terminal

HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"[Ss]ave this as `([^`\n]+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A line that ends with a backslash continues in the next one.
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)

# What rich sends before each picture of a whole screen, and the sequences that move the cursor and set colours.
HOME, SEQUENCE = "\x1b[H", re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
# A line that is erased, also from the next one, such as a progress bar.
ERASED = re.compile(r"[^\n]*(?:\n(?:\r|\x1b\[\?25h)*\x1b\[1A)?\x1b\[2K")


class FollowedPage:
    """Each section is followed once, in any order; `written` is the page with the output that came."""

    def __init__(self, path: Path, terminal: Terminal, folder: Path) -> None:
        """Files are saved in this folder."""
        self._terminal, self._folder = terminal, folder
        self._beginning, *sections = HEADING.split(path.read_text())
        self._sections = dict(zip(sections[::2], sections[1::2], strict=True))
        self._followed: dict[str, str] = {}

    def follow(self, heading: str) -> str:
        """Save the files of a section, then type its commands, whose statuses must be 0; returns their output."""
        for name, content in FILE.findall(self._sections[heading]):
            (self._folder / name).write_text(content)
        return self._play(heading, self._terminal.run)

    def watch(self, heading: str, pattern: str) -> str:
        """The same for a program that fills the screen until `q` is typed: when its output has matched the pattern."""

        def watch(command: str) -> str:
            start = len(self._terminal.text)
            self._terminal.type(command + "\n")
            self._terminal.wait_for(pattern, start)
            self._terminal.type("q")
            return last_screen(self._terminal.finish(start))

        return self._play(heading, watch)

    def _play(self, heading: str, run: Callable[[str], str]) -> str:
        outputs: list[str] = []

        def played(command: str) -> str:
            outputs.append(plain(run(command)))
            return f"$ {command}\n{outputs[-1]}"

        self._followed[heading] = BLOCK.sub(
            lambda block: "".join(map(played, COMMAND.findall(block[0]))), self._sections.pop(heading)
        )
        return "".join(outputs)

    def written(self) -> str:
        """The page."""
        assert not self._sections, f"not followed: {list(self._sections)}"
        return self._beginning + "".join(f"## {heading}{text}" for heading, text in self._followed.items())


def last_screen(text: str) -> str:
    """The last picture that was sent."""
    return text.rpartition(HOME)[2]


def plain(text: str) -> str:
    """Output without colours, what was erased, and the line by which the terminal knew its end."""
    shown = re.sub(r"ended-\d+ 0\r?\n\Z", "\n", SEQUENCE.sub("", ERASED.sub("", text))).strip("\r\n")
    return re.sub(r"[ \r]*\n", "\n", f"{shown}\n") if shown else ""
