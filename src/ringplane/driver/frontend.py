"""A vhost-user front end: shared memory, one method for each message, and the notifiers of a ring.

Each message is a small method that sends its arguments, right or wrong: tests use them to misbehave. driver.py uses
them as a well-behaved driver does. Source: QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ringplane.driver.virtqueue import Ring
from ringplane.guest_memory.regions import Mapping
from ringplane.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES, ProtocolError, ProtocolFeature, Request
from ringplane.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    Inflight,
    LogRegion,
    MemoryRegion,
    MemoryTable,
    Payload,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)
from ringplane.vhost_user.transport import BlockingTransport

WANTED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS
)

PAGE = 4096

AnyPayload = TypeVar("AnyPayload", bound=Payload)


class Refused(Exception):
    """The back end answered a message with a failure."""


class RingBroken(Exception):
    """The back end signalled a ring's error eventfd: it found an error in the ring and has stopped serving it."""


class SharedMemory:
    """A memfd of `size` bytes, mapped here; the guest's memory. Guest-physical address = offset in the file.

    It is sparse: pages that were never touched take no memory.
    """

    def __init__(self, size: int = 1 << 30) -> None:
        self.size = size
        self.fd = os.memfd_create("ringplane-driver", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self._mapping = Mapping(self.fd, size, 0)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = self._mapping.address
        self.forget()

    def forget(self) -> None:
        """Free everything that was allocated."""
        # Not from 0: an address that was not filled in must not be valid.
        self._end = PAGE
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Our address of `size` bytes, aligned to the next power of two or a page; raises MemoryError."""
        rounded = max(64, 1 << (size - 1).bit_length())
        free = self._free.get(rounded)
        if free:
            return free.pop()
        start = -(-self._end // min(rounded, PAGE)) * min(rounded, PAGE)
        if start + rounded > self.size:
            raise MemoryError(f"{size} bytes more do not fit in {self.size} bytes of shared memory: raise memory_size")
        self._end = start + rounded
        self._sizes[self.address + start] = rounded
        return self.address + start

    def free(self, address: int) -> None:
        """Free what `allocate` returned."""
        self._free.setdefault(self._sizes[address], []).append(address)

    def guest(self, address: int) -> int:
        """The guest-physical address of our `address`."""
        return address - self.address

    def region(self) -> MemoryRegion:
        """The whole memory as one region."""
        return MemoryRegion(guest_address=0, size=self.size, user_address=self.address, mmap_offset=0)

    def close(self) -> None:
        """Close the file; the mapping goes with the last reference to this object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FrontEnd:
    """A connection to the back end that listens at `path`; waits at most `timeout` seconds for each answer.

    With REPLY_ACK negotiated every message that sets something asks for an acknowledgement, and raises Refused if that
    reports a failure. All methods raise TimeoutError, ProtocolError when the back end violates the protocol or closes
    the connection, and OSError.
    """

    def __init__(self, path: str | Path, timeout: float = 10.0) -> None:
        """Connect; raises OSError with an explanation if that fails."""
        self.path = str(path)
        self.timeout = timeout
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(timeout)
        try:
            self.sock.connect(self.path)
        except OSError as error:
            self.sock.close()
            raise type(error)(error.errno, f"cannot connect to the back end: {error.strerror or error}", path) from None
        self.transport = BlockingTransport(self.sock, timeout)
        self.features = 0
        self.protocol_features = ProtocolFeature(0)

    def close(self) -> None:
        """Close the connection. May be called again."""
        self.transport.close()

    # Any message

    def ask(self, request: Request, reply: type[AnyPayload], payload: Payload | None = None) -> AnyPayload:
        """Send a message that has a reply, and return the reply."""
        answer = self._call(request, payload or Empty(), (), need_reply=False)
        if not isinstance(answer, reply):
            raise ProtocolError(f"{request.name}: the back end reported a failure")
        return answer

    def send(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Send a message that sets something; raises Refused if the back end reports a failure."""
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol_features
        answer = self._call(request, payload or Empty(), fds, need_reply=acknowledged)
        if isinstance(answer, U64) and answer.value != 0:
            raise Refused(f"the back end refused {request.name} (it replied {answer.value:#x})")

    def _call(self, request: Request, payload: Payload, fds: Sequence[int], *, need_reply: bool) -> Payload | None:
        try:
            message = self.transport.call(request, payload, fds, need_reply=need_reply)
        except TimeoutError:
            raise TimeoutError(f"the back end did not answer {request.name} within {self.timeout:g} s") from None
        except ConnectionError as error:
            raise ProtocolError(f"the back end closed the connection before {request.name}: {error}") from None
        if message is None:
            return None
        message.close()
        return message.payload

    # Features

    def negotiate(self, features: int, protocol_features: ProtocolFeature = WANTED_PROTOCOL_FEATURES) -> int:
        """Accept those of `features` and `protocol_features` that the back end offers; returns the negotiated features.

        Needs VHOST_USER_F_PROTOCOL_FEATURES and CONFIG of the back end; otherwise raises ProtocolError.
        """
        offered = self.get_features()
        if not offered & VHOST_USER_F_PROTOCOL_FEATURES:
            raise ProtocolError("the back end does not offer VHOST_USER_F_PROTOCOL_FEATURES")
        self.set_protocol_features(self.get_protocol_features() & protocol_features)
        if ProtocolFeature.CONFIG not in self.protocol_features:
            raise ProtocolError("the back end does not offer CONFIG, so the disk's size is unknown")
        self.set_owner()
        self.set_features(offered & (features | VHOST_USER_F_PROTOCOL_FEATURES))
        return self.features

    def get_features(self) -> int:
        return self.ask(Request.GET_FEATURES, U64).value

    def set_features(self, features: int) -> None:
        self.send(Request.SET_FEATURES, U64(features))
        self.features = features

    def get_protocol_features(self) -> ProtocolFeature:
        return ProtocolFeature(self.ask(Request.GET_PROTOCOL_FEATURES, U64).value)

    def set_protocol_features(self, features: ProtocolFeature) -> None:
        """From here on messages are acknowledged if `features` has REPLY_ACK."""
        self.send(Request.SET_PROTOCOL_FEATURES, U64(features))
        self.protocol_features = features

    def set_owner(self) -> None:
        self.send(Request.SET_OWNER)

    def get_queue_num(self) -> int:
        """How many queues the back end has at most; 1 without the protocol feature MQ."""
        if ProtocolFeature.MQ not in self.protocol_features:
            return 1
        return self.ask(Request.GET_QUEUE_NUM, U64).value

    # Configuration space

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space."""
        config = self.ask(Request.GET_CONFIG, Config, Config.asking_for(offset, size))
        if config.size != size:
            raise ProtocolError(f"the back end gave {config.size} bytes of configuration where {size} were asked for")
        return config.payload

    def set_config(self, offset: int, data: bytes) -> None:
        self.send(Request.SET_CONFIG, Config(offset, len(data), Config.WRITABLE, data))

    # Migration

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        """Set the dirty log in which the back end marks the pages that it writes; raises Refused."""
        message = self.transport.call(Request.SET_LOG_BASE, LogRegion(size, offset), [fd])
        if message is not None and isinstance(message.payload, U64) and message.payload.value != 0:
            raise Refused("the back end refused SET_LOG_BASE")

    # In-flight area

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """An in-flight area that the back end creates, and its fd, which the caller owns."""
        asked = Inflight(0, 0, num_queues, queue_size)
        message = self.transport.call(Request.GET_INFLIGHT_FD, asked)
        if message is None or not isinstance(message.payload, Inflight) or len(message.fds) != 1:
            raise ProtocolError("GET_INFLIGHT_FD: the back end reported a failure")
        return message.payload, message.take_fds()[0]

    def set_inflight_fd(self, described: Inflight, fd: int) -> None:
        self.send(Request.SET_INFLIGHT_FD, described, [fd])

    # Device status

    def get_status(self) -> int:
        """The device status (virtio 1.2, section 2.1) that the back end has."""
        return self.ask(Request.GET_STATUS, U64).value

    def set_status(self, status: int) -> None:
        """0 is a reset."""
        self.send(Request.SET_STATUS, U64(status))

    # Memory

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        self.send(Request.SET_MEM_TABLE, MemoryTable(tuple(regions)), fds)

    def get_max_mem_slots(self) -> int:
        return self.ask(Request.GET_MAX_MEM_SLOTS, U64).value

    def add_mem_reg(self, region: MemoryRegion, fd: int) -> None:
        self.send(Request.ADD_MEM_REG, SingleMemoryRegion(region), [fd])

    def rem_mem_reg(self, region: MemoryRegion) -> None:
        self.send(Request.REM_MEM_REG, SingleMemoryRegion(region))

    # Rings

    def set_vring_num(self, index: int, size: int) -> None:
        self.send(Request.SET_VRING_NUM, VringState(index, size))

    def set_vring_base(self, index: int, base: int) -> None:
        self.send(Request.SET_VRING_BASE, VringState(index, base))

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> None:
        """`desc`, `avail` and `used` are user addresses: addresses in this process."""
        self.send(Request.SET_VRING_ADDR, VringAddr(index, flags, desc, used, avail, log))

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._set_vring_fd(Request.SET_VRING_ERR, index, fd)

    def _set_vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        self.send(request, VringFd(index, no_fd=fd is None), () if fd is None else (fd,))

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self.send(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))

    def get_vring_base(self, index: int) -> int:
        """Stop the ring; returns its next available index. The back end replies when no request is in flight."""
        return self.ask(Request.GET_VRING_BASE, VringState, VringState(index, 0)).num

    def start_vring(self, vring: Vring, base: int = 0) -> None:
        """Set up a ring in the back end and enable it, in the order that QEMU uses."""
        index, ring = vring.index, vring.ring
        ring.reset(base)
        self.set_vring_num(index, ring.size)
        self.set_vring_base(index, base)
        self.set_vring_addr(index, ring.desc, ring.avail, ring.used)
        self.set_vring_kick(index, vring.kick_fd)
        self.set_vring_call(index, vring.call_fd)
        self.set_vring_err(index, vring.err_fd)
        self.set_vring_enable(index, True)


class Vring:
    """A ring and its notifiers: eventfds for kick, call and error, and an epoll instance that also watches for errors.

    The call eventfd is watched edge-triggered: each signal wakes the driver once, and it need not be read. A signal of
    the error eventfd or the end of the connection wakes it each time.
    """

    def __init__(self, index: int, ring: Ring, sock: socket.socket) -> None:
        self.index = index
        self.ring = ring
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0, flags) for _ in range(3))
        self.epoll = select.epoll()
        self.epoll.register(self.call_fd, select.EPOLLIN | select.EPOLLET)
        self.epoll.register(self.err_fd, select.EPOLLIN)
        # No events requested: EPOLLHUP and EPOLLERR are always reported.
        self.epoll.register(sock.fileno(), 0)

    def kick(self) -> None:
        """Notify the back end of new chains."""
        os.eventfd_write(self.kick_fd, 1)

    def wait(self, seconds: float) -> None:
        """Wait for a notification, at most `seconds`; raises what `check` raises."""
        self._raise_trouble([fd for fd, _ in self.epoll.poll(seconds)])

    def check(self) -> None:
        """Raise RingBroken if the back end signalled an error of the ring, ConnectionError if the back end is gone."""
        # This may consume the edge of a notification: a thread that waits for one checks the ring before it waits.
        self.wait(0)

    def _raise_trouble(self, fds: list[int]) -> None:
        if self.err_fd in fds:
            raise RingBroken(f"the back end found an error in ring {self.index} and has stopped serving it")
        if any(fd != self.call_fd for fd in fds):
            raise ConnectionError("the back end closed the connection")

    def close(self) -> None:
        """Close the notifiers. May be called again."""
        if not self.epoll.closed:
            self.epoll.close()
            for fd in (self.kick_fd, self.call_fd, self.err_fd):
                os.close(fd)
