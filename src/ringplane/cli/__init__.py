"""The command line: the entry points of `ringplane` (`python -m ringplane`) and `ringplane-vhost-user-blk`.

Signals are caught before anything else is imported, because imports take long enough for a Ctrl-C. Before that, a
signal ends the process, which has not done anything yet. So this module imports nothing until it is called, and then
first replaces Python's handler of SIGINT, which would end the imports with a traceback.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # at once, without `enum`

from ringplane import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringplane.system.signals import Signals


def main() -> None:
    """Entry point `ringplane`"""
    _run(_ringplane)


def vhost_user_blk() -> None:
    """Entry point `ringplane-vhost-user-blk`: `ringplane serve` under the name that QEMU's conventions require."""
    _run(_serve)


def _run(command: Callable[[Signals], None]) -> None:
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from ringplane.system.signals import CaughtSignals
    from ringplane.system.standard_fds import occupy_streams

    occupy_streams()
    signals = CaughtSignals()
    try:
        command(signals)
    except RuntimeError as error:
        # Imported here, because not each command compiles.
        from ringplane.compiler.bad_code import BadCode

        if not isinstance(error, BadCode):
            raise
        raise SystemExit(f"Error: {error}") from None
    finally:
        signals.ignore()


def _ringplane(signals: Signals) -> None:
    from ringplane.cli.commands import main as ringplane

    ringplane(prog_name="ringplane", obj=signals)


def _serve(signals: Signals) -> None:
    from ringplane.cli.serve import serve

    serve(prog_name="ringplane-vhost-user-blk", obj=signals)
