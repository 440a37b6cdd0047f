"""What a client of an NBD server costs that does nothing but copy: a floor for back ends, which have a virtqueue too.

    python benchmarks/nbd_floor.py nbd+unix:///disk?socket=/run/nbd.sock
    python benchmarks/nbd_floor.py --write nbd://127.0.0.1/disk        (ALL DATA IN IT IS LOST)

It keeps a number of requests in flight, receives simple replies of known size into one buffer, as many at a time as
there are, and looks at none of them. The figures are the least CPU time of this process per request in some rounds, and
the most requests per second.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import click

from ringplane.block.sources.nbd.connecting import find_places
from ringplane.block.sources.nbd.protocol import (
    CMD_READ,
    CMD_WRITE,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    OPT_EXPORT_NAME,
    OPTION_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_SIZE,
)
from ringplane.options.nbd_uri import parse

DEPTHS, SIZES = (1, 32, 128), (4 << 10, 64 << 10)
# How much is received at a time, and how many requests are sent.
ROOM, AT_ONCE = 256 << 10, 16
# Seconds until a server that does not answer is given up.
PATIENCE = 10
REQUEST = struct.Struct(">IHHQQI")
# The greeting of a server, and what it says of an export after NBD_OPT_EXPORT_NAME.
GREETING_SIZE, EXPORT_SIZE = 18, 10


@dataclass
class Client:
    """A connection, with requests of one kind."""

    sock: socket.socket
    blocks: int
    command: int
    size: int

    def measure(self, depth: int, seconds: float) -> tuple[float, float]:
        """Requests per second, and microseconds of CPU time per request."""
        offsets = self._offsets()
        reply = SIMPLE_SIZE + (self.size if self.command == CMD_READ else 0)
        room, received, free, done = memoryview(bytearray(ROOM)), 0, 0, 0
        begin, cpu = time.monotonic(), time.process_time()
        self._send(offsets, depth)
        while free < depth:
            received += self.sock.recv_into(room) or _closed()
            free += received // reply
            done += received // reply
            received %= reply
            if time.monotonic() < begin + seconds:
                self._send(offsets, free)
                free = 0
        return done / (time.monotonic() - begin), (time.process_time() - cpu) / done * 1e6

    def _offsets(self) -> Iterator[int]:
        """Random for small requests, as in the tables."""
        chance = random.Random(1)
        if self.size == SIZES[0]:
            return (chance.randrange(self.blocks) * self.size for _ in itertools.count())
        return (number % self.blocks * self.size for number in itertools.count())

    def _send(self, offsets: Iterator[int], count: int) -> None:
        data = bytes(self.size) if self.command == CMD_WRITE else b""
        while count > 0:
            parts: list[bytes] = []
            for offset in itertools.islice(offsets, min(count, AT_ONCE)):
                parts += [REQUEST.pack(REQUEST_MAGIC, 0, self.command, 0, offset, self.size), data]
            count -= AT_ONCE
            sent = self.sock.sendmsg(parts)
            whole = sum(map(len, parts))
            if sent < whole:
                self.sock.sendall(b"".join(parts)[sent:])


def connect(address: str, command: int, size: int) -> Client:
    """Connect, and negotiate nothing: so replies are simple. Raises OSError."""
    uri = parse(address)
    family, place = find_places(uri)[0]
    sock = socket.socket(family)
    # Not settimeout(), with which Python calls poll(2) before each call that is measured.
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", PATIENCE, 0))
    sock.connect(place)
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _receive(sock, GREETING_SIZE)
    name, flags = uri.export.encode(), FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
    sock.sendall(struct.pack(">IQII", flags, OPTION_MAGIC, OPT_EXPORT_NAME, len(name)) + name)
    (capacity,) = struct.unpack_from(">Q", _receive(sock, EXPORT_SIZE))
    return Client(sock, capacity // size, command, size)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL)
    return data if len(data) == size else _closed()


def _closed() -> NoReturn:
    raise ConnectionError("the server has closed the connection; check the name of the export, and its log")


@click.command()
@click.argument("address")
@click.option("--write", "writes", is_flag=True, help="Write. ALL DATA IN IT IS LOST.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Length of a round.")
def main(address: str, writes: bool, rounds: int, seconds: float) -> None:
    """Print the floor of each size and depth at an ADDRESS."""
    kind, command = ("writes", CMD_WRITE) if writes else ("reads", CMD_READ)
    for size, depth in itertools.product(SIZES, DEPTHS):
        with server_errors(address):
            client = connect(address, command, size)
            found = [client.measure(depth, seconds) for _ in range(rounds)]
            client.sock.close()
        rate, cost = max(rate for rate, _ in found), min(cost for _, cost in found)
        click.echo(f"{size >> 10} KiB {kind}, depth {depth}: {cost:.2f} us CPU, {rate / 1000:.1f} k IOPS")


@contextlib.contextmanager
def server_errors(address: str) -> Iterator[None]:
    """Raises ClickException."""
    try:
        yield
    except BlockingIOError:
        raise click.ClickException(f"{address}: no answer within {PATIENCE} s; see whether the server hangs") from None
    except OSError as error:
        raise click.ClickException(f"{address}: {error}") from None


if __name__ == "__main__":
    main()
