"""Names the operation that failed with a system error, because the kernel's own message does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Add a note to an OSError from the block: `cannot WHAT`."""
    try:
        yield
    except OSError as error:
        error.add_note(f"cannot {what}")
        raise
