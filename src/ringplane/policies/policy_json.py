"""A policy as JSON: all that a process needs to run it whose file another process has read and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ringplane.policies.declaring import (
    SEED,
    Counter,
    Function,
    Mistake,
    Parameter,
    Policy,
    Program,
    State,
    count_of,
    parameter,
)
from ringplane.policies.parameter_kinds import (
    DURATION,
    FILE,
    FLAG,
    OPERATION,
    RANGE,
    REAL,
    SIZE,
    WHOLE,
    one_of,
)

KINDS = {kind.name: kind for kind in (WHOLE, REAL, FLAG, SIZE, DURATION, OPERATION, FILE, RANGE)}
# The type of a field in its file, if it is not int.
TYPES = {REAL.name: "float", FLAG.name: "bool"}


def described(program: Program) -> dict[str, Any]:
    """The inverse of `program_of`."""
    declared = program.declared
    return {
        "name": program.name,
        "module": program.function.__module__,
        "doc": declared.__doc__ or "",
        "data": program.data,
        "result": program.after is not None,
        "parameters": {name: _parameter(each) for name, each in declared.parameters.items() if name != SEED},
        "counters": {name: each.doc for name, each in declared.counters.items()},
        "states": {name: each.count for name, each in declared.states.items()},
    }


def _parameter(each: Parameter) -> dict[str, Any]:
    # Of a range there is only a text.
    default = each.kind.shown(each.default) if count_of(each) is not None else each.default
    kind = list(each.kind.words) or each.kind.name
    return {"default": default, "doc": each.doc, "lowest": each.lowest, "highest": each.highest, "kind": kind}


def program_of(description: Mapping[str, Any]) -> Program:
    """A policy whose functions cannot be called. Raises ValueError for what nothing has described."""
    try:
        fields: dict[str, Any] = {name: _parameter_of(each) for name, each in description["parameters"].items()}
        types = {name: TYPES.get(str(each["kind"]), "int") for name, each in description["parameters"].items()}
        fields |= {name: Counter(str(doc)) for name, doc in description["counters"].items()}
        fields |= {name: State(count) for name, count in description["states"].items()}
        annotations = {name: types.get(name, "int") for name in fields}
        about = {"__doc__": description["doc"], "__annotations__": annotations}
        declared = type("Described", (Policy,), about | fields)
        function = _stand_in(str(description["name"]), str(description["module"]))
        after = _stand_in(function.__name__, function.__module__) if description["result"] else None
        return Program(declared, bool(description["data"]), function, after)
    except (LookupError, TypeError, AttributeError, Mistake) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _parameter_of(described: Mapping[str, Any]) -> Parameter:
    named, lowest, highest = described["kind"], described["lowest"], described["highest"]
    kind = one_of(*map(str, named)) if isinstance(named, list) else KINDS[named]
    # A type says which kind it is.
    given = None if kind.name in TYPES else kind
    return cast(Parameter, parameter(described["default"], str(described["doc"]), lowest, highest, kind=given))


def _stand_in(name: str, module: str) -> Function:
    """For a function whose code is elsewhere."""

    def function(io: Any, my: Any) -> Any:
        raise NotImplementedError

    function.__name__, function.__module__ = name, module
    return function
