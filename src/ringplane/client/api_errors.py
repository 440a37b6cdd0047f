"""Why the API did not do what it was asked for. The text of each error is one line: what, where, what to do now."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from ringplane.options.users import format_user

# sun_path (unix(7)), without the zero at its end.
LONGEST_PATH = 107


class ApiError(Exception):
    """A request was not carried out."""


class Refused(ApiError):
    """The API has answered with an error."""

    def __init__(self, what: str, where: str, right: str) -> None:
        # Some sentences name the place already.
        place = "" if not where or what.startswith((f"{where}:", f"{where} is missing")) else f"{where}: "
        super().__init__(f"{place}{what}{f'; {right}' if right else ''}")
        self.what, self.where, self.right = what, where, right


class NoConnection(ApiError):
    """There is no answer: nobody listens, the connection ended, or the other end is not an API of ringplane."""


def not_connected(path: Path, error: OSError) -> NoConnection:
    """The error for a connect(2) that has failed."""
    return NoConnection(f"{path}: {_why(path, error)}")


def _why(path: Path, error: OSError) -> str:
    if error.errno is None and not isinstance(error, TimeoutError):
        # Python checks the length itself.
        return f"the path of a socket has at most {LONGEST_PATH} bytes; give a shorter one"
    if error.errno == errno.ENOENT:
        return "no such socket; is ringplane running with this --api-socket?"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied; use the API as {_owner(path)}, as root, or as a member of its --api-socket-group"
    if error.errno == errno.ECONNREFUSED and _is_socket(path):
        return "nobody listens there, the process has ended; start ringplane again"
    if error.errno == errno.ECONNREFUSED:
        return "this is not a socket; give the path of --api-socket"
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return "the process does not accept connections; does it hang, or is it stopped?"
    return f"cannot connect: {error.strerror}; give the path of --api-socket"


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return True


def _owner(path: Path) -> str:
    try:
        return format_user(path.stat().st_uid)
    except OSError:
        return "its owner"
