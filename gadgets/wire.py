"""The socket between a Gadgetron server and us: buffered reading, scatter writing, and failing so that it is heard.

`gadgetron`'s own `Connection` starts the process and reads configuration and header; from there a `Wire` takes its
socket over. Small messages are views into a large received block, without a copy; large arrays are received in place.
"""

import contextlib
import fcntl
import logging
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gadgets.codec import Bytes, Part, TransportError, message_parts, read_message
from gadgets.messages import Array, Close, Error, Message, Text
from melcore.errors import DataError

_log = logging.getLogger(__name__)

_BLOCK = 1 << 22  # bytes asked for at once
_IN_PLACE = 1 << 18  # arrays from this size on are received where they will stay
_IOV_MAX = 1024
_GIB = 1 << 30
_LONGEST_PAUSE = 600.0  # seconds


class Wire:
    """One connection, both directions.

    Parameters
    ----------
    connection
        A connected stream socket. It is closed by `close` and `fail`.
    message_timeout
        Seconds without a single byte in the middle of a message, or without one taken while sending, after which the
        other side is given up. Between messages there is no limit: a scan may pause. A dead peer is noticed there too,
        because its socket closes.
    largest_array
        Bytes; anything beyond is taken for a stream that lost its place.
    """

    def __init__(
        self, connection: socket.socket, *, message_timeout: float = 60.0, largest_array: int = 64 * _GIB
    ) -> None:
        self.received = 0
        self.sent = 0
        self.finished = False  #: the other side has sent CLOSE
        self._socket = connection
        self._timeout = message_timeout
        self._largest = largest_array
        self._block = np.empty(_BLOCK, np.uint8)
        self._view = self._block.data
        self._start = self._stop = 0
        self._lost = False  # the reading side can no longer tell where a message begins
        self._broken = False  # the writing side stopped within a message
        self._closed = False
        self._dropping = False
        self._pause: float | None = None  # longest silence between messages
        connection.settimeout(message_timeout)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @classmethod
    def take_over(cls, connection: Any, **settings: Any) -> "Wire":
        """Continue a `gadgetron.external.Connection` after its header; it sends and closes nothing any more.

        A server starts us with standard input closed, so that the socket is file descriptor 0 and any child process
        would read from it. The socket moves to a higher descriptor and 0 becomes the null device.
        """
        wire = cls(_off_standard_streams(connection.socket.socket), **settings)
        # Its __exit__ calls close() on this: ours does nothing the second time.
        connection.socket = wire
        return wire

    # Reading: the `Source` of gadgets.codec.

    def take(self, size: int) -> Bytes:
        """Return the next bytes, as a view into the current block."""
        start, stop = self._start, self._start + size
        if stop > self._stop:
            self._fill(size)
            start, stop = self._start, self._start + size
        self._start = stop
        return self._block[start:stop]

    def peek(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a structure and stay before it."""
        if self._start + layout.size > self._stop:
            self._fill(layout.size)
        return layout.unpack_from(self._view, self._start)

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a structure."""
        values = self.peek(layout)
        self._start += layout.size
        return values

    def array(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Read an array of its own in Fortran order; a large one is received in place."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size > self._largest:
            raise TransportError(
                f"an array {tuple(shape)} of {size / _GIB:.1f} GiB is announced, more than the "
                f"{self._largest / _GIB:.1f} GiB that are accepted: the stream lost its place."
            )
        if size >= _IN_PLACE and self._dropping:
            self._skip(size)
            return np.broadcast_to(np.zeros((), dtype), tuple(shape))
        result = np.empty(count, dtype)
        target = result.view(np.uint8)
        buffered = min(size, self._stop - self._start) if size >= _IN_PLACE else size
        target[:buffered] = self.take(buffered)
        missing = target.data[buffered:]
        while missing:
            missing = missing[self._receive(missing) :]
        return result.reshape(tuple(shape), order="F")

    def read(self) -> Message:
        """Wait for the next message, however long that takes.

        Raises
        ------
        TransportError
            If the other side is gone, silent in the middle of a message, or not understood.
        """
        try:
            self._wait()
            message = read_message(self)
        except TransportError:
            self._lost = True
            raise
        except (ValueError, struct.error) as error:
            self._lost = True
            raise TransportError(f"a message contradicts itself ({error}): the stream lost its place.") from error
        self.received += 1
        self.finished = isinstance(message, Close)
        return message

    def __iter__(self) -> Iterator[Message]:
        """Yield messages until the other side closes; its texts are logged, its error is raised."""
        while not isinstance(message := self.read(), Close):
            if isinstance(message, Error):
                raise TransportError(f"the other side failed: {message.text}")
            if isinstance(message, Text):
                _log.info("the other side says: %s", message.text)
                continue
            yield message

    def _wait(self) -> None:
        """Block until there is at least one byte."""
        if self._start == self._stop:
            self._socket.settimeout(self._pause)
            try:
                self._fill(1)
            finally:
                self._socket.settimeout(self._timeout)

    def _fill(self, size: int) -> None:
        """Have at least `size` bytes from `_start` on in one block; views of old blocks keep these alive."""
        if size > self._largest:
            raise TransportError(f"{size} bytes are announced, more than is accepted: the stream lost its place.")
        if self._start + size > len(self._block):
            left = self._stop - self._start
            block = np.empty(max(_BLOCK, size), np.uint8)
            block[:left] = self._block[self._start : self._stop]
            self._block, self._view, self._start, self._stop = block, block.data, 0, left
        while self._stop - self._start < size:
            self._stop += self._receive(self._view[self._stop :])

    def _receive(self, target: memoryview) -> int:
        try:
            count = self._socket.recv_into(target)
        except TimeoutError as error:
            raise TransportError(f"the other side stopped within a message for {self._timeout:g} s.") from error
        except OSError as error:
            raise TransportError(f"the connection broke after {self.received} messages: {error}.") from error
        if count == 0:
            raise TransportError(f"the other side is gone: it ended after {self.received} messages without CLOSE.")
        return count

    def _skip(self, size: int) -> None:
        while size:
            if self._start == self._stop:
                self._start = self._stop = 0
                self._stop = self._receive(self._view)
            step = min(size, self._stop - self._start)
            self._start += step
            size -= step

    # Writing.

    def send(self, message: Message) -> None:
        """Send a message; large arrays are not copied.

        Raises
        ------
        DataError
            If the message does not fit the protocol; nothing is sent then.
        TransportError
            If the other side is gone or takes nothing for `message_timeout`.
        """
        if isinstance(message, Text):
            # A server ends the chain over it; words belong into the log or the image meta.
            raise DataError("a text message is illegal from an external module: log it, or fail with an error.")
        self._send(message)

    def _send(self, message: Message) -> None:
        parts = message_parts(message)
        if self._closed:
            raise TransportError("the connection was closed on this side already.")
        try:
            for start in range(0, len(parts), _IOV_MAX):
                _send_all(self._socket, parts[start : start + _IOV_MAX])
        except OSError as error:
            self._broken = True
            reason = f"took nothing for {self._timeout:g} s" if isinstance(error, TimeoutError) else f"is gone: {error}"
            raise TransportError(f"the other side {reason}, after {self.sent} messages were sent.") from error
        self.sent += 1

    def close(self) -> None:
        """Send CLOSE and close the socket. Does nothing the second time."""
        if self._closed:
            return
        try:
            if not self._broken:
                self._send(Close())
        finally:
            self._closed = True
            self._socket.close()

    def fail(self, text: str, *, patience: float = 5.0) -> None:
        """Give up so that the operator reads why: take all input to CLOSE, then send ERROR and CLOSE.

        A server that still sends would dead-lock or drop an earlier ERROR. Where the input can no longer be
        understood it is swallowed until it ends or rests for `patience` seconds. Never raises.
        """
        if self._closed:
            return
        if not self._broken:
            with contextlib.suppress(OSError, TransportError):
                self._drain(patience)
            with contextlib.suppress(OSError, TransportError):
                self._send(Error(text))
                self._send(Close())
                # Closing with unread input resets the connection, which takes the error text along.
                self._socket.shutdown(socket.SHUT_WR)
                if self._lost:
                    self._swallow(min(patience, 1.0))
        self._closed = True
        self._socket.close()

    def _drain(self, patience: float) -> None:
        self._dropping = True
        # The scan may go on for long, but a peer that says nothing at all does not keep this process for ever.
        self._pause = _LONGEST_PAUSE
        while not self.finished and not self._lost:
            with contextlib.suppress(TransportError, MemoryError):
                self.read()
        if not self.finished:
            self._swallow(patience)

    def _swallow(self, patience: float, most: float = 60.0) -> None:
        end = time.monotonic() + most
        self._socket.settimeout(patience)
        try:
            while time.monotonic() < end and self._socket.recv_into(self._view):
                pass
        finally:
            self._socket.settimeout(self._timeout)


def _send_all(connection: socket.socket, parts: Sequence[Part]) -> None:
    sent = connection.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            # The kernel took only so much of it. Not sendall: its time-out is for the whole, not for a pause.
            rest = memoryview(part)[sent:]
            while rest:
                rest = rest[connection.send(rest) :]
        sent = max(0, sent - len(part))


def _off_standard_streams(connection: socket.socket) -> socket.socket:
    if connection.fileno() > 2:
        return connection
    moved = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    old = connection.detach()
    null = os.open(os.devnull, os.O_RDWR)
    if null != old:
        os.dup2(null, old)
        os.close(null)
    return socket.socket(fileno=moved)
