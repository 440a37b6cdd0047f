"""The option of the state: the key `state` of the configuration file, or `--state`."""

from __future__ import annotations

from pathlib import Path

from ringplane.options.declare import Options, option
from ringplane.options.kinds import PATH


class StateOptions(Options):
    """Where the state is stored."""

    state: Path | None = option(
        PATH,
        default=None,
        help="Keep in this file what is changed at run time, for the next start (docs/api.md).",
        doc="the file that keeps what is changed at run time ([api.md](api.md#what-outlasts-the-process))",
    )
