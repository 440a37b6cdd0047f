"""`ringplane top` for scripts, files and terminals that cannot move their cursor: one table after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import click
import msgspec
from rich.console import Console

from ringplane.api.schemas import Statistics
from ringplane.cli.top.known import View
from ringplane.cli.top.lines import plain
from ringplane.cli.top.live_screen import TARGET, known, trouble
from ringplane.cli.top.sampler import Sampler
from ringplane.cli.top.table_layout import listing
from ringplane.client.api_errors import ApiError
from ringplane.client.client import Client
from ringplane.client.rates import Rates
from ringplane.system.signals import Signals


class PlainOutput:
    """Prints what was measured in each interval."""

    def __init__(self, client: Client, interval: float, view: View, signals: Signals, console: Console) -> None:
        self._client, self._interval, self._signals, self._console = client, interval, signals, console
        self._sampler, self._view = Sampler(), view

    def run(self, *, once: bool, as_json: bool) -> None:
        """For one interval or without an end. Raises Interrupted, and ApiError if the first answer does not come."""
        self._sampler.add(self._client.read(TARGET, Statistics))
        for number, rates in enumerate(self._measured(once)):
            if as_json:
                click.echo(msgspec.json.encode(rates))
            else:
                click.echo("\n".join([""] * (number > 0) + self._table(sparklines=not once)))
            if once:
                return

    def _measured(self, once: bool) -> Iterator[Rates]:
        """The rates of one interval after the other. It ends with ApiError only if there is to be but one."""
        connected = True
        for _ in self._intervals():
            try:
                rates = self._sampler.add(self._client.read(TARGET, Statistics))
            except ApiError as error:
                if once:
                    raise
                if connected:
                    click.echo(f"{self._client.path}: {trouble(error)}", err=True)
                connected = False
                self._sampler.interrupt()
                continue
            connected = True
            if rates is not None:
                yield rates

    def _intervals(self) -> Iterator[None]:
        """At the end of each."""
        # Nothing is ever written to it.
        fd, due = os.eventfd(0, os.EFD_CLOEXEC), time.monotonic()
        try:
            while True:
                due = max(due, time.monotonic() - self._interval) + self._interval
                self._signals.wait(fd, max(due - time.monotonic(), 0.0))
                yield
        finally:
            os.close(fd)

    def _table(self, *, sparklines: bool) -> list[str]:
        """The lines. A single interval has no past."""
        found = known(self._client, self._sampler, self._console)
        shown = found if sparklines else replace(found, bars="")
        return [plain(line) for line in listing(shown, self._view, self._console.width)]
