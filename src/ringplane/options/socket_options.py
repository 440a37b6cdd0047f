"""The options of the socket at which a disk is served."""

from __future__ import annotations

from typing import Any

from ringplane.options.declare import Options, option
from ringplane.options.kinds import Kind, shown
from ringplane.options.users import GROUP, MODE


def _parse_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a valid integer.") from None


def _check_number(value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} is not the number of a file descriptor")


class SocketOptions(Options):
    """The socket's file, or the inherited socket."""

    socket_mode: int | None = option(
        MODE,
        default=None,
        help="Mode of the socket, for example 0660 [default: by the umask].",
        doc='the socket\'s mode in octal, `"0660"`',
        doc_default='from the umask, or `"0660"` with a `socket-group`',
    )
    socket_group: int | None = option(
        GROUP,
        default=None,
        help="Group of the socket; the mode is then 0660 by default.",
        doc='the socket\'s group, `"kvm"` or a number; needs root or a member of the group',
        doc_default="the group of the process",
    )
    fd: int | None = option(
        Kind("INTEGER", _parse_number, check=_check_number),
        default=None,
        help="File descriptor of an inherited socket, instead of --socket-path.",
    )
