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

from gadgets.decode import Bytes, TransportError, read_message
from gadgets.encode import Part, byte_count, message_parts
from gadgets.messages import Acquisition, Array, Close, Error, Message, Text
from melcore.errors import DataError

_log = logging.getLogger(__name__)

_BLOCK = 1 << 20  # bytes asked for at once
_IN_PLACE = 1 << 18  # arrays from this size on are received where they will stay
_IOV_MAX = 1024
_TOGETHER = 16  # readouts sent at once
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
        self._block = np.empty(_BLOCK, np.uint8).data
        self._start = self._stop = 0
        self._lost = False  # the reading side can no longer tell where a message begins
        self._broken = False  # the writing side stopped within a message
        self._closed = False
        self._draining = False  # messages are read for their ends alone
        self._too_large = ""  # what of the current message was dropped
        self._longest_pause = math.inf  # between messages
        self._pending: list[Part] = []  # of `send_soon`
        self._pending_messages = 0
        # Python's own time-outs cost a poll for each call; the kernel's cost nothing.
        connection.settimeout(None)
        self._limit(message_timeout)
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

    # Reading: the `Source` of gadgets.decode.

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
        if (self._draining or self._too_large) and size >= _IN_PLACE and dtype.names is None:
            return self._drop(size, dtype, shape)
        try:
            result = np.empty(count, dtype)
        except MemoryError:
            self._too_large = f"an array {tuple(shape)} of {size / _GIB:.2f} GiB"
            return self._drop(size, dtype, shape)
        target = result.view(np.uint8)
        buffered = min(size, self._stop - self._start) if size >= _IN_PLACE else size
        block, start = self.take(buffered)
        target.data[:buffered] = block[start : start + buffered]
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
        DataError
            If there is no memory for the message; the next one can be read.
        """
        try:
            if self._start == self._stop:
                self._fill(1, idle=True)
            message = read_message(self)
        except (ValueError, struct.error) as error:
            self._lost = True
            raise TransportError(f"a message contradicts itself ({error}): the stream lost its place.") from error
        except BaseException:
            self._lost = True
            raise
        self.received += 1
        self.finished = isinstance(message, Close)
        if self._too_large:
            what, self._too_large = self._too_large, ""
            raise DataError(f"{what} arrived, for which there is no memory: reconstruct a smaller matrix, or add some.")
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

    def _fill(self, size: int, *, idle: bool = False) -> None:
        """Have at least `size` bytes from `_start` on in one block; views of old blocks keep these alive."""
        if size > self._largest:
            raise TransportError(f"{size} bytes are announced, more than is accepted: the stream lost its place.")
        if self._start + size > len(self._block):
            left = self._stop - self._start
            # What is dropped may be overwritten, where memory may be what is lacking.
            reuse = self._draining and size <= len(self._block)
            block = self._block if reuse else np.empty(max(_BLOCK, size), np.uint8).data
            block[:left] = self._block[self._start : self._stop]
            self._block, self._start, self._stop = block, 0, left
        while self._stop - self._start < size:
            self._stop += self._receive(self._block[self._stop :], idle=idle)

    def _receive(self, target: memoryview, *, idle: bool = False) -> int:
        """Receive something; `idle` between messages, where a scan may pause."""
        silent = 0.0
        self.flush()
        while True:
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError as error:  # the receive time-out has passed
                silent += self._timeout
                if idle and silent < self._longest_pause:
                    continue
                where = "between messages" if idle else "within a message"
                raise TransportError(f"the other side stopped {where} for {silent:g} s.") from error
            except OSError as error:
                raise TransportError(f"the connection broke after {self.received} messages: {error}.") from error
            if count == 0:
                raise TransportError(f"the other side is gone: it ended after {self.received} messages without CLOSE.")
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

    def send_soon(self, message: Message) -> None:
        """As `send`, but several readouts together, before anything that is waited for is read, or anything else sent.

        A readout's arrays must stay as they are until then.
        """
        if isinstance(message, Acquisition):
            self._pending += message_parts(message)
            self._pending_messages += 1
            if self._pending_messages >= _TOGETHER:
                self.flush()
        else:
            self.send(message)

    def flush(self) -> None:
        """Send what `send_soon` kept. Errors as `send`."""
        if self._pending:
            parts, count = self._pending, self._pending_messages
            self._pending, self._pending_messages = [], 0
            self._send_parts(parts, count)

    def _send(self, message: Message) -> None:
        parts = message_parts(message)
        self.flush()
        self._send_parts(parts, 1)

    def _send_parts(self, parts: list[Part], messages: int) -> None:
        if self._closed:
            raise TransportError("the connection was closed on this side already.")
        try:
            for start in range(0, len(parts), _IOV_MAX):
                self._send_some(parts[start : start + _IOV_MAX])
        except OSError as error:
            self._broken = True
            late = isinstance(error, BlockingIOError)  # the send time-out has passed
            reason = f"took nothing for {self._timeout:g} s" if late else f"is gone: {error}"
            raise TransportError(f"the other side {reason}, after {self.sent} messages were sent.") from error
        self.sent += messages

    def _send_some(self, parts: Sequence[Part]) -> None:
        sent = self._socket.sendmsg(parts)
        if sent == byte_count(parts):
            return
        # The kernel took only so much. Not sendall: its time-out is for the whole, not for a pause.
        for part in parts:
            size = byte_count([part])
            if sent < size:
                rest = np.frombuffer(part, np.uint8).data[sent:]
                while rest:
                    rest = rest[self._socket.send(rest) :]
            sent = max(0, sent - size)

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
        self._draining = True
        # The scan may go on for long, but a peer that says nothing at all does not keep this process for ever.
        self._longest_pause = _LONGEST_PAUSE
        while not self.finished and not self._lost:
            with contextlib.suppress(TransportError, DataError, MemoryError):
                self.read()
        if not self.finished:
            self._swallow(patience)

    def _swallow(self, patience: float, most: float = 60.0) -> None:
        end = time.monotonic() + most
        self._limit(patience)
        try:
            while time.monotonic() < end and self._socket.recv_into(self._block):
                pass
        finally:
            self._limit(self._timeout)

    def _limit(self, seconds: float) -> None:
        """Let the kernel end a blocking call after so many seconds without progress."""
        whole = int(seconds)
        # 0 would mean no limit at all.
        interval = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), int(whole == 0)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


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
