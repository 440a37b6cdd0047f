"""The new process of a planned restart (handover.py): it finds the running one and resumes its front ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringplane.block.sources.choose_source import is_offered
from ringplane.control.allowed_policies import AllowedPolicies, none
from ringplane.control.changes import Changes, plan, refuse
from ringplane.control.export import Export
from ringplane.control.handed_counters import resume_counters, resume_services, resume_thread_counters
from ringplane.control.handed_policies import resume_policies
from ringplane.control.handover import (
    READY_PATIENCE,
    TAKING_PATIENCE,
    VERSION,
    Channel,
    HandoverError,
    OptionValues,
    fixed_options,
    options_of,
    plain,
    socket_beside,
)
from ringplane.control.listener import Listener
from ringplane.control.opening import Parts, take_over_parts
from ringplane.control.origin import Origin
from ringplane.control.planned import Planned, place
from ringplane.control.server import Server
from ringplane.control.tcp_listener import from_fd
from ringplane.options.addresses import Address
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.session.refusal import Refused
from ringplane.session.snapshot import SessionSnapshot
from ringplane.system.fd import Fd
from ringplane.system.signals import NONE, Signals
from ringplane.vhost_user.messages import ProtocolError
from ringplane.virtio import blk

if TYPE_CHECKING:
    from ringplane.opener.remote_opener import RemoteOpener


class Predecessor(Origin):
    """The running process, seen by its successor; an Origin."""

    def __init__(
        self,
        paths: Sequence[Path],
        signals: Signals = NONE,
        allows: Callable[[Path], bool] = none,
        *,
        trusted: bool = False,
    ) -> None:
        """Find the process that has one of these sockets; raises HandoverError, Interrupted.

        `allows`: which files of policies it may name beside those of disks that are described; `trusted`: it is not
        confined, and may name all.
        """
        super().__init__(signals)
        self._allows, self._trusted = allows, trusted
        # Of sockets whose files are not ours before `take`.
        self._lent: list[Listener] = []
        # Where our own successor will find us.
        self._path, sock = _connect(paths)
        self._channel = Channel(sock)
        try:
            with _in_words():
                self._pid = self._channel.peer[0]
                self._send({"hello": VERSION})
                offer = self._answer(TAKING_PATIENCE)
                self._listener: Fd = offer["listener"]
                self._interface: dict[str, Any] | None = offer.get("interface")
                self._metrics: dict[str, Any] | None = offer.get("metrics")
                self.state = offer.get("state")
                self._changes = Changes.from_json(offer.get("changes", {}))
                self.unserved = Changes.from_json(offer.get("unserved", {}))
                self.unserved_because = offer.get("unserved-because", {})
                self._disks: Sequence[dict[str, Any]] = offer["disks"]
        except BaseException:
            self._channel.close()
            raise

    def check_state(self, path: Path | None) -> None:
        """See Origin: a later start with its file would bring back what had been changed since."""
        if self.state is None:
            return
        theirs = self.state["path"]
        if (path is None or os.path.realpath(path) != theirs) and os.path.lexists(theirs):
            raise HandoverError(
                f"{theirs}: the running process stores there what is changed at run time, so the next one has to; "
                f"use --state {shlex.quote(theirs)}, or remove the file first to give up what it has"
            )

    def plan(self, disks: Sequence[DiskConfig], io_threads: Sequence[IoThread]) -> list[Planned]:
        """See Origin: both processes must have the same ones."""
        planned = plan(disks, self._changes, io_threads, refuse)
        allowed = AllowedPolicies(disks, self._allows, trusted=self._trusted)
        for each in planned:
            if problem := allowed.refused(each.config.policy):
                advice = "describe a disk with it, or remove it in the running process"
                raise HandoverError(f"{each.name}: {problem}; {advice}")
        self._disks = _in_order(self._disks, planned)
        return planned

    def interface_listener(self, path: Path) -> Listener | None:
        """See Origin."""
        if self._interface is None or self._interface["path"] != os.path.realpath(path):
            return None
        return self._borrow(self._interface["listener"], path)

    def metrics_socket(self, address: Address) -> socket.socket | None:
        """See Origin."""
        if self._metrics is None or self._metrics["address"] != str(address):
            return None
        return from_fd(self._metrics["listener"].number, address)

    def open(self, number: int, planned: Planned, undo: contextlib.ExitStack, opener: RemoteOpener | None) -> Parts:
        """See Origin."""
        offer = self._disks[number]
        listener = self._borrow(offer["listener"], planned.config.socket_path)
        return take_over_parts(planned.config, offer, listener, undo, opener)

    def successors(self, path: Path, undo: contextlib.ExitStack) -> Listener:
        """See Origin: where this process was found."""
        listener = self._borrow(self._listener, self._path)
        undo.callback(listener.close)
        return listener

    def take(self, server: Server) -> None:
        """See Origin. It can be interrupted up to the moment when the running process lets go.

        The disks are served by nobody from then on until the exports of this server are.
        """
        with _in_words():
            for export, disk in zip(server.exports, self._disks, strict=True):
                _check_config_space(export, disk["config_space"])
            self._send({"ready": True})
            # The requests in flight may take long; a refusal because of that arrives after they have ended.
            self._resume(server, self._answer(READY_PATIENCE))
            self._send({"taking": True})
            # A process that ends without having read this resets the connection.
            with contextlib.suppress(EOFError, ConnectionResetError):
                self._channel.receive("yours", READY_PATIENCE)
        for listener in self._lent:
            listener.owned = True
        server.events.emit("upgraded", previous_process=self._pid)

    def _resume(self, server: Server, state: dict[str, Any]) -> None:
        disks = {disk["number"]: export.disk for export, disk in zip(server.exports, self._disks, strict=True)}
        for export, disk in zip(server.exports, self._disks, strict=True):
            _resume_from(export, disk, state["disks"][disk["number"]])
        # An older release sends none of these.
        if "counters" in state:
            resume_counters(state["counters"], disks)
            if "services" in state["counters"]:
                resume_services(state["counters"], disks)
        if "policies" in state:
            resume_policies(state["policies"], disks)
        if "io_threads" in state:
            resume_thread_counters(state["io_threads"], server.threads.workers)
        if "events" in state:
            server.events.resume_from(state["events"])

    def _borrow(self, fd: Fd, path: Path | None) -> Listener:
        """The socket with this fd; its file is not ours to remove before `take`."""
        listener = Listener(socket.socket(fileno=os.dup(fd.number)), path)
        listener.owned = False
        self._lent.append(listener)
        return listener

    def _send(self, message: dict[str, Any]) -> None:
        """Raises what `Channel.send` does, and HandoverError if the running process has refused before."""
        try:
            self._channel.send(message)
        except BrokenPipeError:
            self._channel.receive("nothing", TAKING_PATIENCE)

    def _answer(self, patience: float) -> dict[str, Any]:
        """The running process says something of its disks. Raises what `Channel.receive` does, and Interrupted."""
        if not self._signals.wait(self._channel.fileno(), patience):
            raise TimeoutError
        return self._channel.receive("disks", patience)

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _connect(paths: Sequence[Path]) -> tuple[Path, socket.socket]:
    """To the first of the disks' sockets beside which a process listens."""
    for path in map(socket_beside, paths):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
            return path, sock
        except OSError:
            sock.close()
    raise HandoverError(
        f"{paths[0] if paths else 'a disk without a socket path'}: no running ringplane serves there; "
        "start one without --upgrade"
    )


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Turn every failure inside into a HandoverError."""
    try:
        yield
    except HandoverError as error:
        raise HandoverError(f"the running process continues to serve: {error}") from None
    except TimeoutError:
        raise HandoverError("the running process does not answer, and continues to serve; try again") from None
    except (Refused, ProtocolError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise HandoverError(f"cannot take over from the running process: {error or type(error).__name__}") from None


def _in_order(disks: Sequence[dict[str, Any]], planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """The offer for each of our disks; raises HandoverError unless both processes have the same disks."""
    offered = {disk["socket_path"]: disk | {"number": number} for number, disk in enumerate(disks)}
    wanted = {place(each.config): each for each in planned}
    if offered.keys() != wanted.keys():
        other = sorted(offered.keys() ^ wanted.keys())[0]
        raise HandoverError(f"{other} is served by only one of the two processes; both must serve the same disks")
    for path, each in wanted.items():
        check_options(path, each.config, offered[path]["options"])
        # Only the running process knows an image that was added.
        if not each.added and not is_offered(each.config, offered[path]):
            raise HandoverError(f"{path}: {each.config.image} is not the image that the running process serves")
    return [offered[path] for path in wanted]


def check_options(path: str, config: DiskConfig, theirs: OptionValues) -> None:
    """Raises HandoverError if our options differ from those of the running process."""
    ours = options_of(config)
    for option in fixed_options():
        # An older release that does not have the option works like its default.
        its = theirs.get(option.name, plain(option.default))
        if its != ours[option.name]:
            raise HandoverError(
                f"{path}: {option.key} is {its} in the running process and {ours[option.name]} here; "
                "an upgrade cannot change it"
            )


def _check_config_space(export: Export, there: bytes) -> None:
    """Raises HandoverError if it changes, because a guest reads it only once."""
    here = export.disk.config_space()
    fields = blk.CONFIG.names or ()
    old, new = (np.frombuffer(space.ljust(blk.CONFIG.itemsize, b"\0"), blk.CONFIG, 1)[0] for space in (there, here))
    changed = [name for name in fields if old[name].tobytes() != new[name].tobytes()]
    if changed:
        raise HandoverError(f"{export.disk.name}: the guest would see a change of {', '.join(changed)}")


def _resume_from(export: Export, offered: dict[str, Any], saved: dict[str, Any]) -> None:
    if saved["size"] != offered["size"]:
        raise HandoverError(f"{export.disk.name}: its size is being changed; try again")
    if saved["flush_failed"]:
        export.disk.set_flush_failed()
    export.disk.paused = bool(saved.get("paused"))
    export.disk.member.throttled_ns = saved.get("throttled", 0)
    if used := saved.get("used_limits"):
        export.resume_limits(used)
    export.disk.device.busy_ticks = saved.get("busy_ticks", 0)
    # Layers without a state can come and go.
    states = [state for state in saved["layers"] if state]
    for layer, state in zip((layer for layer in export.disk.layers if layer.has_state), states, strict=True):
        layer.resume_from(state)
    if saved["front_end"]:
        export.resume_from(SessionSnapshot.from_json(saved["front_end"]))
    if saved.get("next_front_end"):
        export.resume_waiting(saved["next_front_end"].number)
