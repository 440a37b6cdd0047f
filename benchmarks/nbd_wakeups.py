"""What the system calls of an NBD back end cost at depth 1, where each request wakes it up twice: another floor.

    python benchmarks/nbd_wakeups.py nbd+unix:///disk?socket=/run/nbd.sock
    python benchmarks/nbd_wakeups.py --write nbd://127.0.0.1/disk          (ALL DATA IN IT IS LOST)

A driver in another process kicks. A compiled function sleeps until then, sends a request, sleeps until the reply has
come, receives it into one buffer, and calls the driver: five system calls, without a ring, an event loop or a look at
the reply. The figures are the least CPU time of this thread per request in some rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import numpy as np
from nbd_floor import REQUEST, SIZES, Client, connect, server_errors

from ringplane.block.sources.nbd.protocol import CMD_READ, CMD_WRITE, REQUEST_MAGIC, SIMPLE_SIZE
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import read, write

RUN = struct("count", "kick_fd", "call_fd", "fd", "request", "request_size", "room", "reply_size", "word")
WORD: int = RUN.fields["word"][1]  # type: ignore[index]

# A process that kicks, and kicks again when it is called.
DRIVER = """\
import os, sys
kick, call = map(int, sys.argv[1:])
while True:
    os.eventfd_write(kick, 1)
    os.eventfd_read(call)
"""


@compiled
def pass_on(address):
    """Pass on `count` requests, one at a time; returns how many were answered."""
    run = view(address, RUN)
    for number in range(run.count):
        read(run.kick_fd, address_of(run) + WORD, 8)
        write(run.fd, run.request, run.request_size)
        left = run.reply_size
        while left > 0:
            size = read(run.fd, run.room, left)
            if size <= 0:
                return number
            left -= size
        write(run.call_fd, address_of(run) + WORD, 8)
    return run.count


def measure(client: Client, rounds: int, count: int) -> float:
    """Microseconds of CPU time per request. Raises ConnectionError."""
    reads = client.command == CMD_READ
    request = np.frombuffer(
        REQUEST.pack(REQUEST_MAGIC, 0, client.command, 0, 0, client.size) + bytes(0 if reads else client.size), np.uint8
    )
    room = np.zeros(SIMPLE_SIZE + (client.size if reads else 0), np.uint8)
    kick_fd, call_fd = os.eventfd(0), os.eventfd(0)
    run = new(RUN)
    for name, value in {
        "count": count,
        "kick_fd": kick_fd,
        "call_fd": call_fd,
        "fd": client.sock.fileno(),
        "request": request.ctypes.data,
        "request_size": request.size,
        "room": room.ctypes.data,
        "reply_size": room.size,
    }.items():
        run[name] = value
    fds = (kick_fd, call_fd)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *map(str, fds)], pass_fds=fds)
    try:
        return min(_round(int(run.ctypes.data), count) for _ in range(rounds))
    finally:
        driver.kill()
        driver.wait()
        for fd in fds:
            os.close(fd)


def _round(run: int, count: int) -> float:
    before = time.thread_time()
    if pass_on(run) < count:
        raise ConnectionError("the server has closed the connection, or does not answer")
    return (time.thread_time() - before) / count * 1e6


@click.command()
@click.argument("address")
@click.option("--write", "writes", is_flag=True, help="Write. ALL DATA IN IT IS LOST.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--count", type=click.IntRange(1), default=5000, show_default=True, help="Requests of a round.")
def main(address: str, writes: bool, rounds: int, count: int) -> None:
    """Print the floor of each size at an ADDRESS."""
    kind, command = ("writes", CMD_WRITE) if writes else ("reads", CMD_READ)
    for size in SIZES:
        with server_errors(address):
            client = connect(address, command, size)
            cost = measure(client, rounds, count)
            client.sock.close()
        click.echo(f"{size >> 10} KiB {kind}, woken up twice: {cost:.2f} us CPU")


if __name__ == "__main__":
    main()
