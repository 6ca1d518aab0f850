"""What is known of an exam: who asked for what, and what became of it; a JSON file beside its raw data."""

import contextlib
import dataclasses
import json
import os
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gadgets.exam_log import being_written

LOG, RECORD = "raw.log", "exam.json"

#: What became of an exam. `running` without a living writer is shown as `interrupted`.
State = Literal["running", "delivered", "fallback", "failed", "interrupted", "replayed"]
#: States in which nothing more is owed to anybody.
DONE = ("delivered", "replayed")


@dataclass
class Record:
    """What is known of an exam.

    Attributes
    ----------
    kind, name, values
        Whether a client of the MRD protocol or a node of a Gadgetron sent it, the pipeline or target that it named, and
        the properties.
    complete
        Whether it came to its end: the other side said CLOSE.
    reason
        Why it is not `delivered`.
    """

    id: str
    state: State = "running"
    kind: str = ""
    name: str = ""
    values: dict[str, str] = field(default_factory=dict)
    peer: str = ""
    protocol: str = ""
    began: float = 0.0  # seconds since 1970
    seconds: float = 0.0
    messages: int = 0
    complete: bool = False
    images: int = 0
    paths: list[str] = field(default_factory=list)
    reason: str = ""
    replays: list[dict[str, Any]] = field(default_factory=list)


def new_id() -> str:
    """An id that sorts by time: ``20261122T134501-123-3fa9``."""
    now = time.time()
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}-{int(now * 1e3) % 1000:03d}-{secrets.token_hex(2)}"


def read_record(folder: Path) -> Record:
    """The record of an exam's folder; what cannot be read is left empty, for the raw data count."""
    record = Record(folder.name)
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = {one.name for one in dataclasses.fields(Record)}
        values = json.loads((folder / RECORD).read_bytes())
        record = Record(**{name: value for name, value in values.items() if name in known})
        record.id = folder.name
    if record.state == "running" and not being_written(folder / LOG):
        record.state, record.reason = "interrupted", "the server ended before the exam"
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write a record; whole, or not at all."""
    temporary = folder / f".{RECORD}.{os.getpid()}.{threading.get_ident()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / RECORD)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
