"""What answers without an end have in common."""

from __future__ import annotations

from starlette.types import Receive, Send


async def send_part(send: Send, data: bytes | memoryview) -> None:
    """Send a part of the body; returns when the client is ready for more."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
