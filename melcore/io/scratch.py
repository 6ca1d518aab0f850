"""Folders for temporary files that go away, those of killed processes too."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "mel-scratch-"
_NEW = 60.0  # s, within which a folder may not be locked yet


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder and remove it in the end, as well as those that killed processes have left beside it.

    Parameters
    ----------
    parent
        By default the system's folder for temporary files.
    """
    beside = parent or Path(tempfile.gettempdir())
    _sweep(beside)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=beside) as name:
        folder = Path(name)
        with _locked(folder):
            yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which the kernel takes from a process that dies; False if another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another process may remove it at the same time, or another user own it.
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _NEW:
                with _locked(folder) as abandoned:
                    if abandoned:
                        shutil.rmtree(folder, ignore_errors=True)
