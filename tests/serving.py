"""A `mel serve` of its own for a test, and the peers that talk to it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gadgets.codec import TransportError, message_parts
from gadgets.exam_log import HDF5
from gadgets.messages import Close, ConfigFile, ConfigScript, HeaderXml, Image, Message, Text
from gadgets.spool import Exam, Spool
from gadgets.wire import Wire
from melcore.bundle import Bundle
from melcore.io.mrd import open_raw
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import build

PATIENCE = 60.0


@dataclass
class Running:
    """A server's process."""

    process: subprocess.Popen[str]
    port: int
    metrics: int | None
    folder: Path
    log: Path
    seen: frozenset[str] = frozenset()  # exams that were in the spool before a test

    @property
    def spool(self) -> Spool:
        return Spool(self.folder)

    def exams(self, *states: str) -> list[Exam]:
        return [exam for exam in self.spool.exams() if not states or exam.record.state in states]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, shell: str = ""
) -> Iterator[Running]:
    """Start ``mel serve`` on a free port with its spool in `folder`; stopped in the end, whatever happened.

    Parameters
    ----------
    shell
        Commands that the process runs before it becomes the server, such as ``ulimit -f 64;``.
    """
    spool, log = folder / "spool", folder / f"serve.{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "melcore.cli", "serve", "--port", "0", "--spool", str(spool), *arguments]
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["/bin/bash", "-c", f'{shell} exec "$@"', "bash", *command],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = re.search(r"ready on 127\.0\.0\.1:(\d+)", line)
        assert ready, f"{line}{log.read_text()}"
        metrics = re.search(r"metrics on [\d.]+:(\d+)", line)
        yield Running(process, int(ready[1]), int(metrics[1]) if metrics else None, spool, log)
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        process.kill()
        process.communicate()


def tiny_bundle(path: Path) -> Path:
    """An untrained 2D network, which nearly gives its start image."""
    torch.manual_seed(0)
    architecture = {
        "iterations": 2,
        "cg_iterations": 3,
        "regulariser": {"name": "resnet", "dimensions": 2, "channels": 4, "layers": 2},
    }
    return Bundle(build(architecture), architecture, Preparation()).save(path)


def script(**values: object) -> ConfigScript:
    """A client's configuration of properties."""
    lines = "".join(f'<property name="{name}" value="{value}"/>' for name, value in values.items())
    return ConfigScript(f"<configuration>{lines}</configuration>".encode())


def exam_messages(path: Path) -> tuple[HeaderXml, list[Message]]:
    """Header and readouts of a file."""
    with HDF5, open_raw(path) as raw:
        return HeaderXml(raw.header_xml.encode()), list(raw.acquisitions())


def as_bytes(messages: Iterable[Message]) -> bytes:
    """Messages as on the wire."""
    return b"".join(bytes(part) for message in messages for part in message_parts(message))


def connect(port: int) -> socket.socket:
    """A connection to a server on this machine."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def talk(port: int, raw: bytes) -> list[Message]:
    """Send bytes, and take everything that comes back, to CLOSE or to the end of the connection."""
    with connect(port) as connection:
        sender = threading.Thread(target=_send, args=(connection, raw))
        sender.start()
        wire = Wire(connection, message_timeout=PATIENCE)
        found: list[Message] = []
        with suppress(TransportError):
            while not found or not isinstance(found[-1], Close):
                found.append(wire.read())
        sender.join()
        return found


def _send(connection: socket.socket, raw: bytes) -> None:
    with suppress(OSError):
        connection.sendall(raw)


def send_exam(port: int, path: Path, config: Message | str) -> list[Message]:
    """A whole exam, as a client sends it; the answer."""
    header, messages = exam_messages(path)
    first = ConfigFile(config) if isinstance(config, str) else config
    return talk(port, as_bytes([first, header, *messages, Close()]))


def images_of(answer: Iterable[Message]) -> list[Image]:
    """The images of an answer that ends well."""
    *images, last = answer
    assert last == Close(), [message.text for message in images if isinstance(message, Text)]
    assert all(isinstance(message, Image) for message in images), images
    return images


def text_of(answer: list[Message]) -> str:
    """The words of an answer that says why there are no images."""
    words, last = answer[-2:]
    assert isinstance(words, Text)
    assert last == Close()
    return words.text


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def children_of(process: int) -> list[str]:
    """Command lines of the processes that a process started and that still live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            if status.read_text().rpartition(")")[2].split()[1] == str(process):
                found.append((status.parent / "cmdline").read_text().replace("\0", " "))
    return found
