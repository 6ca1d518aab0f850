"""The raw data of one exam on disk: the messages as they came, one after the other, in the protocol's own bytes.

Not HDF5, because an HDF5 file whose writer is killed can mostly not be opened any more: it learns where its data lie
when it is closed. A log is whole up to its last whole message at any time, costs one system call for each message, and
keeps what ISMRMRD files have no place for (the configuration; k-space that a server sorted before). When an exam that
is kept has ended, `to_raw_file` makes an ISMRMRD file of it.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from gadgets.codec import Bytes, Part, TransportError, message_parts, read_message
from gadgets.encode import byte_count
from gadgets.messages import Acquisition, Array, Close, ConfigFile, ConfigScript, HeaderXml, Message, Waveform
from melcore.errors import DataError

MAGIC = b"MEL exam log 1\n"

#: To be held by each thread that uses HDF5, where there are several: its variable-length types are not safe in them.
HDF5 = threading.Lock()

_BLOCK = 1 << 20
_IOV_MAX = 1024


class ExamLog:
    """A log that is being written. It is locked as long as its writer lives.

    Raises
    ------
    OSError
        Here and from `append`, where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # For its owner alone: these are patients' data.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.size = 0  #: bytes of whole messages, which a `LogReader` may read
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write([MAGIC])
        except BaseException:
            os.close(self._file)
            raise

    def append(self, message: Message) -> None:
        """Write a message; wholly, or not at all."""
        self._write(message_parts(message))

    def _write(self, parts: Sequence[Part]) -> None:
        written = 0
        try:
            for start in range(0, len(parts), _IOV_MAX):
                written += _write_all(self._file, parts[start : start + _IOV_MAX])
        except OSError:
            os.ftruncate(self._file, self.size)
            os.lseek(self._file, self.size, os.SEEK_SET)
            raise
        self.size += written

    def sync(self) -> None:
        """Wait until everything is on the disk itself."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, which ends its lock. Does nothing the second time."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _write_all(file: int, parts: Sequence[Part]) -> int:
    buffers: Any = parts  # arrays and records have the buffers that the system calls take
    total = byte_count(parts)
    written = os.writev(file, buffers)
    if written == total:
        return total
    # Only so much of it was taken: near the end of the room, or interrupted by a signal.
    rest = memoryview(b"".join(buffers))[written:]
    while rest:
        rest = rest[os.write(file, rest) :]
    return total


def being_written(path: Path) -> bool:
    """Whether the writer of a log still lives."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


class LogReader:
    """Reads a log, also one that is still growing; a `Source` of `gadgets.codec`.

    Parameters
    ----------
    path
        The log.
    start
        Where to begin: behind the `MAGIC`, or where an `ExamLog` stood.
    limit
        How far the file is known to be whole; by default all of it.

    Raises
    ------
    DataError
        If the file is missing or no log.
    """

    def __init__(self, path: Path, start: int = len(MAGIC), limit: int | None = None) -> None:
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"the exam log {path} cannot be read: {error.strerror}.") from error
        if os.pread(self._file, len(MAGIC), 0) != MAGIC:
            os.close(self._file)
            raise DataError(f"{path} is not an exam log of MEL.")
        self.path = path
        self.limit = os.fstat(self._file).st_size if limit is None else limit
        self.complete = False  #: the last message that was read is the exam's CLOSE
        self._block: Bytes = memoryview(b"")
        self._start = 0  # of what was not taken yet, in the block
        self._end = start  # of the block, in the file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def position(self) -> int:
        """Where in the file the next message begins."""
        return self._end - (len(self._block) - self._start)

    def read(self) -> Message:
        """Read the next message.

        Raises
        ------
        TransportError
            If the log ends within it.
        """
        try:
            message = read_message(self)
        except (ValueError, struct.error) as error:
            raise TransportError(f"the exam log {self.path} is damaged at byte {self.position} ({error}).") from error
        self.complete = isinstance(message, Close)
        return message

    def messages(self) -> Iterator[Message]:
        """Iterate over all whole messages, CLOSE excluded; a last one that was not written wholly is left out."""
        while self.position < self.limit:
            try:
                message = self.read()
            except TransportError:
                return
            if self.complete:
                return
            yield message

    def window(self, size: int) -> tuple[Bytes, int]:
        """Return a block with the next bytes, and where in it they begin; stay before them."""
        if self._start + size > len(self._block):
            self._fill(size)
        return self._block, self._start

    def take(self, size: int) -> tuple[Bytes, int]:
        """As `window`, and move on."""
        block, start = self.window(size)
        self._start += size
        return block, start

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a structure."""
        return layout.unpack_from(*self.take(layout.size))

    def array(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Read an array of its own in Fortran order."""
        count = 1
        for length in shape:
            count *= length
        size = count * dtype.itemsize
        if size > self._left():
            self._too_short()
        block, start = self.take(size)
        result = np.empty(count, dtype)
        result.view(np.uint8).data[:] = block[start : start + size]
        return result.reshape(tuple(shape), order="F")

    def _left(self) -> int:
        return self.limit - self.position

    def _too_short(self) -> NoReturn:
        raise TransportError(f"the exam log {self.path} ends within a message.")

    def _fill(self, size: int) -> None:
        """Begin a new block with what is left of the old one, of which views may be in use."""
        if size > self._left():
            self._too_short()
        left = self._block[self._start :]
        block = np.empty(min(max(_BLOCK, size), self._left()), np.uint8).data
        block[: len(left)] = left
        filled = len(left)
        while filled < len(block):
            count = os.preadv(self._file, [block[filled:]], self._end)
            if not count:
                self._too_short()
            filled += count
            self._end += count
        self._block, self._start = block, 0


def to_raw_file(log: Path, target: Path) -> bool:
    """Write the readouts and waveforms of a log as an ISMRMRD file; False if it holds others, which no such file can.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    from melcore.io.mrd import write_raw

    headers: list[HeaderXml] = []
    readouts = 0
    with LogReader(log) as reader:
        for message in reader.messages():
            if isinstance(message, HeaderXml):
                headers.append(message)
            elif isinstance(message, Acquisition):
                readouts += 1
            elif not isinstance(message, Waveform | ConfigFile | ConfigScript):
                return False
    if len(headers) != 1 or not readouts:
        return False
    with HDF5, LogReader(log) as first, LogReader(log) as second:
        write_raw(
            target,
            headers[0].xml.decode(errors="replace"),
            (message for message in first.messages() if isinstance(message, Acquisition)),
            (message for message in second.messages() if isinstance(message, Waveform)),
        )
    return True
