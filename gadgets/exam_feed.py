"""Between the thread that receives an exam and the chain that reconstructs it: the disk.

What arrives is written to the exam's log first, and the chain reads it from there. So a scanner never waits for a
reconstruction, an exam that waits its turn takes no memory, and whatever happens to the chain, the raw data are kept.
Where the disk is full the messages pass through memory instead, a bounded number of bytes at a time, so that the sender
waits when the chain does.
"""

import collections
import logging
import threading
from collections.abc import Iterator

from gadgets.codec import message_parts
from gadgets.encode import byte_count
from gadgets.exam_log import LogReader
from gadgets.messages import Message
from gadgets.spool import Spool, SpooledExam

_log = logging.getLogger(__name__)

_IN_MEMORY = 64 << 20  # bytes


class ExamFeed:
    """One exam on its way: `put` by one thread, iterated over by another.

    Parameters
    ----------
    exam
        Where it is kept, or None if there was no room for it at all.
    spool
        To make room where the disk is full.
    problem
        Why there was no room.
    """

    def __init__(
        self, exam: SpooledExam | None, spool: Spool, *, problem: str = "", in_memory: int = _IN_MEMORY
    ) -> None:
        self.unspooled = problem  #: why the raw data are not wholly on disk, if so
        self._exam, self._spool = exam, spool
        self._start = self._written = exam.log.size if exam else 0
        self._most, self._held = in_memory, 0
        self._waiting: collections.deque[tuple[int, Message]] = collections.deque()
        self._changed = threading.Condition()
        self._finished = False
        self._abandoned = False
        self._error: Exception | None = None

    def put(self, message: Message) -> None:
        """Keep a message and pass it on; waits only where the disk is full and the chain is behind."""
        if not self.unspooled and self._exam is not None and self._keep(self._exam, message):
            with self._changed:
                self._written = self._exam.log.size
                self._changed.notify()
            return
        size = byte_count(message_parts(message))
        with self._changed:
            while self._held and self._held + size > self._most and not self._abandoned:
                self._changed.wait()
            if not self._abandoned:
                self._waiting.append((size, message))
                self._held += size
                self._changed.notify_all()

    def _keep(self, exam: SpooledExam, message: Message) -> bool:
        while True:
            try:
                exam.log.append(message)
                return True
            except OSError as error:
                if not self._spool.make_room():
                    self.unspooled = f"{error.strerror} after {exam.log.size} bytes"
                    return False

    def finish(self, error: Exception | None = None) -> None:
        """Nothing follows: the exam is complete, or (with an error) never will be."""
        with self._changed:
            self._finished, self._error = True, self._error or error
            self._changed.notify_all()

    def abandon(self) -> None:
        """The chain takes no more: from now on messages are kept on disk only."""
        with self._changed:
            self._abandoned = True
            self._waiting.clear()
            self._held = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Message]:
        """Yield the messages in their order.

        Raises
        ------
        Exception
            What `finish` was given, if the exam broke off.
        """
        reader = None
        if self._exam is not None:
            reader = LogReader(self._exam.log.path, self._start, self._start)
        try:
            while True:
                with self._changed:
                    while not (self._ready(reader) or self._waiting or self._finished):
                        self._changed.wait()
                    if self._error is not None:
                        raise self._error
                    ready = self._ready(reader)
                    if not ready and not self._waiting:
                        return
                    written = self._written
                if ready and reader is not None:
                    reader.limit = written
                    while reader.position < written:
                        yield reader.read()
                else:
                    yield self._take()
        finally:
            if reader is not None:
                reader.close()

    def _ready(self, reader: LogReader | None) -> bool:
        return reader is not None and reader.position < self._written

    def _take(self) -> Message:
        with self._changed:
            size, message = self._waiting.popleft()
            self._held -= size
            self._changed.notify_all()
            return message
