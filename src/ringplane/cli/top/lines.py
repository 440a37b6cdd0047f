"""Lines of the screen: pieces of text with their styles."""

from __future__ import annotations

# A text, and how it looks (a style of rich).
Piece = tuple[str, str]
Line = list[Piece]

HEADING, CHOSEN, REMARK, TROUBLE, STALE, SPARKS = "bold", "bold reverse", "dim", "bold yellow", "dim", "cyan"


def plain(line: Line) -> str:
    """Without styles."""
    return "".join(text for text, _ in line).rstrip()


def cut(line: Line, width: int) -> Line:
    """At most `width` characters of it."""
    pieces: Line = []
    for text, style in line:
        pieces.append((text[:width], style))
        width -= len(text)
        if width <= 0:
            break
    return pieces


def shortened(name: str, width: int) -> str:
    """A name in at most so many characters: its middle is left out, because names differ mostly at their end."""
    end = width // 2
    return name if len(name) <= width else f"{name[: width - end - 1]}~{name[len(name) - end :]}"
