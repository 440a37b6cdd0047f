"""A small client of the API for tests: HTTP over a UNIX socket, and checks of answers against openapi.json."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from ringplane.client.unix_http import UnixConnection


class Answer:
    """The answer to one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.data = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, str]:
        """The error that it has to be."""
        error: dict[str, str] = self.json["error"]
        assert error.keys() == {"what", "where", "right"}
        return error


class Api:
    """Asks, and checks each answer against the description that the server itself has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: Any = None
        self.document = self.request("GET", "/openapi.json").json

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        connection = UnixConnection(self.path)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            answer = Answer(connection.getresponse())
        finally:
            connection.close()
        if self.document is not None:
            self.check(method, path, answer)
        return answer

    def get(self, path: str) -> Any:
        answer = self.request("GET", path)
        assert answer.status == 200, answer.data
        return answer.json

    def post(self, path: str, body: object = None, status: int = 200) -> Any:
        answer = self.request("POST", path, body)
        assert answer.status == status, answer.data
        return answer.json

    def patch(self, path: str, body: object) -> Any:
        answer = self.request("PATCH", path, body)
        assert answer.status == 200, answer.data
        return answer.json

    def delete(self, path: str) -> None:
        answer = self.request("DELETE", path)
        assert (answer.status, answer.data) == (204, b""), answer.data

    def disk(self, name: str) -> Any:
        return self.get(f"/v1/disks/{name}")

    def events(self, last: str = "") -> Iterator[tuple[str, str, Any]]:
        """The stream of events: id, kind and data of each; none is missed from the return on."""
        connection = UnixConnection(self.path)
        connection.request("GET", "/v1/events", headers={"Last-Event-ID": last} if last else {})
        response = connection.getresponse()
        assert (response.status, response.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        assert response.readline() == b": ringplane\n"
        return self._parsed(connection, response)

    def _parsed(self, connection: UnixConnection, response: http.client.HTTPResponse) -> Iterator[tuple[str, str, Any]]:
        with connection.sock:
            fields: dict[str, str] = {}
            while line := response.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                    continue
                if "data" in fields:
                    data = json.loads(fields["data"])
                    self.validate("Lost" if fields["event"] == "lost" else "EventData", data)
                    yield fields.get("id", ""), fields["event"], data
                fields = {}

    def check(self, method: str, path: str, answer: Answer) -> None:
        """An answer is one of those that the description has for this operation, and has the body that it says."""
        operation = self._operation(method, path.partition("?")[0])
        if operation is None:
            assert answer.status in (404, 405)
            self.validate("Error", answer.json)
            return
        described = operation["responses"].get(str(answer.status))
        assert described is not None, f"{method} {path}: {answer.status} is not in openapi.json: {answer.data!r}"
        if "content" not in described:
            assert answer.data == b""
            return
        ((media_type, content),) = described["content"].items()
        assert answer.headers["content-type"].partition(";")[0] == media_type
        value = answer.json if media_type == "application/json" else answer.data.decode()
        self._validator(content["schema"]).validate(value)

    def validate(self, name: str, value: object) -> None:
        self._validator({"$ref": f"#/components/schemas/{name}"}).validate(value)

    def _operation(self, method: str, path: str) -> Any:
        for template, operations in self.document["paths"].items():
            if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
                return operations.get(method.lower())
        return None

    def _validator(self, schema: Any) -> Draft202012Validator:
        return Draft202012Validator({**schema, "components": self.document["components"]})
