"""What can happen to an operation on a disk, as OperationError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ringplane.block.image import ImageError
from ringplane.control.operation_errors import OperationError, Unavailable, WrongState
from ringplane.dataplane.worker import WorkerEnded
from ringplane.system.notes import in_words


@contextlib.contextmanager
def operation_errors(operation: str, name: str) -> Iterator[None]:
    """Turn all that can happen into an OperationError."""
    try:
        yield
    except OperationError:
        raise
    except WorkerEnded as error:
        raise Unavailable(str(error), name, "restart the process; the log says what happened") from None
    except ImageError as error:
        raise WrongState(str(error), name) from None
    except OSError as error:
        raise Unavailable(f"{operation} failed: {in_words(error)}", name) from None
