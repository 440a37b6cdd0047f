"""What a layer of a disk is for the control plane; `stack.py` has what it is for compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from ringplane.block.stack import LayerPart
from ringplane.compiler.units import Unit

if TYPE_CHECKING:
    import numpy as np

    from ringplane.block.sources.source import Source
    from ringplane.log.event_bus import Emit
    from ringplane.opener.opener import Opener
    from ringplane.options.disk_config import DiskConfig


class Layer:
    """One layer of one disk. A subclass defines what its layer needs; the rest is for a layer that has no state."""

    # What is compiled before the disk is served.
    units: Sequence[Unit] = ()
    # The name under which dataplane/request_types.py finds its request types.
    name: ClassVar[str] = ""
    # One I/O thread serves all queues of the disk, because the layer does not protect its state against others.
    one_thread: ClassVar[bool] = False
    # Why the disk cannot get another size; empty: it can.
    fixed_size: ClassVar[str] = ""
    # The feature bits that a driver must accept, and the names of the features that cannot be offered.
    needed_features: ClassVar[int] = 0
    impossible: ClassVar[frozenset[str]] = frozenset()
    # Whether it is below the policies: it sees what they make of the I/Os.
    below_policies: ClassVar[bool] = False
    # Whether `snapshot` returns a state, without which another process cannot continue.
    has_state: ClassVar[bool] = False
    # Whether `sync` makes the source stable too.
    syncs_source: ClassVar[bool] = False

    def part(self, backing: int, slots: int) -> LayerPart:
        """For one I/O thread with so many slots; `backing` is the address of the source's BACKING (ranges.py), or 0."""
        raise NotImplementedError

    def describe(self, config: np.void) -> None:
        """Fill in the fields of the configuration space that the layer brings (`virtio.blk.CONFIG`)."""

    def resize(self, size: int) -> None:
        """The disk has another size in bytes from now on."""

    def check_paths(self) -> None:
        """Raises ImageError for a relative path in its options: whoever adds the disk may be in another folder."""

    def start_threads(self, emit: Emit) -> None:
        """Start those that it needs; `emit` reports events of the disk. Raises NoThread."""

    @property
    def failed(self) -> bool:
        """Whether a flush has failed in this layer, so that later ones cannot be trusted."""
        return False

    def sync(self) -> None:
        """Make the layer's own state stable, while no I/O is in progress; raises OSError."""

    def snapshot(self) -> bytes:
        """The state that another process needs to continue, while no I/O is in progress."""
        return b""

    def resume_from(self, saved: bytes) -> None:
        """Take over the state of another process; raises ImageError."""

    def abandon(self) -> None:
        """Close the layer without changing anything, because another process continues with it."""

    def close(self) -> None:
        """Close the layer; raises OSError. A second call does nothing."""

    def unlink(self) -> None:
        """Remove what this object has created, as far as possible: the first error is the one that is reported."""


class LayerModule(Protocol):
    """What a module of the registry has."""

    def open_layer(self, config: DiskConfig, source: Source, *, shared: bool, opener: Opener) -> Layer | None:
        """The layer that the options of the disk ask for, if they do. It opens files through the `opener` only.

        `shared`: another process still uses the layer, and hands it over (`resume_from`).

        Raises ImageError, OSError and OpenerEnded.
        """

    def check(self, config: DiskConfig, source: Source) -> type[Layer] | None:
        """Like `open_layer`, but creates and changes nothing; returns the class of the layer."""
