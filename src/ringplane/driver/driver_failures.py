"""How a driver fails: a back end or its storage fails, does not answer, or breaks the protocol."""

from __future__ import annotations

from ringplane.driver.driver import Unsupported
from ringplane.driver.frontend import Refused, RingBroken
from ringplane.vhost_user.messages import ProtocolError

# Exceptions of the driver and of its loads.
FAILURES = (RingBroken, Refused, ProtocolError, Unsupported, OSError, ValueError, MemoryError, BufferError)


def reason(error: Exception) -> str:
    """One of them in words."""
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens at this socket; start the back end first"
    if isinstance(error, ProtocolError):
        return f"this is not the socket of a vhost-user back end, or the back end broke the protocol: {error}"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
