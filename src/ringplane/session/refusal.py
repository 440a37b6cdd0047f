"""Requests that cannot be carried out, and their negative replies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ringplane.vhost_user.messages import Request
from ringplane.vhost_user.payloads import U64, Empty, Inflight, Opaque, Payload, VringFd


class Refused(Exception):
    """A request that cannot be carried out; the text says why. The front end gets a negative reply, if any."""


# The negative reply to requests that always get a reply: failed, with no fd.
NEGATIVE_REPLIES: dict[int, Payload] = {
    Request.GET_CONFIG: Empty(),
    Request.GET_SHARED_OBJECT: Opaque(),
    Request.SET_LOG_BASE: U64(1),
    Request.GET_INFLIGHT_FD: Inflight(0, 0, 0, 0),
    Request.SET_DEVICE_STATE_FD: U64(1 | VringFd.NO_FD),
    Request.CHECK_DEVICE_STATE: U64(1),
}


@contextlib.contextmanager
def refusing_timeouts(why: str) -> Iterator[None]:
    """Turn a TimeoutError inside into a Refused."""
    try:
        yield
    except TimeoutError:
        raise Refused(why) from None
