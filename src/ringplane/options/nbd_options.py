"""The options of the source `nbd`."""

from __future__ import annotations

from ringplane.options.declare import Options, option
from ringplane.options.kinds import Whole

# A day
LONGEST_DELAY = 86_400


class NbdOptions(Options):
    """How the connection to an NBD server is treated."""

    nbd_reconnect_delay: int = option(
        Whole(0, LONGEST_DELAY),
        default=0,
        help="Seconds for which requests wait for a lost connection to an NBD server; then, or with 0, they fail.",
        doc="seconds for which requests wait when the connection to an NBD server is lost; then, or with 0 at once, "
        "they fail with an I/O error ([remote.md](remote.md#failures))",
    )
