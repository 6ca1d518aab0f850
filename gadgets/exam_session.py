"""One connection: an exam is received, kept, reconstructed, and answered.

The thread of the connection receives, and writes to the spool; another runs the chain and sends images as they come.
Whatever fails, the input is taken to its end first: a peer that still sends would not read the reason, and the raw data
would not be whole. The reason goes to a Gadgetron's node as ERROR; to a client as TEXT, which clients show, while their
readers die of an ERROR.
"""

import contextlib
import logging
import socket
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from gadgets.admission import Admission, StoppingError
from gadgets.codec import TransportError, message_parts
from gadgets.exam_chain import ExamChain
from gadgets.exam_feed import ExamFeed
from gadgets.exam_logging import exam_lines
from gadgets.exam_record import Record, new_id
from gadgets.exam_request import kind_of
from gadgets.messages import (
    Close,
    ConfigFile,
    ConfigScript,
    Error,
    HeaderXml,
    Image,
    ImageArray,
    Message,
    Text,
)
from gadgets.metrics import Metrics
from gadgets.spool import Spool, SpooledExam
from gadgets.targets import describe
from gadgets.warm_models import WarmModels
from gadgets.wire import Wire
from melcore.errors import DataError, MelError
from melcore.machine import give_back_memory

_log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What all connections share.

    Attributes
    ----------
    handshake
        Seconds for configuration and header.
    idle
        Seconds for each message, either way, the pause before it included.
    largest_array
        Bytes; see `Wire`.
    """

    models: WarmModels
    admission: Admission
    spool: Spool
    metrics: Metrics = field(default_factory=Metrics)
    handshake: float = 30.0
    idle: float = 600.0
    largest_array: int = 16 << 30


class ExamSession:
    """The exchange with one peer; `run` it in a thread."""

    def __init__(self, connection: socket.socket, peer: str, parts: Parts) -> None:
        self.record = Record(new_id(), peer=peer, began=time.time())
        self._connection, self._parts = connection, parts
        self._begin = time.monotonic()
        self._ready = False  # configuration and header have come
        self._reading: float | None = None  # since when a message is waited for
        self._sending: float | None = None
        self._cut = ""
        self._failure: Exception | None = None
        self._seconds: dict[str, float] = {}

    # For the server's own thread.

    @property
    def has_exam(self) -> bool:
        """Whether raw data are being received or reconstructed."""
        return self._ready

    def check(self, now: float) -> None:
        """Cut the connection if its peer keeps it for nothing."""
        parts = self._parts
        if not self._ready and now - self._begin > parts.handshake:
            self.cut(f"no configuration and header came within {parts.handshake:g} s")
        for since, verb in ((self._reading, "sent"), (self._sending, "took")):
            if self._ready and since is not None and now - since > parts.idle:
                self.cut(f"the other side {verb} no whole message for {parts.idle:g} s")

    def cut(self, reason: str) -> None:
        """End the connection at once; whoever waits for it goes on with an error."""
        if not self._cut:
            self._cut = reason
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def stop_receiving(self, reason: str) -> None:
        """End the connection if more is to come; one that waits for its images goes on waiting."""
        if self._reading is not None:
            self.cut(reason)

    # For its own thread.

    def run(self) -> None:
        """Serve the peer until it is gone. Never raises: the next exam must be served."""
        with exam_lines(self.record.id), self._connection:
            try:
                self._converse(Wire(self._connection, largest_array=self._parts.largest_array))
            except Exception:
                _log.exception("this exam's connection failed unexpectedly, please report it")
        give_back_memory()

    def _converse(self, wire: Wire) -> None:
        try:
            opening = self._opening(wire)
        except (MelError, MemoryError) as error:
            reason = self._cut or describe(error)
            # Whoever only looked whether the port is open has sent nothing.
            _log.log(logging.INFO if wire.received else logging.DEBUG, "no exam from %s: %s", self.record.peer, reason)
            wire.fail(reason, patience=1)
            return
        if opening is None:
            wire.close()
            return
        config, header = opening
        record = self.record
        record.kind = kind_of(config)
        self._ready = True
        _log.info("exam begins", extra={"fields": {"peer": record.peer, "kind": record.kind}})
        exam, problem = self._begin_exam(config, header)
        feed = ExamFeed(exam, self._parts.spool, problem=problem)
        chain = ExamChain(record, self._parts.models, feed)
        worker = threading.Thread(target=self._work, args=(wire, config, header, feed, chain), daemon=True)
        worker.start()
        fault = self._receive(wire, feed)
        if exam is not None:
            self._settle(exam, feed)
        worker.join()
        self._seconds |= chain.seconds
        self._answer(wire, exam, feed, chain, fault)

    def _opening(self, wire: Wire) -> tuple[ConfigFile | ConfigScript, HeaderXml] | None:
        """Configuration and header; None if the peer closes before anything."""
        config: ConfigFile | ConfigScript | None = None
        while True:
            message = self._read(wire)
            if config is None and isinstance(message, ConfigFile | ConfigScript):
                config = message
            elif config is not None and isinstance(message, HeaderXml):
                return config, message
            elif isinstance(message, Text):
                _log.info("the other side says: %s", message.text)
            elif config is None and isinstance(message, Close):
                return None
            else:
                wanted = "a configuration" if config is None else "the ISMRMRD header"
                raise DataError(f"expected {wanted} first, but a {type(message).__name__} came.")

    def _read(self, wire: Wire) -> Message:
        self._reading = time.monotonic()
        try:
            return wire.read()
        finally:
            self._reading = None

    def _begin_exam(self, config: Message, header: Message) -> tuple[SpooledExam | None, str]:
        try:
            exam = self._parts.spool.begin(self.record)
        except OSError as error:
            return None, error.strerror or str(error)
        try:
            exam.log.append(config)
            exam.log.append(header)
        except OSError as error:
            exam.discard()
            return None, error.strerror or str(error)
        return exam, ""

    def _receive(self, wire: Wire, feed: ExamFeed) -> Exception | None:
        """Take everything to CLOSE; what went wrong on the way, if anything did."""
        fault: Exception | None = None
        record = self.record
        while True:
            try:
                message = self._read(wire)
            except (DataError, MemoryError) as error:  # of one message, which was skipped
                fault = fault or error
                feed.finish(error)
                continue
            except Exception as error:
                fault = fault or error
                break
            if isinstance(message, Close):
                record.complete = fault is None
                break
            if isinstance(message, Text):
                _log.info("the other side says: %s", message.text)
            elif isinstance(message, Error):
                fault = fault or TransportError(f"the other side failed: {message.text}")
                feed.finish(fault)
            else:
                record.messages += 1
                feed.put(message)
        self._seconds["receive"] = time.monotonic() - self._begin
        feed.finish(fault)
        return fault

    def _settle(self, exam: SpooledExam, feed: ExamFeed) -> None:
        try:
            if self.record.complete and not feed.unspooled:
                exam.log.append(Close())
            exam.log.sync()
            exam.write_record()
        except OSError as error:
            _log.warning("the raw data may not be safe on disk: %s", error.strerror)
        self._parts.metrics.spooled(exam.log.size)

    # For the thread of the chain.

    def _work(
        self, wire: Wire, config: ConfigFile | ConfigScript, header: HeaderXml, feed: ExamFeed, chain: ExamChain
    ) -> None:
        with exam_lines(self.record.id):
            try:
                for message in chain.run(config, header):
                    self._send(wire, message)
            except Exception as error:
                # Everything must be reported: at the scanner an unknown error is worth as much as a known one.
                self._failure = error
                if not isinstance(error, MelError):
                    _log.error("%s", traceback.format_exc())
            finally:
                feed.abandon()

    def _send(self, wire: Wire, message: Message) -> None:
        if isinstance(message, Image | ImageArray):
            if not self.record.images:
                self._seconds["first_image"] = time.monotonic() - self._begin
            self.record.images += 1
        self._sending = time.monotonic()
        try:
            wire.send(message)
        finally:
            self._sending = None

    # The end.

    def _answer(
        self, wire: Wire, exam: SpooledExam | None, feed: ExamFeed, chain: ExamChain, fault: Exception | None
    ) -> None:
        record = self.record
        failure = TransportError(f"{self._cut}.") if self._cut else fault or self._failure
        if (
            failure is None
            and chain.makes_images
            and not record.images
            and (record.messages or record.kind == "client")
        ):
            failure = DataError(f"no image came of {record.messages} messages: they hold no complete image data.")
        if failure is None:
            try:
                wire.close()
            except TransportError as error:
                failure = error
        record.seconds = self._seconds["total_exam"] = time.monotonic() - self._begin
        if failure is None:
            record.state = "fallback" if chain.warned else "delivered"
            record.reason = "an image is not what was asked for" if chain.warned else ""
        else:
            record.state = "failed" if wire.finished else "interrupted"
            record.reason = describe(failure)
        # The record first: who reads the answer may look for the exam.
        if exam is not None and record.state != "delivered":
            with contextlib.suppress(OSError):
                exam.write_record()
        if failure is not None:
            self._tell(wire, failure, f"{record.reason} ({self._whereabouts(exam, feed)})")
        if feed.unspooled:
            _log.error("the raw data are not kept, the disk of the spool failed: %s", feed.unspooled)
            self._parts.metrics.unspooled()
        self._report(failure)
        if exam is not None:
            exam.end()

    def _whereabouts(self, exam: SpooledExam | None, feed: ExamFeed) -> str:
        if exam is None or feed.unspooled:
            return f"exam {self.record.id}; its raw data could not be kept: {feed.unspooled}"
        if not self.record.messages:
            return f"exam {self.record.id}; it had no data"
        return f"exam {self.record.id}; its raw data are kept: mel replay {self.record.id}"

    def _tell(self, wire: Wire, failure: Exception, text: str) -> None:
        if self.record.kind == "client" and wire.finished and not isinstance(failure, TransportError):
            with contextlib.suppress(OSError, TransportError):
                words: list[Any] = message_parts(Text(text))
                self._connection.sendall(b"".join(words))
                wire.close()
            return
        wire.fail(text, patience=1)

    def _report(self, failure: Exception | None) -> None:
        record = self.record
        fields: dict[str, object] = {
            "state": record.state,
            "name": record.name,
            "messages": record.messages,
            "images": record.images,
            "path": "+".join(record.paths),
            **{f"seconds_{name}": round(value, 3) for name, value in self._seconds.items()},
        }
        if record.reason:
            fields["reason"] = record.reason
        quiet = record.state == "delivered" or isinstance(failure, StoppingError)
        level = logging.INFO if quiet else logging.WARNING
        _log.log(level, "exam ended", extra={"fields": fields})
        self._parts.metrics.ended(record.state, self._seconds)
