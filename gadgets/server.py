"""Listens, gives each connection a thread, cuts those that keep one for nothing, and stops in bounded time."""

import contextlib
import logging
import selectors
import socket
import threading
import time

from gadgets.exam_session import ExamSession, Parts
from melcore.errors import ConfigError

_log = logging.getLogger(__name__)

_TICK = 0.2  # s between two looks at the clock
_LAST_WORDS = 5.0  # s for answers after everything was stopped


class Server:
    """A server on one port.

    Parameters
    ----------
    host, port
        Where to listen. ``localhost`` is both of its addresses; port 0 takes any that is free.
    parts
        What its connections share.
    connections
        How many are served at a time; further ones wait in the system's queue.

    Raises
    ------
    ConfigError
        If the port cannot be had.
    """

    def __init__(self, host: str, port: int, parts: Parts, *, connections: int = 32) -> None:
        self._parts, self._most = parts, connections
        self._sessions: dict[ExamSession, threading.Thread] = {}
        self._listeners = _listen(host, port)
        self.port: int = self._listeners[0].getsockname()[1]
        self.addresses = [listener.getsockname()[0] for listener in self._listeners]

    def running(self) -> int:
        """How many exams are being received or reconstructed."""
        return sum(session.has_exam and thread.is_alive() for session, thread in list(self._sessions.items()))

    def serve(self, stop: threading.Event) -> None:
        """Accept connections until `stop` is set."""
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while not stop.is_set():
                self._look_after()
                if len(self._sessions) >= self._most:
                    stop.wait(_TICK)
                    continue
                for key, _ in selector.select(_TICK):
                    self._accept(key.fileobj)  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except OSError as error:  # it is gone again, or there are no descriptors left
            _log.warning("a connection could not be accepted: %s", error)
            time.sleep(_TICK)
            return
        session = ExamSession(connection, f"{address[0]}:{address[1]}", self._parts)
        thread = threading.Thread(target=session.run, name=session.record.id, daemon=True)
        self._sessions[session] = thread
        thread.start()

    def _look_after(self) -> None:
        now = time.monotonic()
        for session, thread in list(self._sessions.items()):
            if thread.is_alive():
                session.check(now)
            else:
                del self._sessions[session]

    def shut_down(self, grace: float) -> bool:
        """Accept nothing more, let exams end for `grace` seconds, then end them; False if some could not be ended."""
        for listener in self._listeners:
            listener.close()
        for session in list(self._sessions):
            if not session.has_exam:
                session.cut("the server is being stopped")
        self._wait(grace)
        self._parts.models.cancel.set()
        self._parts.admission.close()
        for session in list(self._sessions):
            session.stop_receiving("the server is being stopped")
        self._wait(_LAST_WORDS)
        for session in list(self._sessions):
            session.cut("the server is being stopped")
        self._wait(_LAST_WORDS)
        return not self._sessions

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._look_after()
            if not self._sessions:
                return
            time.sleep(_TICK / 4)


def _listen(host: str, port: int) -> list[socket.socket]:
    addresses = ["127.0.0.1", "::1"] if host == "localhost" else [host]
    listeners: list[socket.socket] = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family, backlog=128)
        except OSError as error:
            if listeners:  # a machine without IPv6 is none the worse
                break
            raise ConfigError(
                f"the port {port} of {address} cannot be used ({error.strerror}): choose another with --port, or end "
                "the program that has it."
            ) from error
        listeners.append(listener)
        port = listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.setblocking(False)
    return listeners
