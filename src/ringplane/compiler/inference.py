"""All compiled functions together: what each parameter can be, and what each function returns."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ringplane.compiler.flow import Flow
from ringplane.compiler.shapes import ANY, NUMBER, UNKNOWN, Element, Kind, Shape, Struct, describe, join
from ringplane.compiler.sources import Compiled


@dataclass(frozen=True, order=True)
class Mistake:
    """What is wrong in this line."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


# A function, and the name of a parameter of it.
Parameter = tuple[Compiled, str]
NONE_GIVEN: Mapping[Parameter, Shape] = {}


@dataclass(frozen=True)
class _Passed:
    """A call that passes something for a parameter. `variable`: the name of what it passes; empty: no variable."""

    caller: Compiled
    line: int
    variable: str


class Inference:
    """Follows all functions until nothing new is found, then once more to report what is wrong."""

    def __init__(
        self, functions: Iterable[Compiled], given: Mapping[Parameter, Shape] = NONE_GIVEN, flow: type[Flow] = Flow
    ) -> None:
        """`given`: what callers that are not among the functions pass. `flow` follows a function."""
        self._given, self._flow = given, flow
        self._parameters: dict[Parameter, Shape] = dict(given)
        self._returns: dict[Compiled, Shape] = {}
        self._callers: defaultdict[Compiled, set[Compiled]] = defaultdict(set)
        self._passed: defaultdict[tuple[Compiled, str, Element], set[_Passed]] = defaultdict(set)
        self._meanings: defaultdict[str, set[Struct]] = defaultdict(set)
        self._waiting = dict.fromkeys(functions)
        self._sources = {function.source for function in self._waiting}
        self._unit_arguments: defaultdict[str, set[int]] = defaultdict(set)
        for function in self._waiting:
            if function.unit:
                self._unit_arguments[function.name].add(len(function.parameters))
        self._functions: dict[Compiled, None] = {}
        self._reporting = False
        self._mistakes: set[Mistake] = set()
        self._solve()
        self._admit_python()
        self._solve()

    def _solve(self) -> None:
        while self._waiting:
            function = next(iter(self._waiting))
            del self._waiting[function]
            self._functions[function] = None
            flow = self._flow(self, function)
            flow.run()
            returned = join([flow.returned, self._returns.get(function, UNKNOWN)])
            if returned != self._returns.get(function, UNKNOWN):
                self._returns[function] = returned
                self._waiting.update(dict.fromkeys(self._callers[function]))

    def _admit_python(self) -> None:
        """What only Python calls, or nothing yet, gets anything; a unit gets numbers."""
        for function in self._functions:
            if not self._callers[function]:
                for name in function.parameters:
                    self._parameters[function, name] = self._given.get(
                        (function, name), NUMBER if function.unit else ANY
                    )
                self._waiting[function] = None

    def mistakes(self) -> set[Mistake]:
        self._reporting = True
        for function in list(self._functions):
            self._flow(self, function).run()
        return self._mistakes

    # For Flow.

    def parameter(self, function: Compiled, name: str) -> Shape:
        return self._parameters.get((function, name), UNKNOWN)

    def returned(self, caller: Compiled, function: Compiled) -> Shape:
        self._callers[function].add(caller)
        if function not in self._functions:
            self._waiting[function] = None
        return self._returns.get(function, UNKNOWN)

    def is_recursive(self, caller: Compiled, function: Compiled) -> bool:
        """Whether this function, which is called here, calls the caller again."""
        seen: set[Compiled] = set()
        waiting = [caller]
        while self._reporting and waiting:
            each = waiting.pop()
            if each == function:
                return True
            if each not in seen:
                seen.add(each)
                waiting.extend(self._callers[each])
        return False

    def call(self, caller: Compiled, node: ast.Call, function: Compiled, arguments: list[Shape]) -> None:
        expressions = [*node.args, *[node] * len(arguments)]
        for name, expression, shape in zip(function.parameters, expressions, arguments, strict=False):
            variable = expression.id if isinstance(expression, ast.Name) else ""
            for element in shape:
                self._passed[function, name, element].add(_Passed(caller, node.lineno, variable))
            before = self.parameter(function, name)
            after = join([before, shape])
            if after != before:
                self._parameters[function, name] = after
                self._waiting[function] = None

    def assigned(self, name: str, shape: Shape) -> None:
        for each in shape:
            if isinstance(each, Struct):
                self._meanings[name].add(each)

    def is_field(self, name: str) -> bool:
        """Whether any struct has a field of this name."""
        return name in self._all_fields

    @cached_property
    def _all_fields(self) -> set[str]:
        return {name for source in self._sources for layout in source.layouts() for name in layout.names or ()}

    def unit_arguments(self, name: str) -> set[int]:
        return self._unit_arguments[name]

    def wrong_struct(self, function: Compiled, name: str, wrong: Element, field: str) -> bool:
        right = [each for each in (*self.parameter(function, name), *self._meanings[name]) if _has(each, field)]
        if not right:
            return False
        return self._blame(function, name, wrong, describe(right[0]), set())

    def _blame(self, function: Compiled, name: str, wrong: Element, right: str, seen: set[Compiled]) -> bool:
        """Report the calls that pass the wrong thing: where a variable with another meaning becomes this parameter."""
        seen.add(function)
        blamed = False
        for passed in self._passed[function, name, wrong]:
            if not self._is_inherited(passed, name, wrong):
                text = f"{function.name}() needs {right} as `{name}`, but gets {describe(wrong)}"
                self.report(passed.caller, passed.line, text)
                blamed = True
            elif passed.caller not in seen:
                blamed |= self._blame(passed.caller, passed.variable, wrong, right, seen)
        return blamed

    def _is_inherited(self, passed: _Passed, name: str, wrong: Element) -> bool:
        """Whether the caller passes a parameter of its own that should be something else, as the names say."""
        meanings = self._meanings[passed.variable]
        renamed = not meanings and passed.variable != name
        return passed.variable in passed.caller.parameters and wrong not in meanings and not renamed

    def report(self, function: Compiled, line: int, text: str) -> None:
        if self._reporting:
            self._mistakes.add(Mistake(function.source.path, line, text))


def _has(element: Element, field: str) -> bool:
    """Whether it has this field; without one, whether it is a number."""
    return isinstance(element, Struct) and field in element.fields if field else element is Kind.NUMBER
