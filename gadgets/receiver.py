"""Bytes out of a socket for `gadgets.decode`: received in large blocks, or where a large array will stay."""

import math
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gadgets.decode import Bytes, TransportError
from gadgets.messages import Array

_BLOCK = 1 << 21  # bytes asked for at once
_IN_PLACE = 1 << 18  # arrays from this size on are received where they will stay
_GIB = 1 << 30


class Receiver:
    """The `Source` of a socket.

    Parameters
    ----------
    connection
        Blocks, with `limit_waiting` for `timeout`.
    timeout
        Seconds.
    largest
        Bytes of an array; anything beyond is taken for a stream that lost its place.
    before_waiting
        Called before anything that may block.

    Attributes
    ----------
    draining
        What is read serves to find the ends of messages alone: samples are dropped, and blocks used again.
    too_large
        What was dropped of the current message because there is no memory for it.
    longest_pause
        Seconds of silence that are accepted between messages.
    """

    def __init__(
        self, connection: socket.socket, timeout: float, largest: int, before_waiting: Callable[[], None]
    ) -> None:
        self.draining = False
        self.too_large = ""
        self.longest_pause = math.inf
        self._socket = connection
        self._timeout = timeout
        self._largest = largest
        self._before_waiting = before_waiting
        self._block = np.empty(_BLOCK, np.uint8).data
        self._start = self._stop = 0

    @property
    def buffered(self) -> int:
        """Bytes that were received and not yet read."""
        return self._stop - self._start

    def wait(self) -> None:
        """Wait for the first byte of a message."""
        if self._start == self._stop:
            self._fill(1, idle=True)

    def window(self, size: int) -> tuple[Bytes, int]:
        """Return a block with the next `size` bytes, and where they begin in it; stay before them."""
        if self._start + size > self._stop:
            self._fill(size)
        return self._block, self._start

    def take(self, size: int) -> tuple[Bytes, int]:
        """As `window`, and move on."""
        start = self._start
        if start + size > self._stop:
            self._fill(size)
            start = self._start
        self._start = start + size
        return self._block, start

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a structure."""
        return layout.unpack_from(*self.take(layout.size))

    def array(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Read an array of its own in Fortran order; a large one is received in place."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size > self._largest:
            raise TransportError(
                f"an array {tuple(shape)} of {size / _GIB:.1f} GiB is announced, more than the "
                f"{self._largest / _GIB:.1f} GiB that are accepted: the stream lost its place."
            )
        # Records are kept in any case: they say how long the rest of their message is.
        if (self.draining or self.too_large) and size >= _IN_PLACE and dtype.names is None:
            return self._drop(size, dtype, shape)
        try:
            result = np.empty(count, dtype)
        except MemoryError:
            self.too_large = f"an array {tuple(shape)} of {size / _GIB:.2f} GiB"
            return self._drop(size, dtype, shape)
        target = result.view(np.uint8)
        buffered = min(size, self._stop - self._start) if size >= _IN_PLACE else size
        block, start = self.take(buffered)
        target.data[:buffered] = block[start : start + buffered]
        missing = target.data[buffered:]
        while missing:
            missing = missing[self._receive(missing) :]
        return result.reshape(tuple(shape), order="F")

    def _fill(self, size: int, *, idle: bool = False) -> None:
        """Have at least `size` bytes from `_start` on in one block; views of old blocks keep these alive."""
        if size > self._largest:
            raise TransportError(f"{size} bytes are announced, more than is accepted: the stream lost its place.")
        if self._start + size > len(self._block):
            left = self._stop - self._start
            # What is dropped may be overwritten, where memory may be what is lacking.
            reuse = self.draining and size <= len(self._block)
            block = self._block if reuse else np.empty(max(_BLOCK, size), np.uint8).data
            block[:left] = self._block[self._start : self._stop]
            self._block, self._start, self._stop = block, 0, left
        while self._stop - self._start < size:
            self._stop += self._receive(self._block[self._stop :], idle=idle)

    def _receive(self, target: memoryview, *, idle: bool = False) -> int:
        """Receive something; `idle` between messages, where a scan may pause."""
        silent = 0.0
        self._before_waiting()
        while True:
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError as error:  # the receive time-out has passed
                silent += self._timeout
                if idle and silent < self.longest_pause:
                    continue
                where = "between messages" if idle else "within a message"
                raise TransportError(f"the other side stopped {where} for {silent:g} s.") from error
            except OSError as error:
                raise TransportError(f"the connection broke: {error}.") from error
            if count == 0:
                raise TransportError("the other side is gone: it ended without CLOSE.")
            return count

    def _drop(self, size: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Skip the bytes of an array; zeros that need no memory stand for it."""
        buffered = min(size, self._stop - self._start)
        self._start += buffered
        size -= buffered
        # Not the block: messages may still refer to it.
        bin_ = memoryview(bytearray(min(size, 1 << 16)))
        while size:
            size -= self._receive(bin_[:size])
        return np.broadcast_to(np.zeros((), dtype), tuple(shape))

    def swallow(self, patience: float, most: float = 60.0) -> None:
        """Throw away what comes until it ends or rests for `patience` seconds, or `most` seconds are over."""
        end = time.monotonic() + most
        limit_waiting(self._socket, patience)
        try:
            while time.monotonic() < end and self._socket.recv_into(self._block):
                pass
        finally:
            limit_waiting(self._socket, self._timeout)


def limit_waiting(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end a blocking call (BlockingIOError) after so many seconds without progress.

    Python's own time-outs cost a poll for each call; the kernel's cost nothing.
    """
    whole = int(seconds)
    # 0 would mean no limit at all.
    interval = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), int(whole == 0)))
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
