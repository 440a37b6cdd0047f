"""`ringplane ctl policy`: the policies of a disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from click.shell_completion import CompletionItem

from ringplane.cli.ctl.targets import as_json, asking, complete, disk_name
from ringplane.cli.types import Parsed
from ringplane.options.policy_options import PolicyUse, parse_policy, table_of

if TYPE_CHECKING:
    from ringplane.client.client import Client

USE = Parsed("policy", parse_policy)


@click.group("policy", short_help="The policies of a disk.")
def policy() -> None:
    """List, add, change and remove policies of a disk (docs/policies.md), while its guest uses it.

    Each command returns when all requests that are fetched from then on pass the policies that it has made.
    """


def _target(name: str, *parts: str) -> str:
    """The path in the API."""
    from ringplane.client.client import disk_path

    return disk_path(name, "/".join(["policies", *(quote(part, safe="") for part in parts)]))


def _policies(context: click.Context) -> str:
    return _target(str(context.params.get("name")))


def _complete_policies(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(
        context, incomplete, _policies(context), lambda answer: [each["name"] for each in answer["policies"]]
    )


def _complete_keys(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    target = f"{_policies(context)}/{quote(str(context.params.get('policy')), safe='')}"
    return complete(context, incomplete, target, lambda answer: [f"{key}=" for key in answer["parameters"]])


policy_name = click.argument("policy", shell_complete=_complete_policies)


@policy.command("list", short_help="List the policies of a disk.")
@disk_name
@as_json
@asking
def list_policies(client: Client, name: str, as_json: bool) -> None:
    """List the policies of the disk NAME in order, with their parameters and counters."""
    from ringplane.api.schemas import Policies
    from ringplane.cli.ctl.api_tables import print_policies

    data = client.ask("GET", _target(name))
    if as_json:
        click.echo(data)
    else:
        print_policies(client.decode(data, Policies).policies)


@policy.command("add", short_help="Add a policy.")
@disk_name
@click.argument("policy", type=USE, metavar="POLICY[,KEY=VALUE...]")
@click.option(
    "--position",
    type=click.IntRange(0, 63),
    metavar="N",
    help="Before the policy at this position, from 0 [default: last].",
)
@as_json
@asking
def add_policy(client: Client, name: str, policy: PolicyUse, position: int | None, as_json: bool) -> None:
    """Add a policy to the disk NAME, as --policy of `ringplane serve` does: FILE.py:NAME, or one that ships.

    For example: error,operation=write,probability=0.1. The key `name` is by which it is called afterwards.
    """
    place = {} if position is None else {"position": position}
    _show(client, client.ask("POST", _target(name), _body(policy) | place), name, "added", as_json)


@policy.command("replace", short_help="Replace a policy.")
@disk_name
@policy_name
@click.argument("by", type=USE, metavar="POLICY[,KEY=VALUE...]")
@as_json
@asking
def replace_policy(client: Client, name: str, policy: str, by: PolicyUse, as_json: bool) -> None:
    """Put another policy in the place of the one with the name POLICY, or the same one with the new text of its file.

    It continues the counters. If the file has not changed, state and random numbers continue too.
    """
    _show(client, client.ask("PUT", _target(name, policy), _body(by)), name, "replaced", as_json)


@policy.command("set", short_help="Change parameters of a policy.")
@disk_name
@policy_name
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...", shell_complete=_complete_keys)
@as_json
@asking
def set_policy(client: Client, name: str, policy: str, values: Sequence[str], as_json: bool) -> None:
    """Change parameters of a POLICY of the disk NAME; the others, and its counters, stay as they are."""
    pairs = [each.partition("=") for each in values]
    for key, equals, _ in pairs:
        if not equals:
            raise click.UsageError(f"{key!r} is not KEY=VALUE; an example: probability=0.1")
    _change(client, name, policy, {"parameters": {key: value for key, _, value in pairs}}, "changed", as_json)


@policy.command("enable", short_help="Switch a policy on.")
@disk_name
@policy_name
@as_json
@asking
def enable_policy(client: Client, name: str, policy: str, as_json: bool) -> None:
    """Switch a POLICY of the disk NAME on."""
    _change(client, name, policy, {"enabled": True}, "switched on", as_json)


@policy.command("disable", short_help="Switch a policy off.")
@disk_name
@policy_name
@as_json
@asking
def disable_policy(client: Client, name: str, policy: str, as_json: bool) -> None:
    """Switch a POLICY of the disk NAME off. Requests that hang because of it continue."""
    _change(client, name, policy, {"enabled": False}, "switched off", as_json)


@policy.command("release", short_help="End what hangs.")
@disk_name
@policy_name
@as_json
@asking
def release_policy(client: Client, name: str, policy: str, as_json: bool) -> None:
    """Have the requests of the disk NAME continue that hang because of a POLICY now. It stays; later ones may hang."""
    _show(client, client.ask("POST", _target(name, policy, "release")), name, "what hung continues", as_json)


@policy.command("remove", short_help="Remove a policy.")
@disk_name
@policy_name
@as_json
@asking
def remove_policy(client: Client, name: str, policy: str, as_json: bool) -> None:
    """Remove a POLICY of the disk NAME. Requests that hang because of it continue."""
    client.ask("DELETE", _target(name, policy))
    # The answer of the API has no body.
    if not as_json:
        click.echo(f"{name}: {policy}: removed")


def _body(use: PolicyUse) -> dict[str, Any]:
    """With the path as seen from here."""
    return table_of(use.with_path(lambda path: Path(os.path.abspath(path))))


def _change(client: Client, name: str, policy: str, body: dict[str, Any], done: str, as_json: bool) -> None:
    _show(client, client.ask("PATCH", _target(name, policy), body), name, done, as_json)


def _show(client: Client, data: bytes, name: str, done: str, as_json: bool) -> None:
    from ringplane.api.schemas import Policy
    from ringplane.cli.ctl.api_tables import pairs_text

    if as_json:
        click.echo(data)
        return
    policy = client.decode(data, Policy)
    click.echo(f"{name}: {policy.name}: {done}; {pairs_text(policy.parameters)}")
