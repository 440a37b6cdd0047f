"""Connections to Ceph clusters. Disks with the same configuration, user and settings share one.

A connection has 15 threads, and an image none of its own. Each function here may wait for the cluster.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ringplane.block.sources.rbd_library import RESULT, Library, library
from ringplane.options.rbd_address import RbdImage
from ringplane.system.time_limits import TimedCalls

# In place of Ceph's defaults: (default, ours). client_mount_timeout: seconds until rados_connect(3) gives up.
# librados_thread_count: threads that do I/O and call the callback. With two, each piece of work wakes the other one:
# that costs a third of all CPU time of deep 4 KiB reads.
DEFAULTS = {"client_mount_timeout": ("300", "20"), "librados_thread_count": ("2", "1")}

# Ours: otherwise a read or write could block the I/O thread that begins it.
OPTIONS = {"rbd_non_blocking_aio": "true"}

# librbd's cache is off, or has only what was read or written to the cluster. A guest outlives this process when it is
# killed, and would not notice that completed writes are lost; so only an option of the disk allows that.
WITHOUT_CACHE, WITH_CACHE = {"rbd_cache": "false"}, {"rbd_cache_max_dirty": "0"}

# How many openings of one cluster may hang after their time.
OPENINGS = 16


class ClusterError(Exception):
    """The text is a sentence that says what failed and what to do."""


class NoMonitor(ClusterError):
    """The cluster does not answer in time."""


@dataclass(frozen=True)
class Access:
    """How a cluster is reached: equal for disks that can share a connection."""

    conf: Path | None
    user: str
    key_file: Path | None
    # It can contain a key.
    settings: tuple[tuple[str, str], ...] = field(repr=False)
    # librbd's cache in this process.
    cache: bool

    @classmethod
    def of(cls, image: RbdImage, *, cache: bool) -> Access:
        conf, key_file = (None if path is None else path.absolute() for path in (image.conf, image.key_file))
        return cls(conf, image.user, key_file, image.settings, cache)

    @property
    def name(self) -> str:
        """For messages: Ceph's name of the user."""
        return f"client.{self.user or 'admin'}"


@dataclass
class _Shared:
    """A connection and how many use it. Who connects or disconnects has the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    cluster: Cluster | None = None
    users: int = 0
    # What connects, and opens images: a cluster that hangs does not hold up others.
    openings: TimedCalls = field(default_factory=lambda: TimedCalls(OPENINGS))


class Cluster:
    """A connection; `fsid` identifies the cluster."""

    _all: ClassVar[dict[Access, _Shared]] = {}
    _all_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, access: Access) -> None:
        """Connect. Raises ClusterError, MissingLibrary."""
        self.access = access
        self.library = library()
        self.handle = self._created(access)
        try:
            self._configure(access)
            try:
                self.library.call("rados_connect", self.handle)
            except OSError as error:
                kind = NoMonitor if error.errno == errno.ETIMEDOUT else ClusterError
                raise kind(_why_not_connected(access, error)) from None
            self.fsid = self.library.text("rados_cluster_fsid", self.handle)
        except BaseException:
            self.library.call("rados_shutdown", self.handle)
            raise

    def _created(self, access: Access) -> int:
        return self.library.created("rados_create", RESULT, access.user.encode() or None)

    def _configure(self, access: Access) -> None:
        try:
            self.library.call("rados_conf_read_file", self.handle, bytes(access.conf) if access.conf else None)
        except OSError as error:
            # Without a name Ceph's usual places are read; the settings may say everything.
            if access.conf:
                raise ClusterError(f"{access.conf} cannot be read: {_words(error)}") from None
        for key, (default, ours) in DEFAULTS.items():
            # What the file says is kept. Versions before Ceph 16 do not have all options.
            with contextlib.suppress(OSError):
                if self.option(key) == default:
                    self._set(key, ours)
        cache = WITH_CACHE if access.cache else WITHOUT_CACHE
        key_file = {"keyfile": str(access.key_file)} if access.key_file else {}
        for key, value in (*cache.items(), *key_file.items(), *access.settings, *OPTIONS.items()):
            self._set(key, value)

    def _set(self, key: str, value: str) -> None:
        try:
            self.library.call("rados_conf_set", self.handle, key.encode(), value.encode())
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise ClusterError(f"Ceph has no option {key!r}; `ceph config ls` lists them") from None
            raise ClusterError(f"Ceph does not accept the value of its option {key!r}: {_words(error)}") from None

    def option(self, key: str) -> str:
        """The value of one of Ceph's options. Raises OSError."""
        return self.library.text("rados_conf_get", self.handle, key.encode())

    def pool(self, name: str, namespace: str) -> Pool:
        """Raises ClusterError."""
        return Pool(self, name, namespace)

    @classmethod
    def use(cls, access: Access) -> Cluster:
        """The connection, which is made if there is none; `release` it. Raises ClusterError, MissingLibrary."""
        shared = cls._shared(access)
        with shared.lock:
            if shared.cluster is None:
                shared.cluster = Cluster(access)
            shared.users += 1
            return shared.cluster

    @classmethod
    def is_connected(cls, access: Access) -> bool:
        """Whether `use` need not open any file."""
        return cls._shared(access).cluster is not None

    @classmethod
    def openings(cls, access: Access) -> TimedCalls:
        """What calls `use`, and whatever waits for the cluster until an image is open."""
        return cls._shared(access).openings

    def release(self) -> None:
        """The last one disconnects."""
        shared = self._shared(self.access)
        with shared.lock:
            shared.users -= 1
            if not shared.users:
                shared.cluster = None
                self.library.call("rados_shutdown", self.handle)

    @classmethod
    def _shared(cls, access: Access) -> _Shared:
        with cls._all_lock:
            return cls._all.setdefault(access, _Shared())


class Pool:
    """An I/O context of a pool and a namespace in it."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
        """Raises ClusterError."""
        self._library: Library = cluster.library
        try:
            self.handle = self._library.created("rados_ioctx_create", cluster.handle, name.encode(), RESULT)
        except OSError as error:
            raise ClusterError(_why_no_pool(cluster.access, name, error)) from None
        self.number = self._library.call("rados_ioctx_get_id", self.handle)
        if namespace:
            self._library.call("rados_ioctx_set_namespace", self.handle, namespace.encode())

    def close(self) -> None:
        self._library.call("rados_ioctx_destroy", self.handle)


def _why_no_pool(access: Access, name: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"the cluster has no pool {name!r}; `ceph osd pool ls` lists them"
    return f"the pool {name!r} cannot be used by {access.name}: {_words(error)}"


def _why_not_connected(access: Access, error: OSError) -> str:
    if error.errno == errno.ETIMEDOUT:
        return "no monitor answers; check mon_host and the network, or raise client_mount_timeout"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"the cluster does not accept {access.name} with this key; `ceph auth get {access.name}` shows it"
    if error.errno == errno.ENOENT:
        place = access.conf or "/etc/ceph/ceph.conf"
        return f"no monitor or no key of {access.name} is known; {place} has to name mon_host and keyring"
    return f"cannot connect to the cluster: {_words(error)}"


def _words(error: OSError) -> str:
    return error.strerror or str(error)
