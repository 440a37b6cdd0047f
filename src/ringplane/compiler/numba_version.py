"""The versions of Numba that ringplane is known to work with: compiler/pipeline.py uses undocumented parts of Numba."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import numba

from ringplane.compiler.bad_code import BadCode

log = logging.getLogger(__name__)

# The first version that the tests of the compiled code were run with, and the last one that all tests were run with.
OLDEST, NEWEST = (0, 61), (0, 68)


class UnsupportedNumba(BadCode):
    """ringplane does not work with this Numba: all code is bad for it. The message is one line."""

    def __init__(self, why: object) -> None:
        too_new = (NEWEST[0], NEWEST[1] + 1)
        super().__init__(
            f"ringplane does not work with Numba {numba.__version__} ({why}); "
            f"install another one: pip install 'numba>={_shown(OLDEST)},<{_shown(too_new)}'"
        )


def check(works: Callable[[], bool]) -> None:
    """Raises UnsupportedNumba. An untested version gets one warning, and is tried with `works`."""
    version = tuple(map(int, re.findall(r"\d+", numba.__version__)[:2]))
    if version < OLDEST:
        raise UnsupportedNumba("it is too old")
    if version > NEWEST:
        log.warning(
            "Numba %s is newer than what ringplane was tested with (%s to %s)",
            numba.__version__,
            _shown(OLDEST),
            _shown(NEWEST),
        )
        _try_out(works)


def _try_out(works: Callable[[], bool]) -> None:
    try:
        worked = works()
    except Exception as error:
        raise UnsupportedNumba(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from None
    if not worked:
        raise UnsupportedNumba("it compiles wrong code")


def _shown(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
