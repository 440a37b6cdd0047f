"""Flushes of the control plane, and whether any flush of a source has failed.

After one that failed no other may succeed, whoever asks for it (flush.py). Compiled code stores that in a field of a
record, which the control plane reads, and sets as well.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt


class Flushes:
    """The field `flush_failed` of a source's record, which is never cleared."""

    def __init__(self, record: npt.NDArray[np.void]) -> None:
        self._record = record

    @property
    def failed(self) -> bool:
        """Whether earlier writes may be lost, so that every flush must fail."""
        return bool(self._record["flush_failed"][0])

    def set_failed(self) -> None:
        """Make every flush fail from now on."""
        self._record["flush_failed"] = 1

    def make(self, flush: Callable[[], object]) -> None:
        """Call `flush`, whose every error means that writes may be lost. Raises OSError."""
        with self.checked():
            try:
                flush()
            except OSError:
                self.set_failed()
                raise

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """A flush is made in this `with`. Raises OSError if one has failed: before it, or meanwhile for a guest."""
        self._check("before")
        yield
        self._check("meanwhile")

    def _check(self, when: str) -> None:
        if self.failed:
            raise OSError(errno.EIO, f"a flush failed {when}")
