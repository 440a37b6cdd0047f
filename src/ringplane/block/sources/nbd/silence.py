"""Peers over TCP whose machine, or the network to it, is gone.

Keepalive (connecting.py) finds this out only while nothing is on its way. Otherwise the kernel sends it again for some
15 minutes (tcp_retries2). TCP_USER_TIMEOUT would shorten that, but it also ends a connection whose peer is alive and
does not read, because the process there is stopped or slow: its kernel answers that it has no room. There requests
wait, as they do if the buffers are not full. So the control plane looks at what the kernel knows of the connection.
"""

from __future__ import annotations

import socket
import struct

# Milliseconds without any acknowledgement: as long as keepalive takes (connecting.py). And those in which one for what
# was sent last may still come.
LONGEST_SILENCE, LAST_ANSWER = 25_000, 1000

# Seconds between two looks at a connection.
LOOK = 5.0

# The start of struct tcp_info: tcpi_probes, tcpi_unacked, tcpi_last_data_sent, tcpi_last_ack_recv.
TCP_INFO = struct.Struct("3xB20xI16xI8xI")

# Questions to a peer that has no room; the answer to the last one may be on its way.
MOST_PROBES = 1


def is_silent(sock: socket.socket) -> bool:
    """Whether the peer of a TCP connection has not acknowledged for so long what is sent again and again.

    Raises OSError.
    """
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    probes, unacknowledged, sent, acknowledged = TCP_INFO.unpack(information)
    # A peer without room for a part of the data acknowledges each repetition of it, but these are minutes apart.
    ignored = unacknowledged > 0 and LAST_ANSWER <= sent < acknowledged
    return bool(acknowledged >= LONGEST_SILENCE and (ignored or probes > MOST_PROBES))
