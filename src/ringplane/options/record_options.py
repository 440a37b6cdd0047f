"""The options of the layer `record`."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ringplane.options.declare import WrongOptions, option
from ringplane.options.kinds import PATH
from ringplane.options.zone_options import ZoneOptions

# What is replaced in the path of a recording: the name of the disk, and the moment in UTC at which it begins.
NAME, TIME = "{name}", "{time}"
FIELD = re.compile(r"\{\w*\}")


class RecordOptions(ZoneOptions):
    """What is recorded of a disk."""

    record: Path | None = option(
        PATH,
        default=None,
        help="New file for a recording of all that the storage is given to change (docs/recordings.md); {name} and "
        "{time} in it are replaced.",
        doc="a new file for a recording of everything that the storage is given to change, with its data: "
        "`disk-{time}.rec` is another one at each start, see [recordings.md](recordings.md)",
    )

    def check(self) -> None:
        if self.record:
            check_recordable(self)
            check_fields(self.record)


def check_recordable(options: ZoneOptions) -> None:
    """Raises WrongOptions if a disk with these options cannot be recorded."""
    if options.read_only:
        raise WrongOptions("{record} and {read_only} exclude each other: nothing is written to such a disk")
    if options.zoned:
        raise WrongOptions("{record} and {zoned} exclude each other: a recording has no zones")


def check_fields(path: Path) -> None:
    """Raises WrongOptions if the path of a recording has fields that do not exist."""
    for field in FIELD.findall(str(path)):
        if field not in (NAME, TIME):
            sentence = "{record}: {field} is unknown; {name} and {time} are replaced in the path of a recording"
            raise WrongOptions(sentence, field=field, name=NAME, time=TIME)


def path_of_recording(path: Path, disk: str) -> Path:
    """The path of a recording of this disk that begins now."""
    seconds, milliseconds = divmod(time.time_ns() // 1_000_000, 1000)
    now = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) + f".{milliseconds:03}Z"
    return Path(str(path).replace(NAME, disk).replace(TIME, now))
