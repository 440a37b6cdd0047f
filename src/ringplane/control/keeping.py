"""The changes of a server are kept in a file: each before whoever asked for it has an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from ringplane.control.operation_errors import Unavailable
from ringplane.control.present_changes import changes_of
from ringplane.control.server import Server
from ringplane.control.state_file import StateError, StateFile
from ringplane.system.aside import NoThread, aside

log = logging.getLogger(__name__)


class Keeping:
    """Stores them. Used on the control thread."""

    def __init__(self, server: Server, state: StateFile) -> None:
        self._server, self._state = server, state
        self._storing = asyncio.Lock()

    async def store(self) -> None:
        """Raises Unavailable."""
        try:
            async with self._storing:
                await aside(partial(self._state.store, changes_of(self._server)))
        except (StateError, NoThread) as error:
            log.error("what is changed is not kept for the next start: %s", error)
            raise Unavailable(
                f"done, but not kept for the next start: {error}", "state", "remove the cause, then make any change"
            ) from None

    async def store_now(self) -> None:
        """As `store`; the log alone has the error."""
        with contextlib.suppress(Unavailable):
            await self.store()
