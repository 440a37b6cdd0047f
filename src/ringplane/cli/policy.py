"""`ringplane policy`: lists the policies that ship, and checks files of policies."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ringplane.policies.loading import LoadedPolicy
    from ringplane.policies.running import RunningPolicy

MISTAKE = re.compile(r".*\.py:[0-9]+: ")

# Seconds that all requests of the table may take.
PATIENCE = 10.0


@click.group(short_help="List and check policies.")
def policy() -> None:
    """List the policies that ship, and check files of policies (docs/policies.md)."""


@policy.command("list", short_help="List the policies that ship.")
@click.argument("names", nargs=-1)
def list_policies(names: Sequence[str]) -> None:
    """List the policies that ship, or those of these NAMES or files, with their parameters and counters."""
    from ringplane.options.kinds import suggestion
    from ringplane.policies.loading import PolicyError, read_policies, shipped, split_address

    files = shipped()
    try:
        for name in names or files:
            path, only = split_address(name)
            if path is None and name not in files:
                raise click.ClickException(f"no policy {name} ships{suggestion(name, files)}")
            for each in read_policies(path or files[name]):
                if only in ("", each.program.name):
                    _describe(each)
    except PolicyError as error:
        raise click.ClickException(str(error)) from None


def _describe(loaded: LoadedPolicy) -> None:
    program = loaded.program
    _print(f"{program.name}: ", program.doc)
    for key, each in program.declared.parameters.items():
        given = f"{key}={each.kind.shown(each.default)}"
        _print(f"    {given:24} ", each.doc)
    for key, counted in program.declared.counters.items():
        _print(f"    counts {key}: ", counted.doc)


def _print(what: str, doc: str) -> None:
    """A line; on a terminal that is too narrow for it the description continues below itself."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(what) + len(doc)
    click.echo(click.wrap_text(doc, max(width, len(what) + 20), what, " " * len(what)))


@policy.command(short_help="Check a file of policies.")
@click.argument("policy", metavar="FILE[:NAME]")
@click.argument("parameters", nargs=-1, metavar="[KEY=VALUE]...")
def check(policy: str, parameters: Sequence[str]) -> None:
    """Check a file of policies, and show what one of them answers to a table of requests.

    Prints a line for each mistake and exits with status 1. Without mistakes the policy is compiled and asked about some
    requests, with these parameters. FILE:NAME may also be the name of a policy that ships.
    """
    from ringplane.compiler.bad_code import BadCode
    from ringplane.options.policy_options import parse_policy
    from ringplane.policies.loading import PolicyError, find_policy
    from ringplane.policies.running import RunningPolicy, WrongParameter

    try:
        use = parse_policy(",".join([policy, *parameters]))
        running = RunningPolicy(use.name or "policy", find_policy(use.policy, check=True), use.parameters)
        for unit in running.loaded.units:
            unit.address()
    except (PolicyError, BadCode) as error:
        # Mistakes have their file and line first, where editors look for them.
        click.echo(str(error) if MISTAKE.match(str(error)) else f"Error: {error}", err=True)
        raise SystemExit(1) from None
    except (WrongParameter, ValueError) as error:
        raise click.ClickException(str(error)) from None
    _try(running)


def _try(policy: RunningPolicy) -> None:
    """A policy that never returns cannot be interrupted, so it runs on a thread of its own."""
    from ringplane.policies.trial import Trial

    lines: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            lines.extend(Trial(policy).run())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    for line in lines:
        click.echo(line)
    if thread.is_alive():
        click.echo(f"Error: {policy.loaded.path}: the policy has not answered after {PATIENCE:g} seconds", err=True)
        os._exit(1)
    if errors:
        raise errors[0]
    click.echo("ok: " + ", ".join(f"{key}={count}" for key, count in policy.counters.items()))
