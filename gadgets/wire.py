"""The socket between a Gadgetron server and us: buffered reading, scatter writing, and failing so that it is heard.

`gadgetron`'s own `Connection` starts the process and reads configuration and header; from there a `Wire` takes its
socket over. Small messages are views into a large received block, without a copy; large arrays are received in place.
"""

import contextlib
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gadgets.decode import TransportError, read_message
from gadgets.encode import Part, byte_count, message_parts
from gadgets.messages import Acquisition, Close, Error, Message, Text
from gadgets.receiver import Receiver, limit_waiting
from melcore.errors import DataError

_log = logging.getLogger(__name__)

_IOV_MAX = 1024
_TOGETHER = 16  # readouts sent at once
_GIB = 1 << 30
_LONGEST_PAUSE = 600.0  # seconds
# A server's child that gets ERROR while it is still busy with the CLOSE that it sent has been seen to crash, 3 times of
# 15, which takes the text along; after such a pause it delivered all of 70.
_BEFORE_ERROR = 0.2  # s


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
        self._receiver = Receiver(connection, message_timeout, largest_array, self.flush)
        self._lost = False  # the reading side can no longer tell where a message begins
        self._broken = False  # the writing side stopped within a message
        self._closed = False
        self._pending: list[Part] = []  # of `send_soon`
        self._pending_messages = 0
        limit_waiting(connection, message_timeout)
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

    @property
    def buffered(self) -> int:
        """Bytes that were received and belong to messages not yet read."""
        return self._receiver.buffered

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
            self._receiver.wait()
            message = read_message(self._receiver)
        except (ValueError, struct.error) as error:
            self._lost = True
            raise TransportError(f"a message contradicts itself ({error}): the stream lost its place.") from error
        except TransportError as error:
            self._lost = True
            raise TransportError(f"after {self.received} messages: {error}") from error
        except BaseException:
            self._lost = True
            raise
        self.received += 1
        self.finished = isinstance(message, Close)
        if what := self._receiver.too_large:
            self._receiver.too_large = ""
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
            if self.finished:
                time.sleep(_BEFORE_ERROR)
            with contextlib.suppress(OSError, TransportError):
                self._send(Error(text))
                self._send(Close())
                # Closing with unread input resets the connection, which takes the error text along.
                self._socket.shutdown(socket.SHUT_WR)
                if self._lost:
                    self._receiver.swallow(min(patience, 1.0))
        self._closed = True
        self._socket.close()

    def _drain(self, patience: float) -> None:
        self._receiver.draining = True
        # The scan may go on for long, but a peer that says nothing at all does not keep this process for ever.
        self._receiver.longest_pause = _LONGEST_PAUSE
        while not self.finished and not self._lost:
            with contextlib.suppress(TransportError, DataError, MemoryError):
                self.read()
        if not self.finished:
            self._receiver.swallow(patience)


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
