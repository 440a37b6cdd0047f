"""The options of the layer `record`."""

from __future__ import annotations

from pathlib import Path

from ringplane.options.declare import WrongOptions, option
from ringplane.options.kinds import PATH
from ringplane.options.zone_options import ZoneOptions


class RecordOptions(ZoneOptions):
    """What is recorded of a disk."""

    record: Path | None = option(
        PATH,
        default=None,
        help="New file for a recording of all that the storage is given to change (docs/recordings.md).",
        doc="a new file for a recording of everything that the storage is given to change, with its data, see "
        "[recordings.md](recordings.md)",
    )

    def check(self) -> None:
        if self.record:
            check_recordable(self)


def check_recordable(options: ZoneOptions) -> None:
    """Raises WrongOptions if a disk with these options cannot be recorded."""
    if options.read_only:
        raise WrongOptions("{record} and {read_only} exclude each other: nothing is written to such a disk")
    if options.zoned:
        raise WrongOptions("{record} and {zoned} exclude each other: a recording has no zones")
