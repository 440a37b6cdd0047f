"""The bodies of requests and answers. They are described here only; openapi.json is generated from these classes."""

from __future__ import annotations

import functools
import operator
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ringplane.options.declare import Option, declared
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import TABLES, keys_of_table
from ringplane.options.kinds import Kind, OneOf, Whole

# In Markdown.
LINK = re.compile(r"\[([^]]+)\]\([^)]*\)")

# Of a disk.
State = Literal["listening", "attached", "stopping", "stopped"]


class Problem(Struct):
    """Why a request was not carried out."""

    what: Annotated[str, Meta(description="What is wrong.")]
    where: Annotated[str, Meta(description="The key, disk or path that is wrong; empty: the request as a whole.")]
    right: Annotated[str, Meta(description="The values that are possible, or what to do now; may be empty.")]


class Error(Struct):
    """The body of every answer with a status from 400 on."""

    error: Problem


class Counter(Struct):
    """Completed requests of one kind, over all queues and front ends since the disk was added."""

    requests: int
    errors: Annotated[int, Meta(description="Requests with a status other than OK.")]
    bytes: int


class Ring(Struct):
    """A ring that a front end has started, or that is broken."""

    queue: int
    state: Annotated[str, Meta(description="As in docs/architecture.md, for example `running` or `broken`.")]
    in_flight: int


class Disk(Struct):
    """A disk that is served."""

    name: str
    image: Annotated[str, Meta(description="The path of the image, as it was given, or its address without secrets.")]
    socket: Annotated[str | None, Meta(description="The vhost-user socket; null: an inherited one.")]
    state: Annotated[
        State,
        Meta(
            description="Whether a front end is attached; `stopping`: it ends when its storage answers; `stopped`: it "
            "is not served any more, and can be removed."
        ),
    ]
    front_end: Annotated[str | None, Meta(description="The attached front end, for example `process 4242`.")]
    paused: Annotated[bool, Meta(description="Whether requests wait in the rings, because of `pause`.")]
    size: Annotated[int, Meta(description="Bytes that the guest sees.")]
    block_size: int
    read_only: bool
    serial: str
    how: Annotated[str, Meta(description="How I/O is done, for people.")]
    queues: Annotated[int, Meta(description="Virtqueues that a front end can use.")]
    io_threads: Annotated[list[str], Meta(description="The I/O threads of queue 0, queue 1, ..., repeated.")]
    in_flight: Annotated[int, Meta(description="Requests that were fetched and not completed yet.")]
    limits: Annotated[
        dict[str, int | str],
        Meta(description="The limits that hold now, with those of its group, by the keys of docs/limits.md."),
    ]
    throttled_seconds: Annotated[float, Meta(description="Time in which requests waited because of a limit.")]
    flush_failed: Annotated[bool, Meta(description="Whether a flush has failed, so that all later ones fail.")]
    trouble: Annotated[
        str | None,
        Meta(
            description="Why all I/O fails now, or waits; null: it does not. `blocklisted`: by the Ceph cluster, for "
            "good; `reconnecting`, `failing`: there is no connection to the NBD server (docs/remote.md)."
        ),
    ]
    counters: Annotated[dict[str, Counter], Meta(description="By kind of request: read, write, flush, ...")]
    rings: list[Ring]


class NotServed(Struct):
    """A disk that was added to a previous process and cannot be served now; the next start tries again."""

    name: str
    image: Annotated[str, Meta(description="The path of the image, or its address without secrets.")]
    socket: Annotated[str, Meta(description="Where its vhost-user socket will be.")]
    why: Annotated[str, Meta(description="What was wrong when it was tried.")]


class Disks(Struct):
    """All disks, in the order in which they were added."""

    disks: list[Disk]
    not_served: Annotated[
        list[NotServed],
        Meta(description="Disks that are kept for the next start, because their server or storage did not answer."),
    ]


class IoThreadState(Struct):
    """An I/O thread."""

    name: str
    engine: Annotated[str, Meta(description="The engine that it uses: io_uring, aio, or epoll (no I/O of its own).")]
    cpus: Annotated[list[int] | None, Meta(description="The CPUs that it may run on; null: all of the process.")]
    poll_us: Annotated[int | None, Meta(description="The polling limit in microseconds; null: it never sleeps.")]
    pin_memory: bool
    disks: Annotated[list[str], Meta(description="The disks that have queues on it.")]
    queues: Annotated[int, Meta(description="Queues that are assigned to it, used or not.")]


class IoThreads(Struct):
    """All I/O threads of the process; they are chosen when it starts."""

    io_threads: list[IoThreadState]


class OperationStatistics(Counter):
    """The counters of an operation with the time that it took. Requests at the same time count each."""

    seconds: Annotated[float, Meta(description="How long all of them took, from fetch to completion.")]
    latencies: Annotated[
        list[tuple[int, int]],
        Meta(description="How many took how long: pairs of nanoseconds, exact to 3 %, and of requests."),
    ]


class SourceOperation(Struct):
    """What the server or cluster of a remote disk has done: requests of ours, which can be parts of those of guests."""

    requests: int
    seconds: Annotated[float, Meta(description="How long it took for all of them.")]
    latencies: Annotated[
        list[tuple[int, int]],
        Meta(description="How many took how long: pairs of nanoseconds, exact to 3 %, and of requests."),
    ]


class SourceStatistics(Struct):
    """The server or cluster of a remote disk."""

    state: Annotated[
        Literal["ok", "reconnecting", "failing", "blocklisted"],
        Meta(
            description="`reconnecting`: a connection was lost, and requests wait; `failing`: they fail until there is "
            "another one; `blocklisted`: the cluster accepts nothing from this process any more."
        ),
    ]
    reconnects: Annotated[int | None, Meta(description="Connections made in place of lost ones; null: not known.")]
    in_flight: Annotated[int, Meta(description="Requests that it has not replied to.")]
    operations: Annotated[
        dict[str, SourceOperation],
        Meta(description="By operation: read, write, flush, ...; those that there were."),
    ]


class PolicyStatistics(Struct):
    """A policy of a disk."""

    name: str
    enabled: Annotated[bool, Meta(description="Whether requests pass it; false: it is switched off.")]
    counters: Annotated[dict[str, int], Meta(description="`requests`, and its own counters (docs/policies.md).")]


class DiskStatistics(Struct):
    """What a disk has done since it was added."""

    name: str
    state: State
    paused: bool
    flush_failed: bool
    in_flight: int
    throttled_seconds: float
    io_seconds: Annotated[float, Meta(description="Time in which requests were in flight, however many.")]
    operations: Annotated[
        dict[str, OperationStatistics],
        Meta(description="By operation: read, write, flush, ...; those that there were."),
    ]
    source: Annotated[SourceStatistics | None, Meta(description="Of a remote disk; null: it is not one.")] = None
    policies: Annotated[
        list[PolicyStatistics], Meta(description="Its policies, in the order in which requests pass them.")
    ] = []


class IoThreadStatistics(Struct):
    """How an I/O thread has spent its time since it was started. The three add up to it."""

    name: str
    busy_seconds: Annotated[float, Meta(description="CPU time, without polling.")]
    polling_seconds: Annotated[float, Meta(description="CPU time in which it polled rings that had no requests.")]
    asleep_seconds: Annotated[float, Meta(description="Time that was neither: it waited.")]
    wakeups: Annotated[int, Meta(description="How often it has slept.")]


class Statistics(Struct):
    """The counters of all disks and I/O threads. The difference of two answers gives rates."""

    time: Annotated[float, Meta(description="CLOCK_MONOTONIC in seconds, the same for all processes of the machine.")]
    disks: list[DiskStatistics]
    io_threads: list[IoThreadStatistics]


class Change(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """What is to be changed of a disk."""

    limits: Annotated[
        dict[str, int | str | None],
        Meta(description="The limits to change, by the keys of docs/limits.md; 0 or null removes one."),
    ]


class Resize(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """What a resize has to do."""

    size: Annotated[
        Annotated[int, Meta(gt=0, le=(1 << 63) - 1)] | None,
        Meta(description="Make the image, a regular file, this many bytes long first; null: its size has changed."),
    ] = None


class Resized(Struct):
    """The size of a disk in bytes, before and now."""

    before: int
    size: int


class Policy(Struct):
    """A policy of a disk (docs/policies.md)."""

    name: str
    policy: Annotated[str, Meta(description="FILE.py:NAME, or the name of one that ships, as it was given.")]
    about: Annotated[str, Meta(description="What it does, in one line.")]
    enabled: Annotated[bool, Meta(description="Whether requests pass it; false: it is switched off.")]
    parameters: Annotated[dict[str, str], Meta(description="The values of all parameters now, as users write them.")]
    counters: Annotated[dict[str, int], Meta(description="`requests`, and its own counters.")]


class Policies(Struct):
    """The policies of a disk, in the order in which requests pass them."""

    policies: list[Policy]


PARAMETERS = Meta(description="Values of parameters, by their names; as on the command line, or numbers.")


class NewPolicy(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """A policy for a disk: the keys of [[disk.policy]] (docs/policies.md), and its place."""

    policy: Annotated[str, Meta(description="FILE.py:NAME or FILE.py with an absolute path, or one that ships.")]
    parameters: Annotated[dict[str, bool | int | float | str], PARAMETERS] = {}
    name: Annotated[str, Meta(description="By which it is called; empty: one is chosen. PUT has it in the path.")] = ""
    enabled: Annotated[bool, Meta(description="Whether requests pass it.")] = True
    position: Annotated[
        Annotated[int, Meta(ge=0, le=63)] | None,
        Meta(description="Before the policy at this position, counted from 0; null: after all. Not for PUT."),
    ] = None


class PolicyChange(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """What is to be changed of a policy; its others stay as they are."""

    parameters: Annotated[dict[str, bool | int | float | str], PARAMETERS] = {}
    enabled: Annotated[bool | None, Meta(description="Whether requests pass it; null: as before.")] = None


class NewRecording(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """Where a disk is recorded to."""

    file: Annotated[str, Meta(description="The absolute path of a file that does not exist yet.")]


class Recording(Struct):
    """A recording (docs/recordings.md)."""

    file: str
    token: Annotated[str, Meta(description="A write of one block that begins with this text is a mark.")]
    entries: Annotated[int, Meta(description="So far.")]
    failed: Annotated[str | None, Meta(description="Why nothing is recorded any more; null: it is.")]


class Mark(Struct, forbid_unknown_fields=True):  # type: ignore[call-arg]
    """A mark for a recording."""

    text: Annotated[str, Meta(max_length=1000)]


class EventData(Struct):
    """The `data` of an event of the stream. Its `event` is the kind, its `id` is for Last-Event-ID."""

    time: Annotated[float, Meta(description="Seconds since 1970.")]
    kind: Annotated[str, Meta(description="The kinds are listed in docs/api.md.")]
    disk: Annotated[str, Meta(description="The disk; empty: the process.")]
    fields: Annotated[dict[str, Any], Meta(description="What belongs to the kind.")]


class Lost(Struct):
    """The `data` of an event `lost`: the client read too slowly, or came too late."""

    lost: Annotated[int, Meta(description="Events that are not in the stream.")]


TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list[Any],
    "object": dict[str, Any],
}


def _type_of(kind: Kind) -> Any:
    """The type of an option's value in JSON. Its rules are checked as in a configuration file."""
    if isinstance(kind, OneOf):
        return Literal[tuple(kind.choices.values())]
    if isinstance(kind, Whole):
        return Annotated[int, Meta(ge=kind.lowest, le=kind.highest)]
    return functools.reduce(operator.or_, (TYPES[name] for name in kind.json_types))


def meaning(option: Option) -> str:
    """What the documentation of files says of an option, for the API, which has no links."""
    text = LINK.sub(r"docs/\1", option.doc)
    return f"{text.partition(';')[0]}; an absolute path" if option.kind.has_paths else text


def _new_disk() -> type[Struct]:
    """The keys of a [[disk]] table."""
    required, optional = [], []
    for option in declared(DiskConfig).values():
        if option.doc:
            kind: Any = _type_of(option.kind)
            described: Any = Annotated[kind, Meta(description=meaning(option))]
            if option.key == "socket-path":
                required.append((option.name, described))
            else:
                optional.append((option.name, described | msgspec.UnsetType, msgspec.UNSET))
    for name in TABLES:
        optional.append((name, _new_image(name) | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(
        "NewDisk",
        [*required, *optional],
        rename=lambda name: name.replace("_", "-"),
        namespace={
            "__doc__": "A disk to be added: the keys of [[disk]] (docs/config.md), with absolute paths. Its image is "
            f"`image`, or an object: {', '.join(TABLES)}."
        },
        kw_only=True,
    )


def _new_image(table: str) -> type[Struct]:
    """The keys of a table that describes an image elsewhere."""
    fields: list[Any] = []
    for key, declared_key in keys_of_table(table).items():
        kind: Any = Annotated[TYPES[declared_key.json_type], Meta(description=declared_key.doc)]
        name = key.replace("-", "_")
        fields.append((name, kind) if declared_key.required else (name, kind | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(
        f"New{table.capitalize()}Image",
        fields,
        rename=lambda name: name.replace("_", "-"),
        namespace={"__doc__": f"An image elsewhere: the keys of [disk.{table}] (docs/remote.md), with absolute paths."},
        kw_only=True,
    )


NewDisk = _new_disk()
