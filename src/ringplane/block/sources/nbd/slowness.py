"""Servers that hang or are slow: requests wait for as long as that takes, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringplane.block.sources.nbd.link import Link

log = logging.getLogger(__name__)

# Seconds without a reply after which that is logged.
LONGEST_REPLY = 30.0


class Slowness:
    """Of the server of a disk, as far as it was logged."""

    def __init__(self, title: str, links: Sequence[Link]) -> None:
        """`links`: those of the disk, which may become more."""
        self._title, self._links = title, links
        self._logged = False

    def look(self) -> None:
        """Log whether a request waits for too long, or none does any more."""
        longest = max((link.waited() for link in self._links), default=0.0)
        if longest >= LONGEST_REPLY and not self._logged:
            log.warning("%s: the server has not replied to a request for %d s; the guest waits", self._title, longest)
        # If a connection was lost, that is logged instead; the I/O thread notes it before it ends the requests.
        elif longest < LONGEST_REPLY and self._logged and all(link.connection for link in self._links):
            log.info("%s: the server replies again", self._title)
        self._logged = longest >= LONGEST_REPLY
