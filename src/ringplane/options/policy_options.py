"""The policies of a disk: which ones, with which parameters. What these can be says the file of a policy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ringplane.options.declare import Options, option
from ringplane.options.kinds import Kind, list_from_toml, shown, suggestion

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
KEYS = ("policy", "name", "enabled", "parameters")
SWITCH = {"yes": True, "no": False}
EXAMPLE = '; example: [[disk.policy]] with policy = "error"'
MAX_POLICIES = 64


@dataclass(frozen=True, slots=True)
class PolicyUse:
    """One policy of a disk.

    `policy` is FILE.py:NAME, FILE.py with one policy in it, or the name of one that ships. The values of `parameters`
    are numbers, or texts as on the command line. `name`: by which it is called afterwards; no two of a disk have the
    same.
    """

    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    enabled: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not isinstance(self.policy, str) or not self.policy.isprintable() or not self.policy:
            raise ValueError(f"{shown(self.policy)} is not FILE.py:NAME or the name of a policy")
        if not isinstance(self.name, str) or (self.name and not NAME.fullmatch(self.name)):
            raise ValueError(f"name: {shown(self.name)} is not up to 64 letters, digits, dots, - and _")
        if not isinstance(self.enabled, bool):
            raise ValueError(f"enabled: {shown(self.enabled)} is neither true nor false")
        if not isinstance(self.parameters, Mapping) or not all(isinstance(key, str) for key in self.parameters):
            raise ValueError(
                f"parameters: {shown(self.parameters)} is not a table; an example: {{ probability = 0.1 }}"
            )
        for key, value in self.parameters.items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"{key}: {shown(value)} is neither a number nor a text")

    @property
    def default_name(self) -> str:
        """Its name in the file, if that is known, or that of the file."""
        last = self.policy.rpartition("/")[2].rpartition(":")[2]
        return re.sub(r"[^A-Za-z0-9_-]", "_", last.removesuffix(".py"))[:48] or "policy"

    @property
    def path(self) -> Path | None:
        """That of its file; None: it ships."""
        file = self._file
        return Path(file) if file else None

    @property
    def _file(self) -> str:
        file = self.policy.rpartition(":")[0]
        return file if file.endswith(".py") else self.policy if self.policy.endswith(".py") else ""

    def with_path(self, change: Callable[[Path], Path]) -> PolicyUse:
        """With the path of its file changed, if it has one."""
        if self.path is None:
            return self
        return replace(self, policy=f"{change(self.path)}{self.policy.removeprefix(self._file)}")


def parse_policy(text: str) -> PolicyUse:
    """`error`, `error,operation=write,probability=0.1`, `faults.py:slow,name=s,enabled=no`. Raises ValueError."""
    policy, *pairs = text.split(",")
    given: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{pair!r} is not KEY=VALUE; an example: error,operation=write,probability=0.1")
        if key.strip() in given:
            raise ValueError(f"{key.strip()} is given twice")
        given[key.strip().replace("-", "_")] = value.strip()
    name, enabled = given.pop("name", ""), given.pop("enabled", "yes")
    if enabled not in SWITCH:
        raise ValueError(f"enabled: {enabled!r} is neither yes nor no")
    return PolicyUse(policy.strip(), given, name, SWITCH[enabled])


def policy_from_table(table: Any) -> PolicyUse:
    """A table [[disk.policy]]. Raises ValueError."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{shown(table)} is not a table{EXAMPLE}")
    for key in table:
        if key not in KEYS:
            raise ValueError(f"unknown key {shown(key)}{suggestion(key, KEYS)}")
    if "policy" not in table:
        raise ValueError(f"policy is missing; it is FILE.py:NAME, or the name of a policy that ships{EXAMPLE}")
    parameters = table.get("parameters", {})
    if isinstance(parameters, Mapping):
        parameters = underscored(parameters)
    return PolicyUse(**{**table, "parameters": parameters})


def underscored(parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """By their names in Python, in which users may write dashes."""
    return {str(key).replace("-", "_"): value for key, value in parameters.items()}


def table_of(use: PolicyUse) -> dict[str, Any]:
    """The inverse of `policy_from_table`."""
    table: dict[str, Any] = {"policy": use.policy, "name": use.name, "parameters": dict(use.parameters)}
    return {key: value for key, value in table.items() if value} | ({} if use.enabled else {"enabled": False})


def policies_from_tables(tables: Any) -> tuple[PolicyUse, ...]:
    """All policies of a disk, which may be none. Raises ValueError."""
    return _from_toml(tables) if tables != [] else ()


def named_policies(uses: Sequence[PolicyUse]) -> list[PolicyUse]:
    """The same, each with a name: error, error-2, ... Raises ValueError if two have the same."""
    taken = Counter(use.name for use in uses if use.name)
    for name, count in taken.items():
        if count > 1:
            raise ValueError(f"two policies have the name {shown(name)}")
    named = []
    for use in uses:
        name, number = use.name or use.default_name, 1
        while not use.name and name in taken:
            number += 1
            name = f"{use.default_name}-{number}"
        taken[name] += 1
        named.append(replace(use, name=name))
    return named


def _check(uses: Any) -> None:
    if isinstance(uses, str) or not isinstance(uses, Sequence) or not all(isinstance(each, PolicyUse) for each in uses):
        raise ValueError(f"{shown(uses)} is not a list of PolicyUse")
    if len(uses) > MAX_POLICIES:
        raise ValueError(f"{len(uses)} policies are more than {MAX_POLICIES}")
    named_policies(uses)


def _from_toml(value: Any) -> tuple[PolicyUse, ...]:
    uses = tuple(policy_from_table(table) for table in list_from_toml(value, "tables", EXAMPLE))
    _check(uses)
    return uses


# On the command line an option for each of them.
POLICIES = Kind(
    "POLICY[,KEY=VALUE...]",
    parse_policy,
    _from_toml,
    _check,
    to_toml=lambda uses: [table_of(use) for use in uses],
    json_types=("array",),
    with_paths=lambda change, uses: tuple(use.with_path(change) for use in uses),
)


class PolicyOptions(Options):
    """What the disk does with requests besides serving them."""

    policy: Sequence[PolicyUse] = option(
        POLICIES,
        default=(),
        several=tuple,
        help="Have a policy decide what becomes of each request: FILE.py:NAME, or the name of one that ships, with its "
        "parameters, for example error,operation=write,probability=0.1 (docs/policies.md). They are asked in order.",
        doc="policies that decide what becomes of each request, in order, each a table `[[disk.policy]]` with the keys "
        "`policy` (`FILE.py:NAME`, or the name of one that ships), `parameters` (a table), `name` and `enabled`; "
        "[policies.md](policies.md)",
        doc_default="",
    )
