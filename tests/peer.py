"""The other end of a Gadgetron socket: recorded messages, and a server that behaves as the real one does."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadgets.codec import TransportError
from gadgets.messages import Close, ConfigScript, HeaderXml, Message
from gadgets.wire import Wire

TARGET_TIMEOUT = 120


@contextmanager
def feeding(raw: bytes) -> Iterator[Wire]:
    """A wire that receives `raw`, then the end of the stream."""
    sender, receiver = socket.socketpair()

    def feed() -> None:
        with suppress(OSError):  # the reader may give up, which is its right
            sender.sendall(raw)
            sender.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=feed)
    thread.start()
    wire = Wire(receiver, message_timeout=5)
    try:
        yield wire
    finally:
        receiver.close()
        thread.join()
        sender.close()


def messages(raw: bytes) -> list[Message]:
    """All messages of a recording, CLOSE included."""
    with feeding(raw) as wire:
        found: list[Message] = []
        while not found or not isinstance(found[-1], Close):
            try:
                found.append(wire.read())
            except TransportError:
                if wire.buffered:
                    raise
                break  # a recording of a module that died
        return found


@dataclass
class Answer:
    """What a module sent, and how its process ended."""

    messages: list[Message] = field(default_factory=list)
    raw: bytes = b""
    code: int | None = None
    log: str = ""


@contextmanager
def started(
    target: str, *, module: str = "gadgets", environment: dict[str, str] | None = None, shell: str = ""
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """Start ``python -m gadgetron PORT gadgets TARGET`` as a server does: stdin closed, the socket as descriptor 0.

    It is gone in the end, whatever happened. `shell` holds commands that come first, such as ``ulimit -f 64;``.
    """
    with socket.create_server(("localhost", 0)) as server:
        server.settimeout(TARGET_TIMEOUT)
        command = f"{shell} exec {sys.executable} -m gadgetron {server.getsockname()[1]} {module} {target} <&-"
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(TARGET_TIMEOUT)
                yield connection, process
        finally:
            process.kill()
            process.communicate()


def run_target(
    to_module: bytes,
    target: str,
    *,
    config: str | None = None,
    stay: bool = True,
    linger: float = 0.0,
    **start: Any,
) -> Answer:
    """Run a target in a process of its own.

    Parameters
    ----------
    to_module
        A recording: configuration, header, messages.
    config
        Replaces the recording's `<configuration>`.
    stay
        Read until the module closes; else reset the connection after sending.
    linger
        Seconds for which the connection stays open, silent, where `to_module` ends early.
    start
        See `started`.
    """
    if config is not None:
        to_module = with_config(to_module, config)
    answer = Answer()
    with started(target, **start) as (connection, process):
        sender = threading.Thread(target=_send, args=(connection, to_module))
        sender.start()
        if stay:
            answer.raw = receive_all(connection)
            sender.join()
        else:
            sender.join()
            threading.Event().wait(linger)
            reset(connection)
        log, _ = process.communicate(timeout=TARGET_TIMEOUT)
    answer.code, answer.log = process.returncode, log.decode(errors="replace")
    answer.messages = messages(answer.raw) if answer.raw else []
    return answer


def reset(connection: socket.socket) -> None:
    """Close as a killed server does: RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def receive_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    return b"".join(iter(lambda: _receive(connection), b""))


def _send(connection: socket.socket, raw: bytes) -> None:
    with suppress(OSError):
        connection.sendall(raw)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""


def with_config(raw: bytes, config: str) -> bytes:
    """A recording with another `<configuration>`."""
    length = int.from_bytes(raw[2:6], "little")
    body = config.encode()
    return raw[:2] + len(body).to_bytes(4, "little") + body + raw[6 + length :]


def properties(**values: object) -> str:
    """A `<configuration>` with properties."""
    lines = "".join(f'<property name="{name}" value="{value}"/>' for name, value in values.items())
    return f"<configuration>{lines}</configuration>"


def data_messages(raw: bytes) -> list[Message]:
    """Messages of a recording without configuration, header and CLOSE."""
    return [message for message in messages(raw) if not isinstance(message, ConfigScript | HeaderXml | Close)]


def run_target_here(to_module: bytes, target: str, *, config: str | None = None) -> Answer:
    """As `run_target`, in a thread of this process: a real socket and the launcher's own `Connection`."""
    from gadgetron.external.connection import Connection

    import gadgets

    if config is not None:
        to_module = with_config(to_module, config)
    answer = Answer(code=0)
    left, right = socket.socketpair()

    def launch() -> None:
        with Connection(right) as connection:
            try:
                getattr(gadgets, target)(connection)
            except SystemExit as stop:
                answer.code = int(str(stop.code))

    def feed() -> None:
        _send(left, to_module)
        with suppress(OSError):
            left.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=launch), threading.Thread(target=feed)]
    for thread in threads:
        thread.start()
    with left:
        left.settimeout(TARGET_TIMEOUT)
        answer.raw = receive_all(left)
        for thread in threads:
            thread.join(TARGET_TIMEOUT)
            assert not thread.is_alive()
    answer.messages = messages(answer.raw) if answer.raw else []
    return answer
