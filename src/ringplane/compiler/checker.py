"""Mistakes in compiled code, found in a second: each is one line, `path:line: what is wrong`.

Numba finds most of them too, after half a minute, in some 500 lines; the others it compiles. This check reads only the
syntax trees (sources.py). It follows values along all paths (flow.py, expressions.py) and through all calls
(inference.py): which struct a variable is a view of, and what a function returns. A parameter is whatever the callers
pass; Python may pass anything.

    python -m ringplane.compiler.checker [FILE or FOLDER ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ringplane.compiler.bad_code import BadCode
from ringplane.compiler.inference import Inference, Mistake
from ringplane.compiler.policy_flow import PolicyFlow
from ringplane.compiler.shapes import Shape
from ringplane.compiler.sources import COMPILER, PACKAGE, Source, Sources


def check(paths: Iterable[Path] = (PACKAGE,)) -> list[Mistake]:
    """The mistakes in the compiled functions of these files and folders, in order. Raises OSError.

    Those of ringplane are always followed too, because they say what is passed, but not reported.
    """
    sources = Sources()
    mistakes: list[Mistake] = []
    wanted: list[Source] = []
    for path in _files(paths):
        try:
            wanted.append(sources.add(path))
        except SyntaxError as error:
            mistakes.append(Mistake(path, error.lineno or 1, error.msg))
    for source in wanted:
        for statement, name, place in source.missing_imports():
            mistakes.append(Mistake(source.path, statement.lineno, f"{place.module} has no {name}"))
    others = [sources.add(path) for path in _files([sources.package()])]
    functions = [function for source in dict.fromkeys([*others, *wanted]) for function in source.compiled_functions()]
    places = {source.path for source in wanted}
    return sorted({*mistakes, *(each for each in Inference(functions).mistakes() if each.path in places)})


def check_policies(path: Path, text: str, passed: Mapping[str, tuple[Shape, ...]]) -> list[Mistake]:
    """The mistakes in a file of policies with this text; `passed`: what each function gets that ringplane calls."""
    source = Sources().add(path, text)
    functions = list(source.compiled_functions())
    given = {
        (function, name): shape
        for function in functions
        for name, shape in zip(function.parameters, passed.get(function.name, ()), strict=False)
    }
    return sorted(each for each in Inference(functions, given, PolicyFlow).mistakes() if each.path == source.path)


def check_package() -> None:
    """Raises BadCode if ringplane's own compiled code has mistakes."""
    if mistakes := check():
        raise BadCode("\n".join(map(str, mistakes)))


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files with compiled functions."""
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if COMPILER.encode() in file.read_bytes():
                yield file.resolve()


def main(arguments: list[str]) -> int:
    """The exit status: 1 if there are mistakes."""
    try:
        mistakes = check([Path(each) for each in arguments] or [PACKAGE])
    except OSError as error:
        print(f"Error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    for each in mistakes:
        print(f"{os.path.relpath(each.path)}:{each.line}: {each.text}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
