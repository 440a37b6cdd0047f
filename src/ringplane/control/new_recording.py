"""The beginning of a recording of a disk that is served already."""

from __future__ import annotations

from pathlib import Path

from ringplane.block.layers.record import RecordLayer, record_to
from ringplane.block.sources.source import Source
from ringplane.control.operation_errors import Unavailable, WrongState, WrongValue
from ringplane.dataplane.compile_data_plane import warm_up
from ringplane.opener.opener import LOCAL, Opener, OpenerEnded
from ringplane.options.declare import WrongOptions
from ringplane.options.disk_config import DiskConfig
from ringplane.options.record_options import check_fields, check_recordable
from ringplane.system.confinement import is_confined


def new_recording(path: Path, config: DiskConfig, source: Source, opener: Opener | None) -> RecordLayer:
    """The layer that records the disk to a new file; it may block. Without an `opener` this process opens it itself.

    Raises ImageError, and WrongState, WrongValue or Unavailable.
    """
    try:
        check_recordable(config)
    except WrongOptions as error:
        raise WrongState(error.spelled(str), "file") from None
    try:
        check_fields(path)
    except WrongOptions as error:
        raise WrongValue(error.spelled(lambda _: "file"), "file") from None
    if not is_confined():
        warm_up(RecordLayer.units)
    elif opener is None:
        raise WrongState(
            "this process may not open files any more, so no recording can begin",
            "file",
            "start ringplane with --allow-folder FOLDER, which allows recordings below it, or with --record",
        )
    try:
        return record_to(path, config, source, opener or LOCAL)
    except OpenerEnded as error:
        raise Unavailable(str(error)) from None
