"""Why an operation on a running server failed: what is wrong, where, and what would be right."""

from __future__ import annotations

# What is wrong, where, and what to do, when it is too late for any operation.
STOPPING = ("the process is stopping", "", "ask the process that replaces it, or start ringplane again")


class OperationError(Exception):
    """An operation that was not done. Its text is one line; nothing has changed, unless the line says otherwise."""

    def __init__(self, what: str, where: str = "", right: str = "") -> None:
        """`where`: the key or the disk that is wrong; `right`: the values that are possible, or what to do now."""
        super().__init__(f"{what}; {right}" if right else what)
        self.what, self.where, self.right = what, where, right


class WrongValue(OperationError):
    """A value that is not possible for anybody, at any time."""


class NoSuchDisk(OperationError):
    """No disk has the name."""


class NoSuchPolicy(OperationError):
    """The disk has no policy of the name."""


class WrongState(OperationError):
    """Impossible now, in the state of the disk or of the process."""


class Unavailable(OperationError):
    """It takes too long, or the process is too busy. It may still happen, as the text says."""
