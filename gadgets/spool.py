"""The folder that keeps exams: each has a folder of its own, named by its id, with its raw data and its record.

``raw.log`` is the raw data as they came (`gadgets.exam_log`); ``raw.h5`` takes its place when an exam that is kept has
ended, where it consists of readouts. ``exam.json`` is the record: what was asked for, and what became of it.

An exam whose images were delivered as they were asked for is removed at once, or kept (`keep` is ``"all"``) until the
spool exceeds its size or age; then the oldest of these go first. **An exam that failed, or got a fallback's images, is
never removed by this program** before a replay delivered its images: where such exams alone exceed the limits, that is
logged with each further exam, and whoever runs the server decides.
"""

import contextlib
import logging
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gadgets.exam_log import ExamLog, being_written, to_raw_file
from gadgets.exam_record import DONE, LOG, Record, read_record, write_record
from melcore.errors import ConfigError, DataError
from melcore.units import format_bytes

_log = logging.getLogger(__name__)

RAW = "raw.h5"

Keep = Literal["failed", "all"]

_DAY = 86400.0


@dataclass(frozen=True)
class Exam:
    """An exam of a spool, as found on the disk."""

    folder: Path
    record: Record

    @property
    def raw(self) -> Path | None:
        """Its raw data: the ISMRMRD file, or else the log."""
        found = (self.folder / name for name in (RAW, LOG))
        return next((path for path in found if path.is_file()), None)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        total = 0
        with contextlib.suppress(OSError):  # it may be removed meanwhile
            for path in self.folder.iterdir():
                total += path.stat().st_size
        return total


class Spool:
    """A spool's folder.

    Parameters
    ----------
    folder
        Made if it does not exist.
    keep
        Which exams stay after they ended: those that were not delivered as asked for (``"failed"``), or ``"all"``.
    limit, days
        Bytes and age beyond which exams that were delivered are removed, oldest first.

    Raises
    ------
    ConfigError
        If the folder cannot be made or written.
    """

    def __init__(
        self, folder: Path, *, keep: Keep = "failed", limit: int | None = None, days: float | None = None
    ) -> None:
        self.folder, self.keep, self.limit, self.days = folder, keep, limit, days
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = folder / f".probe.{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the spool {folder} cannot be written ({error.strerror}): give another folder with --spool."
            ) from error

    def begin(self, record: Record) -> "SpooledExam":
        """Begin to keep an exam.

        Raises
        ------
        OSError
            If there is no room even after exams that were delivered were removed.
        """
        folder = self.folder / record.id
        while True:
            try:
                folder.mkdir(mode=0o700)
                exam = SpooledExam(self, folder, record, ExamLog(folder / LOG))
                exam.write_record()
                return exam
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                if not self.make_room():
                    raise

    def exams(self) -> list[Exam]:
        """All exams, oldest first."""
        found = []
        with contextlib.suppress(OSError):
            folders = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
            found = [Exam(path, read_record(path)) for path in sorted(folders)]
        return [exam for exam in found if exam.raw is not None]

    def find(self, name: str) -> Exam:
        """The exam of that id, or the only one whose id begins so.

        Raises
        ------
        ConfigError
            If there is none, or more than one.
        """
        exams = self.exams()
        matching = [exam for exam in exams if exam.record.id == name]
        matching = matching or [exam for exam in exams if name and exam.record.id.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        known = ", ".join(exam.record.id for exam in (matching or exams)[-5:]) or "none"
        what = "more than one exam is" if matching else "there is no exam"
        raise ConfigError(f"{what} {name!r} in the spool {self.folder}; the latest: {known}.")

    def size(self) -> int:
        """Bytes of all exams."""
        return sum(exam.size for exam in self.exams())

    def tidy(self) -> None:
        """Remove exams that were delivered and exceed the limits, and say so where the others do."""
        with self._lock:
            exams = self.exams()
            now = time.time()
            if self.days is not None:
                for exam in [exam for exam in exams if now - exam.record.began > self.days * _DAY]:
                    if exam.record.state in DONE and _remove(exam):
                        exams.remove(exam)
            if self.limit is None:
                return
            sizes = [exam.size for exam in exams]
            total = sum(sizes)
            for exam, size in zip(exams, sizes, strict=True):
                if total <= self.limit:
                    return
                if exam.record.state in DONE and _remove(exam):
                    total -= size
            if total > self.limit:
                _log.warning(
                    "the spool %s holds %s, more than its limit of %s, of exams that are not delivered: replay them "
                    "(mel replay), or remove their folders",
                    self.folder,
                    format_bytes(total),
                    format_bytes(self.limit),
                )

    def make_room(self) -> bool:
        """Remove the oldest exam that was delivered; False if there is none."""
        with self._lock:
            for exam in self.exams():
                if exam.record.state in DONE and _remove(exam):
                    _log.warning("the disk of the spool is full: the delivered exam %s was removed", exam.record.id)
                    return True
        return False


class SpooledExam:
    """An exam that is being received."""

    def __init__(self, spool: Spool, folder: Path, record: Record, log: ExamLog) -> None:
        self.folder, self.record, self.log = folder, record, log
        self._spool = spool

    def write_record(self) -> None:
        """Write the record; whole, or not at all.

        Raises
        ------
        OSError
            If there is no room.
        """
        write_record(self.folder, self.record)

    def discard(self) -> None:
        """Remove everything."""
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """Keep or remove the exam, as its state and the policy say. Never raises: the images come first."""
        record = self.record
        try:
            if not record.messages or (record.state in DONE and self._spool.keep == "failed"):
                self.discard()
                return
            self.write_record()
            if to_raw_file(self.log.path, self.folder / RAW):
                self.log.path.unlink()
        except (OSError, DataError) as error:
            _log.warning("exam %s stays as it was received: %s", record.id, " ".join(str(error).split()))
        finally:
            self.log.close()
            self._spool.tidy()


def _remove(exam: Exam) -> bool:
    if being_written(exam.folder / LOG):
        return False
    shutil.rmtree(exam.folder, ignore_errors=True)
    return not exam.folder.exists()
