"""The table of all routes. The router and openapi.json are both made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec import Struct
from starlette.responses import Response

from ringplane.api import actions, schemas
from ringplane.api.call import Call

Handler = Callable[[Call], Awaitable[Struct | Response | None]]

JSON, TOML, EVENTS, TEXT = "application/json", "application/toml", "text/event-stream", "text/plain"
BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value in the query, which can be left out; `kind` is its type in JSON."""

    name: str
    kind: str
    text: str
    several: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `answer`: the class of a JSON body, another media type, or None (status 204)."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[Struct] | str | None
    body: type[Struct] | None = None
    body_required: bool = False
    query: tuple[Parameter, ...] = ()
    # Statuses of errors beside those that each operation can have.
    errors: tuple[int, ...] = ()
    status: int = 200


# Of an operation on one disk, and of one that changes something.
DISK, CHANGE = (404,), (400, 404, 409, 413, 503)

OPENAPI = Route("GET", "/openapi.json", actions.openapi, "This description.", JSON)

METRICS = Route("GET", "/metrics", actions.metrics, "Metrics for Prometheus (docs/metrics.md).", TEXT)

ROUTES = (
    OPENAPI,
    Route("GET", "/v1/disks", actions.list_disks, "List all disks.", schemas.Disks),
    Route(
        "POST", "/v1/disks", actions.add_disk, "Add a disk, and listen for its front end.", schemas.Disk,
        body=schemas.NewDisk, body_required=True, errors=(400, 409, 413, 503), status=201,
    ),
    Route("GET", "/v1/disks/{name}", actions.show_disk, "Show a disk.", schemas.Disk, errors=DISK),
    Route(
        "PATCH", "/v1/disks/{name}", actions.change_disk, "Change limits. Answers when they hold.", schemas.Disk,
        body=schemas.Change, body_required=True, errors=CHANGE,
    ),
    Route(
        "DELETE", "/v1/disks/{name}", actions.remove_disk, "Remove a disk; its image is left as it is.", None,
        query=(Parameter("detach", "boolean", "Also if a front end is attached, which is detached."),),
        errors=(400, 404, 409, 503), status=204,
    ),
    Route(
        "POST", "/v1/disks/{name}/resize", actions.resize, "Serve the new size of the image.", schemas.Resized,
        body=schemas.Resize, errors=CHANGE,
    ),
    Route(
        "POST", "/v1/disks/{name}/pause", actions.pause,
        "Fetch no requests from now on. Answers when those that were fetched have completed.", schemas.Disk,
        errors=(404, 409, 503),
    ),
    Route(
        "POST", "/v1/disks/{name}/resume", actions.resume, "Fetch requests again.", schemas.Disk,
        errors=(404, 409, 503),
    ),
    Route(
        "POST", "/v1/disks/{name}/flush", actions.flush, "Make all completed requests stable.", schemas.Disk,
        errors=(404, 409, 503),
    ),
    Route(
        "GET", "/v1/disks/{name}/policies", actions.list_policies, "List the policies of a disk, in order.",
        schemas.Policies, errors=DISK,
    ),
    Route(
        "POST", "/v1/disks/{name}/policies", actions.add_policy,
        "Add a policy (docs/policies.md). Answers when all requests that are fetched from now on pass it.",
        schemas.Policy, body=schemas.NewPolicy, body_required=True, errors=CHANGE, status=201,
    ),
    Route(
        "GET", "/v1/disks/{name}/policies/{policy}", actions.show_policy, "Show a policy.", schemas.Policy,
        errors=DISK,
    ),
    Route(
        "PUT", "/v1/disks/{name}/policies/{policy}", actions.replace_policy,
        "Replace a policy at its place, also by the new text of its file. Answers when that is in force.",
        schemas.Policy, body=schemas.NewPolicy, body_required=True, errors=CHANGE,
    ),
    Route(
        "PATCH", "/v1/disks/{name}/policies/{policy}", actions.change_policy,
        "Change parameters of a policy, or switch it on or off. Answers when that is in force.", schemas.Policy,
        body=schemas.PolicyChange, body_required=True, errors=CHANGE,
    ),
    Route(
        "DELETE", "/v1/disks/{name}/policies/{policy}", actions.remove_policy,
        "Remove a policy; requests that hang because of it continue.", None, errors=(404, 409, 503), status=204,
    ),
    Route(
        "POST", "/v1/disks/{name}/policies/{policy}/release", actions.release_policy,
        "Have the requests continue that hang because of a policy now.", schemas.Policy, errors=(404, 409, 503),
    ),
    Route(
        "POST", "/v1/disks/{name}/recording", actions.start_recording,
        "Record all changes of a disk to a new file (docs/recordings.md), from a moment with nothing in flight.",
        schemas.Recording, body=schemas.NewRecording, body_required=True, errors=CHANGE,
    ),
    Route(
        "GET", "/v1/disks/{name}/recording", actions.show_recording, "Show the recording.", schemas.Recording,
        errors=(404, 409),
    ),
    Route(
        "DELETE", "/v1/disks/{name}/recording", actions.end_recording,
        "End the recording. Answers when its file is complete.", schemas.Recording, errors=(404, 409, 503),
    ),
    Route(
        "POST", "/v1/disks/{name}/recording/marks", actions.mark, "Add a mark to the recording.", None,
        body=schemas.Mark, body_required=True, errors=CHANGE, status=204,
    ),
    Route("GET", "/v1/io-threads", actions.list_io_threads, "List the I/O threads.", schemas.IoThreads),
    Route(
        "GET", "/v1/statistics", actions.statistics, "The counters of all disks and I/O threads, for rates.",
        schemas.Statistics,
    ),
    Route("GET", "/v1/config", actions.config, "The configuration file that would make what runs.", TOML),
    METRICS,
    Route(
        "GET", "/v1/events", actions.events, "Follow what happens to disks (server-sent events).", EVENTS,
        errors=(503,),
    ),
    Route(
        "POST", "/v1/trace", actions.trace,
        "Record what happens to each request, as it happens (docs/tracing.md has the format).", BYTES,
        query=(
            Parameter("seconds", "number", "How long; without it until somebody ends it."),
            Parameter("disk", "string", "Only this disk; may be repeated.", several=True),
        ),
        errors=(400, 404, 409, 503),
    ),
    Route(
        "DELETE", "/v1/trace", actions.end_trace, "End the recording; its client gets the rest of it.", None,
        query=(Parameter("began", "integer", "Only the recording whose first line has this number."),),
        errors=(400, 409), status=204,
    ),
)  # fmt: skip
