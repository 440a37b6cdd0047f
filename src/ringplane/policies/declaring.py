"""How a policy is declared: the class of its parameters, counters and state, and its functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ringplane.policies.parameter_kinds import FLAG, REAL, WHOLE, ParameterKind, Value

KINDS = {"int": WHOLE, "float": REAL, "bool": FLAG}

# What begins the job of a unit of a policy (compiler/units.py).
POLICY = "policy "

# What users write beside the parameters of a policy, and what its class has.
RESERVED = ("policy", "name", "enabled", "parameters", "counters", "states")
# A parameter that every policy has: the first random number follows from it.
SEED = "seed"

MAX_ITEMS = 1 << 20

Function = Callable[..., Any]


class Mistake(Exception):
    """A declaration is wrong; the text says why."""


@dataclass(frozen=True)
class Parameter:
    """A value that users choose."""

    default: Any
    doc: str
    lowest: float | None = None
    highest: float | None = None
    kind: ParameterKind = WHOLE

    def value(self, given: object) -> Value:
        """Raises ValueError."""
        value = self.kind.value(given)
        low, high = self.lowest, self.highest
        if isinstance(value, int | float) and (
            (low is not None and value < low) or (high is not None and value > high)
        ):
            raise ValueError(f"{self.kind.shown(value)} is not {self._bounds()}")
        return value

    def _bounds(self) -> str:
        low, high = (None if each is None else self.kind.shown(each) for each in (self.lowest, self.highest))
        if high is None:
            return f"{low} or more"
        return f"{high} or less" if low is None else f"from {low} to {high}"


@dataclass(frozen=True)
class Counter:
    """What the policy counts, for its users."""

    doc: str


@dataclass(frozen=True)
class State:
    """Numbers that only the policy uses: one, or `count` of them as an array. They are 0 at first."""

    count: int | None = None


def parameter(
    default: Any, doc: str, lowest: float | None = None, highest: float | None = None, *, kind: Any = None
) -> Any:
    """A value that users choose: `rate: int = parameter(100, "requests per second", 1, 10_000)`.

    Its type is that of its annotation, int, float or bool, or `kind`: SIZE, DURATION (microseconds), OPERATION, RANGE
    (an array: the first byte, and the one after the last), FILE (1 while it exists), one_of("fast", "slow"). `lowest`
    and `highest` are possible. The default may be written as users write it: "5ms".
    """
    return Parameter(default, doc, lowest, highest, kind)


def counter(doc: str) -> Any:
    """What the policy counts: `failed: int = counter("requests that were failed")`."""
    return Counter(doc)


def state(count: int | None = None) -> Any:
    """What the policy remembers: a number, or an array of `count` numbers. It is 0 at first.

    The index of an array is taken modulo its length, so no index is outside.
    """
    return State(count)


class Policy:
    """The base of the class of a policy's parameters, counters and state; its docstring describes the policy."""

    parameters: ClassVar[Mapping[str, Parameter]] = {}
    counters: ClassVar[Mapping[str, Counter]] = {}
    states: ClassVar[Mapping[str, State]] = {}

    def __init_subclass__(cls) -> None:
        """Raises Mistake."""
        kinds = inspect.get_annotations(cls)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Parameter | Counter | State)}
        for name in [*kinds, *own]:
            _check_field(name, own.get(name), kinds.get(name))
        given = {name: _complete(name, each, kinds[name]) for name, each in _of(Parameter, own).items()}
        cls.parameters = {**given, SEED: Parameter(0, "from which the random numbers follow", 0)}
        cls.counters, cls.states = _of(Counter, own), _of(State, own)


def _of(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in fields.items() if isinstance(each, kind)}


def _check_field(name: str, declared: Any, kind: Any) -> None:
    if declared is None:
        raise Mistake(f"{name} has no value; give it parameter(...), counter(...) or state(...)")
    if name in (*RESERVED, SEED):
        raise Mistake(f"{name} is taken; choose another name")
    if kind not in KINDS:
        raise Mistake(f"{name} has no type; write {name}: int = ..., or float or bool")
    if isinstance(declared, Parameter):
        return
    if kind != "int":
        raise Mistake(f"{name} is {kind}; counters and state are int")
    count = getattr(declared, "count", None)
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_ITEMS):
        raise Mistake(f"{name}: state({count!r}): an array has 1 to {MAX_ITEMS} numbers")


def _complete(name: str, given: Parameter, annotation: str) -> Parameter:
    """With the kind of its annotation, and its default as a number."""
    kind = given.kind if given.kind is not None else KINDS[annotation]
    if not isinstance(kind, ParameterKind):
        raise Mistake(f"{name}: kind={kind!r} is not SIZE, DURATION, OPERATION, RANGE, FILE or one_of(...)")
    if given.kind is not None and annotation != "int":
        raise Mistake(f"{name} is {annotation}; a parameter with a kind is int")
    whole = Parameter(given.default, given.doc, given.lowest, given.highest, kind)
    try:
        # A number is what the policy gets, for example WRITE.
        default = given.default if type(given.default) is int and kind.count == 1 else whole.value(given.default)
        kind.shown(default)
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{name}: its default: {error}") from None
    return Parameter(default, given.doc, given.lowest, given.highest, kind)


@dataclass
class Program:
    """A policy as its file declares it: its class and its functions. `data`: it reads or changes data."""

    declared: type[Policy]
    data: bool
    function: Function
    after: Function | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def doc(self) -> str:
        """The first line that describes it."""
        return (inspect.getdoc(self.declared) or "").partition("\n")[0]

    def result(self, function: Function) -> Program:
        """A decorator: the function is called when the I/O has ended, with io.result."""
        if self.after is not None:
            raise Mistake(f"{self.name} has two functions for the result; leave one")
        self.after = function
        return self


def policy(declared: type[Policy], *, data: bool = False) -> Callable[[Function], Program]:
    """A decorator: the function is a policy, with the parameters, counters and state of this class.

    It is called for each I/O of the disk, with what the I/O is and with the values of the class, and returns an answer:
    PASS, fail(...), and so on. With `data` it may read and change data.
    """
    if not (isinstance(declared, type) and issubclass(declared, Policy)):
        raise Mistake("@policy needs a class of Policy, for example @policy(Error)")
    return lambda function: Program(declared, data, function)


def visible_layout(declared: type[Policy]) -> np.dtype[np.void]:
    """What `my` of a policy is, for the check: its arrays are arrays."""
    return np.dtype([_visible(name, each) for name, each in fields_of(declared)])


def memory_layout(declared: type[Policy]) -> np.dtype[np.void]:
    """The same in memory, where the field of an array has its address."""
    return np.dtype([(name, "<f8" if _is_real(each) else "<i8") for name, each in fields_of(declared)])


def count_of(each: Parameter | Counter | State) -> int | None:
    """How many numbers an array has; None: it is a number."""
    if isinstance(each, Parameter):
        return each.kind.count if each.kind.count > 1 else None
    return each.count if isinstance(each, State) else None


def fields_of(declared: type[Policy]) -> list[tuple[str, Parameter | Counter | State]]:
    """All of them, in the order in which they are in memory."""
    return [*declared.parameters.items(), *declared.counters.items(), *declared.states.items()]


def _visible(name: str, each: Parameter | Counter | State) -> tuple[Any, ...]:
    count = count_of(each)
    if count is not None:
        return name, "<i8", (count,)
    return name, "<f8" if _is_real(each) else "<i8"


def _is_real(each: Parameter | Counter | State) -> bool:
    return isinstance(each, Parameter) and each.kind is REAL
