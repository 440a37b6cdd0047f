"""An answer that is made while it is sent: never in memory as a whole, and other clients are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import chain

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringplane.api.streams import send_part

# Characters that are sent together.
PORTION = 1 << 18


class LongText(Response):
    """The text has these pieces. The first one is made at once: if that fails, nothing has been sent."""

    def __init__(self, pieces: Iterator[str], media_type: str) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._pieces = chain([next(pieces)], pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for portion in portions(self._pieces):
            await send_part(send, portion.encode())
            # Clients that wait are served meanwhile.
            await asyncio.sleep(0)
        await send({"type": "http.response.body"})


def portions(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that are not short, except for the last one."""
    some: list[str] = []
    for piece in pieces:
        some.append(piece)
        if sum(map(len, some)) >= PORTION:
            yield "".join(some)
            some = []
    yield "".join(some)
