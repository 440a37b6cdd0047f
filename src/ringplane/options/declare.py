"""One declaration per option.

A group of options is a class of `Options`, and each option is a field of it:

    class ImageOptions(Options):
        read_only: bool = option(FLAG, default=False, help="Serve a read-only disk.", doc="`true`: writes fail")

From the field come the option of `ringplane serve` with its help text, the key of the configuration file with its
check, the keyword of `ringplane.serve` and `DiskConfig` with its type and default, the comparison at a hand-over, and
the row in docs/config.md. Rules that concern several options are in the method `check` of the group. A group that needs
the options of another one for that is a subclass of it. `disk_config.py` puts the groups together.

These modules import only the standard library: `ringplane --help` must be quick.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, ParamSpec, TypeVar, dataclass_transform

from ringplane.options.kinds import Kind

Arguments = ParamSpec("Arguments")
Group = TypeVar("Group")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Option:
    """What is declared of an option.

    It is on the command line if it has a `help` text, and in the configuration file if it has a `doc`.
    """

    kind: Kind
    help: str
    # The cells of docs/config.md, in Markdown; without the second one it shows the default.
    doc: str
    doc_default: str | None
    # How the command line spells it, if not as its name.
    flags: tuple[str, ...]
    # On the command line it can be repeated; this makes its value of those that are given.
    several: Callable[[Any], Any] | None
    # It cannot change when a process takes over from another one: the guest, or other processes, rely on it.
    fixed: bool
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        """Its name in the configuration file."""
        return dashed(self.name)


def option(
    kind: Kind,
    *,
    help: str = "",
    doc: str = "",
    doc_default: str | None = None,
    flags: tuple[str, ...] = (),
    several: Callable[[Any], Any] | None = None,
    fixed: bool = False,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    kw_only: bool = True,
) -> Any:
    """The declaration of an option, as the field of a group."""
    declared = Option(kind, help, doc, doc_default, flags, several, fixed)
    metadata = {Option: declared}
    return field(default=default, default_factory=default_factory, kw_only=kw_only, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, field))
class Options:
    """The base of all groups. Their subclasses are frozen dataclasses, which check their values when they are made."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, each in declared(type(self)).items():
            value = getattr(self, name)
            try:
                # A default may be a value that cannot be given, such as None.
                if value != each.default:
                    each.kind.check(value)
            except ValueError as error:
                raise WrongOptions(f"{{{name}}}: {{error}}", error=error) from None
        for group in type(self).__mro__:
            vars(group).get("check", _no_rules)(self)


def _no_rules(_: Options) -> None:
    """A group without a method `check`."""


def declared(group: type[Options]) -> dict[str, Option]:
    """The options of a group by their names: its own, then those of its bases, the last base first."""
    own = inspect.get_annotations(group)
    return {
        each.name: dataclasses.replace(each.metadata[Option], name=each.name, default=_default(each))
        for each in sorted(dataclasses.fields(group), key=lambda each: each.name not in own)
        if Option in each.metadata
    }


def values(options: Options, group: type[Options]) -> dict[str, Any]:
    """The values that `options` has for those of a group, by their names."""
    return {name: getattr(options, name) for name in declared(group)}


def _default(declared: dataclasses.Field[Any]) -> Any:
    if declared.default_factory is not MISSING:
        return declared.default_factory()
    return declared.default


def dashed(name: str) -> str:
    """The name of an option in the configuration file, and after two dashes on the command line."""
    return name.replace("_", "-")


class WrongOptions(ValueError):
    """Options that have a wrong value or do not fit together.

    In the sentence `{share_rw}` stands for that option, which `str` spells as in Python. Other names in braces are
    `values`.
    """

    def __init__(self, sentence: str, **values: object) -> None:
        super().__init__(sentence)
        self._sentence, self._values = sentence, values

    def of(self, place: str) -> WrongOptions:
        """The same, with the place at its beginning."""
        return WrongOptions("{place}" + self._sentence, place=place, **self._values)

    @property
    def options(self) -> list[str]:
        """The names of the options that the sentence is about, the first one first."""
        return [name for name in re.findall(r"\{(\w+)\}", self._sentence) if name not in self._values]

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The sentence with the options spelled by `spell`, which gets the name of each one."""
        return self._sentence.format_map(self._values | {name: spell(name) for name in self.options})

    def __str__(self) -> str:
        return self.spelled(str)


def taking(
    group: Callable[Arguments, Group],
) -> Callable[[Callable[[Group], Result]], Callable[Arguments, Result]]:
    """A decorator: the function gets the options of a group as one object, its callers give them as keywords."""

    def decorate(function: Callable[[Group], Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            return function(group(*arguments, **keywords))

        returned = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(group).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate
