"""What each route does. Handlers run on the API's thread; what changes something runs on the control thread."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ringplane.api import schemas
from ringplane.api.call import Call
from ringplane.api.event_stream import EventStream
from ringplane.api.long_text import LongText
from ringplane.api.scrape import scrape
from ringplane.api.statistics import statistics as read_statistics
from ringplane.api.trace_stream import SHORTEST, TraceStream
from ringplane.block.layers.record import RecordLayer
from ringplane.control.config import ConfigError, read_disk
from ringplane.control.disk_recording import NOT_RECORDED
from ringplane.control.export import Export
from ringplane.control.operation_errors import Unavailable, WrongState, WrongValue
from ringplane.control.policing import find_policy
from ringplane.control.written_config import written_config
from ringplane.dataplane.ring_states import RingState
from ringplane.metrics.exposition import MEDIA_TYPE
from ringplane.options.declare import WrongOptions, dashed, declared
from ringplane.options.disk_config import DiskConfig
from ringplane.options.image_address import TABLES
from ringplane.options.policy_options import PolicyUse, underscored

if TYPE_CHECKING:
    from ringplane.policies.running import RunningPolicy

# Streams of events at a time; each is a connection (connections.py).
MAX_STREAMS = 16


async def openapi(call: Call) -> Response:
    return Response(call.description, media_type="application/json")


async def list_disks(call: Call) -> schemas.Disks:
    not_served = [schemas.NotServed(each.name, each.image, each.socket, each.why) for each in call.server.not_served]
    return schemas.Disks([described(export) for export in call.server.exports], not_served)


async def show_disk(call: Call) -> schemas.Disk:
    return described(call.export)


async def add_disk(call: Call) -> schemas.Disk:
    keys = await call.body(dict[str, Any])
    try:
        disk = read_disk(keys, call.server.spread())
    except ConfigError as error:
        raise _wrong_key(str(error)) from None
    except WrongOptions as error:
        raise _wrong_key(error.spelled(dashed), dashed(error.options[0])) from None
    return described(await call.operate(lambda: call.server.add(disk)))


async def change_disk(call: Call) -> schemas.Disk:
    export, change = call.export, await call.body(schemas.Change)
    await call.operate(lambda: export.operations.change_limits(change.limits))
    return described(export)


async def remove_disk(call: Call) -> None:
    name, detach = call.name, call.flag("detach")
    await call.operate(lambda: call.server.remove(name, detach=detach))


async def resize(call: Call) -> schemas.Resized:
    export, wanted = call.export, await call.body(schemas.Resize, schemas.Resize())
    resized = await call.operate(lambda: export.operations.resize(wanted.size))
    return schemas.Resized(resized.before, resized.now)


async def pause(call: Call) -> schemas.Disk:
    export = call.export
    await call.operate(export.operations.pause)
    return described(export)


async def resume(call: Call) -> schemas.Disk:
    export = call.export
    await call.operate(export.operations.resume)
    return described(export)


async def flush(call: Call) -> schemas.Disk:
    export = call.export
    await call.operate(export.operations.flush)
    return described(export)


async def list_policies(call: Call) -> schemas.Policies:
    return schemas.Policies([policy_of(each) for each in call.export.disk.running_policies])


async def show_policy(call: Call) -> schemas.Policy:
    return policy_of(find_policy(call.export.disk, call.policy))


async def add_policy(call: Call) -> schemas.Policy:
    export, wanted = call.export, await call.body(schemas.NewPolicy)
    use = _use_of(wanted)
    return policy_of(await call.operate(lambda: export.operations.policies.add(use, wanted.position)))


async def replace_policy(call: Call) -> schemas.Policy:
    export, name, wanted = call.export, call.policy, await call.body(schemas.NewPolicy)
    if wanted.name not in ("", name):
        raise WrongValue(f"{wanted.name!r} is not the name in the path", "name", "leave it out")
    if wanted.position is not None:
        raise WrongValue("a policy that replaces another one has its place", "position", "leave it out")
    use = _use_of(wanted)
    return policy_of(await call.operate(lambda: export.operations.policies.replace(name, use)))


async def change_policy(call: Call) -> schemas.Policy:
    export, name, wanted = call.export, call.policy, await call.body(schemas.PolicyChange)
    parameters = underscored(wanted.parameters)
    return policy_of(await call.operate(lambda: export.operations.policies.change(name, parameters, wanted.enabled)))


async def remove_policy(call: Call) -> None:
    export, name = call.export, call.policy
    await call.operate(lambda: export.operations.policies.remove(name))


async def release_policy(call: Call) -> schemas.Policy:
    export, name = call.export, call.policy
    await call.operate(lambda: export.operations.policies.release(name))
    return policy_of(find_policy(export.disk, name))


def policy_of(policy: RunningPolicy) -> schemas.Policy:
    """What the API shows of a policy."""
    return schemas.Policy(
        policy.name, policy.address_of_file, policy.loaded.program.doc, policy.enabled, policy.shown(), policy.counters
    )


def _use_of(wanted: schemas.NewPolicy) -> PolicyUse:
    """Raises WrongValue."""
    try:
        use = PolicyUse(wanted.policy, underscored(wanted.parameters), wanted.name, wanted.enabled)
    except ValueError as error:
        raise WrongValue(str(error), "name" if wanted.name else "policy") from None
    if use.path is not None and not use.path.is_absolute():
        raise WrongValue(f"{wanted.policy!r} is not an absolute path", "policy", "an absolute path, or a name")
    return use


async def start_recording(call: Call) -> schemas.Recording:
    export, wanted = call.export, await call.body(schemas.NewRecording)
    path = Path(wanted.file)
    if not path.is_absolute():
        raise WrongValue(f"{wanted.file!r} is not an absolute path", "file", "an absolute path")
    return recording_of(await call.operate(lambda: export.operations.recording.start(path)))


async def show_recording(call: Call) -> schemas.Recording:
    if layer := call.export.operations.recording.layer:
        return recording_of(layer)
    raise WrongState(*NOT_RECORDED)


async def end_recording(call: Call) -> schemas.Recording:
    return recording_of(await call.operate(call.export.operations.recording.end))


async def mark(call: Call) -> None:
    export, wanted = call.export, await call.body(schemas.Mark)
    await call.operate(lambda: export.operations.recording.mark(wanted.text))


def recording_of(layer: RecordLayer) -> schemas.Recording:
    """What the API shows of a recording."""
    file = layer.file
    return schemas.Recording(str(file.path), file.token, file.count, file.failed or None)


async def list_io_threads(call: Call) -> schemas.IoThreads:
    threads = call.server.threads
    assigned = {export.name: Counter(worker.name for worker in export.disk.workers) for export in call.server.exports}
    return schemas.IoThreads(
        [
            schemas.IoThreadState(
                name=thread.name,
                engine=threads.workers[thread.name].engine.name,
                cpus=sorted(thread.cpus) if thread.cpus is not None else None,
                poll_us=thread.poll_us,
                pin_memory=thread.pin_memory,
                disks=[name for name, counted in assigned.items() if thread.name in counted],
                queues=sum(counted[thread.name] for counted in assigned.values()),
            )
            for thread in threads.io_threads
        ]
    )


async def statistics(call: Call) -> schemas.Statistics:
    return read_statistics(call.server)


async def config(call: Call) -> Response:
    return Response(written_config(call.server), media_type="application/toml")


async def metrics(call: Call) -> Response:
    return LongText(scrape(call.server), MEDIA_TYPE)


async def events(call: Call) -> Response:
    if call.server.events.subscribers >= MAX_STREAMS:
        raise Unavailable(f"{MAX_STREAMS} streams of events are open already", "", "close one of them")
    return EventStream(call.server.events, call.headers.get("last-event-id", ""))


async def trace(call: Call) -> Response:
    seconds = call.seconds("seconds", SHORTEST)
    exports = [call.server.find(name) for name in call.several("disk")]
    disks = {export.name: export.disk.workers for export in exports}
    return TraceStream(await call.server.trace_recorder.start(disks), seconds)


async def end_trace(call: Call) -> None:
    call.server.trace_recorder.end(call.number("began"))


def described(export: Export) -> schemas.Disk:
    """What the API shows of a disk."""
    disk, socket = export.disk, export.config.socket_path
    return schemas.Disk(
        name=export.name,
        image=disk.source.title,
        socket=str(socket) if socket is not None else None,
        state=export.state,
        front_end=export.front_end or None,
        paused=export.paused,
        size=disk.size,
        block_size=disk.block_size,
        read_only=disk.source.read_only,
        serial=disk.serial,
        how=disk.how,
        queues=len(disk.queues),
        io_threads=list(export.config.io_threads),
        in_flight=export.in_flight,
        limits=export.limits,
        throttled_seconds=export.throttled,
        flush_failed=disk.flush_failed,
        trouble=disk.source.trouble or None,
        counters={
            kind: schemas.Counter(counter.requests, counter.errors, counter.bytes)
            for kind, counter in export.counters.items()
        },
        rings=[
            schemas.Ring(queue.number, queue.state.value, queue.in_flight)
            for queue in disk.queues
            if queue.state is not RingState.STOPPED
        ],
    )


def _wrong_key(problem: str, key: str = "") -> WrongValue:
    """`problem` is a sentence of the options; `right` is what the documentation says of the key."""
    keys = {option.key: option for option in declared(DiskConfig).values()}
    names = (*keys, *TABLES)
    key = key or next((name for name in names if problem.startswith((f"{name}:", f"{name} is missing"))), "")
    return WrongValue(problem, key, schemas.meaning(keys[key]) if key in keys else "")
