"""openapi.json, generated from the table of routes and the classes of the bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from ringplane.api import schemas
from ringplane.api.routes import BYTES, JSON, Parameter, Route

REFERENCE = "#/components/schemas/{name}"

# Of any operation: 503 if too many connections are in use.
ALWAYS = (500, 503)

STATUSES = {
    400: "A value is wrong.",
    404: "There is no such disk, or it has no such policy.",
    409: "Impossible in the present state.",
    413: "The body is too large.",
    500: "An internal error; please report it.",
    503: "It takes too long, or too much is under way.",
}


def describe(routes: Iterable[Route], version: str) -> bytes:
    """The whole document."""
    routes = list(routes)
    kinds = [schemas.Error, schemas.EventData, schemas.Lost]
    kinds += [kind for route in routes for kind in (route.body, route.answer) if isinstance(kind, type)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "ringplane",
            "version": version,
            "description": "Disks of a running ringplane process; docs/api.md explains it.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1)


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "responses": {
            str(route.status): {"description": "Done.", **_content(route.answer)},
            **{str(status): _error(status) for status in sorted({*route.errors, *ALWAYS})},
        },
    }
    if parameters := [*_path_parameters(route), *_query_parameters(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": route.body_required, **_content(route.body)}
    return operation


def _content(kind: type[Struct] | str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    if isinstance(kind, type):
        return {"content": {"application/json": {"schema": _reference(kind)}}}
    schema = {} if kind == BYTES else {"type": "object" if kind == JSON else "string"}
    return {"content": {kind: {"schema": schema}}}


def _error(status: int) -> dict[str, Any]:
    return {"description": STATUSES[status], **_content(schemas.Error)}


def _reference(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(name=kind.__name__)}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "in": "query", "description": each.text, "schema": _schema_of(each)} for each in route.query
    ]


def _schema_of(parameter: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": parameter.kind}
    if parameter.kind == "boolean":
        schema["default"] = False
    return {"type": "array", "items": schema} if parameter.several else schema
