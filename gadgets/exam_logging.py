"""Log lines that say which exam they belong to, for people or for programs."""

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Literal

_EXAM: contextvars.ContextVar[str] = contextvars.ContextVar("exam", default="")


@contextlib.contextmanager
def exam_lines(exam: str) -> Iterator[None]:
    """Mark the log lines of this thread, whoever writes them, as those of an exam."""
    token = _EXAM.set(exam)
    try:
        yield
    finally:
        _EXAM.reset(token)


def set_up(kind: Literal["text", "json"], level: int = logging.INFO) -> None:
    """Write log lines to standard error: as text, or as one JSON object each.

    Fields beside the words come from ``extra={"fields": {...}}``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if kind == "json" else _Text())
    handler.addFilter(_mark)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _mark(record: logging.LogRecord) -> bool:
    record.exam = _EXAM.get()
    return True


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", {})
    return fields if isinstance(fields, dict) else {}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": f"{_clock(record)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        exam = getattr(record, "exam", "")
        if exam:
            line["exam"] = exam
        line |= _fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        exam = getattr(record, "exam", "")
        words = [_clock(record), record.levelname.lower(), *([exam] if exam else []), record.getMessage()]
        words += [f"{name}={value}" for name, value in _fields(record).items()]
        text = " ".join(words)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _clock(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
