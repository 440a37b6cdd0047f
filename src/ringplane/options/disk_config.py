"""A disk to be served, as users describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ringplane.options.engines import AUTO
from ringplane.options.values import LOCK_AUTO, LOCKS, MAX_QUEUES, ZoneModel, check_physical_block_size


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A disk to be served: what `serve` takes, and the names of its I/O threads.

    Queue `i` is served by thread `i`, counted from the start again when there are more queues than names. Raises
    ValueError unless there is either a socket path or an fd.
    """

    image: Path
    io_threads: Sequence[str]
    socket_path: Path | None = None
    socket_mode: int | None = None
    socket_group: int | None = None
    fd: int | None = None
    create: int | None = None
    read_only: bool = False
    direct: bool = True
    share_rw: bool = False
    lock: str = LOCK_AUTO
    num_queues: int = MAX_QUEUES
    engine: str = AUTO
    block_size: int = 512
    physical_block_size: int | None = None
    serial: str | None = None
    features: Mapping[str, bool] = field(default_factory=dict)
    zoned: ZoneModel | None = None

    def __post_init__(self) -> None:
        if (self.socket_path is None) == (self.fd is None):
            raise ValueError("give either a socket path or an fd")
        if self.fd is not None and (self.socket_mode, self.socket_group) != (None, None):
            raise ValueError("a mode and a group are for a socket path, not for an fd")
        if self.lock not in LOCKS:
            raise ValueError(f"lock is {self.lock!r}; it is one of {', '.join(LOCKS)}")
        if self.zoned and self.share_rw:
            raise ValueError("a zoned disk cannot be shared, as each process would have write pointers of its own")
        if self.physical_block_size is not None:
            check_physical_block_size(self.physical_block_size, self.block_size)
