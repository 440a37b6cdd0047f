"""Source `nbd`: an export of a server that speaks the NBD protocol (doc/proto.md of the specification).

The handshake is ordinary Python (handshake.py, connecting.py). Afterwards the connection belongs to an I/O thread,
whose compiled code makes requests of block I/Os (nbd_requests.py), sends them and receives replies (sending.py,
receiving.py), from and to the memory of guests. A link (link.py, layout.py) is this part of a disk for one I/O thread.
It outlives its connections (losing.py), which the control plane makes (reconnecting.py). `nbd_source.py` puts
everything together.
"""
