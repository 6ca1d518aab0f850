"""The folder of a training: one training at a time, and nothing begun whose result could not be written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from melcore.errors import DataError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other trainings out of it; a process that is killed lets go of it too.

    Raises
    ------
    DataError
        If it cannot be made, or another training writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"output.directory {folder} cannot be used: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another training is writing to {folder}: wait for it, or set another output.directory."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(handle)


def check_target(path: Path) -> None:
    """Raise `DataError` if no bundle could be written to `path` hours from now."""
    if path.is_dir():
        raise DataError(f"output.bundle {path} is a folder: give the name of a file, or leave it out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder of output.bundle {path} cannot be made: {error.strerror}.") from None
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"output.bundle {path} cannot be written: the folder is read-only.")
