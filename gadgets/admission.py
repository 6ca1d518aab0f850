"""Who may use the accelerator now: as many reconstructions at a time as fit its memory, in the order they came."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

from melcore.errors import MelError


class StoppingError(MelError):
    """The server is being stopped; the exam can be replayed."""

    def __init__(self) -> None:
        super().__init__("the server is being stopped.")


class Admission:
    """A queue for memory.

    Strictly first come, first served: a large exam is not overtaken by small ones for ever.

    Parameters
    ----------
    budget
        Bytes for all of them together.
    most
        How many may run at a time, however small they are.
    """

    def __init__(self, budget: int, most: int = 4) -> None:
        self.budget, self.most = budget, most
        self.running = 0
        self._used = 0
        self._queue: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._queue)

    @contextlib.contextmanager
    def place(self, size: int, timeout: float | None = None) -> Iterator[bool]:
        """Wait for room, hold it for the block; the value says whether there was any before `timeout` s passed.

        Parameters
        ----------
        size
            In bytes. What is larger than the budget runs alone.

        Raises
        ------
        StoppingError
            If the queue is closed while waiting.
        """
        size = min(max(size, 0), self.budget)
        granted = self._enter(size, timeout)
        try:
            yield granted
        finally:
            if granted:
                with self._changed:
                    self._used -= size
                    self.running -= 1
                    self._changed.notify_all()

    def _enter(self, size: int, timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not self._closed and not self._fits(ticket, size):
                    rest = None if end is None else end - time.monotonic()
                    if rest is not None and rest <= 0:
                        return False
                    self._changed.wait(rest)
                if self._closed:
                    raise StoppingError
                self._used += size
                self.running += 1
                return True
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _fits(self, ticket: object, size: int) -> bool:
        return self._queue[0] is ticket and self.running < self.most and self._used + size <= self.budget

    def close(self) -> None:
        """Turn away all who wait and all who come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
