"""Exams that a spool or a file holds, through the same chain again."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gadgets.chain import run_chain
from gadgets.exam_log import LogReader, being_written
from gadgets.exam_record import LOG
from gadgets.exam_request import ExamRequest, parse_request
from gadgets.header import Header, parse_header
from gadgets.image_headers import with_attributes
from gadgets.messages import (
    ACQUISITION_HEADER,
    Acquisition,
    ConfigFile,
    ConfigScript,
    HeaderXml,
    Image,
    Message,
)
from gadgets.spool import Exam
from gadgets.stages import STAGES
from melcore.errors import ConfigError, DataError
from melcore.io.mrd import NOT_IMAGING, has_any_flag, open_raw
from melcore.io.mrd_types import LAST_IN_MEASUREMENT, LAST_IN_REPETITION

_PATIENCE = 120.0  # s
# The counters that tell one image, or one part of it, from another within a repetition.
_GROUPS = ("slice", "phase", "contrast", "set")


@dataclass(frozen=True)
class Material:
    """Raw data, and what was asked for.

    Attributes
    ----------
    title
        What to call them in errors.
    request
        None where nobody asked: a file.
    complete
        Whether the exam came to its end.
    messages
        Begins to read them; configuration and header excluded.
    """

    title: str
    header_xml: bytes
    request: ExamRequest | None
    complete: bool
    messages: Callable[[], Iterator[Message]]


@dataclass(frozen=True)
class Replay:
    """Images, by which pipeline or target, and what is to be said of all of them."""

    images: list[Image]
    name: str
    remark: str


def material_of(exam: Exam) -> Material:
    """Raw data of an exam in a spool.

    Raises
    ------
    DataError
        If they cannot be read, or are still being received.
    """
    if exam.record.state == "running":
        raise DataError(f"exam {exam.record.id} is still being received.")
    end = time.monotonic() + _PATIENCE
    while being_written(exam.folder / LOG) and time.monotonic() < end:
        time.sleep(0.05)  # the server is making an ISMRMRD file of it
    raw = exam.raw
    if raw is None:
        raise DataError(f"exam {exam.record.id} holds no raw data.")
    if raw.suffix == ".log":
        return material_of_log(raw, f"exam {exam.record.id}")
    record = exam.record
    request = None
    if record.name:
        request = ExamRequest("node" if record.kind == "node" else "client", record.name, record.values)
    found = material_of_file(raw)
    return Material(f"exam {record.id}", found.header_xml, request, record.complete, found.messages)


def material_of_file(path: Path) -> Material:
    """Raw data of an ISMRMRD file."""
    with open_raw(path) as raw:
        header_xml = raw.header_xml.encode()

    def messages() -> Iterator[Message]:
        with open_raw(path) as raw:
            yield from raw.acquisitions()

    return Material(str(path), header_xml, None, True, messages)


def material_of_log(path: Path, title: str) -> Material:
    """Raw data of an exam log, as far as it goes.

    Raises
    ------
    DataError
        If it ends before the data begin.
    """
    config: ConfigFile | ConfigScript | None = None
    header: bytes | None = None
    with LogReader(path) as reader:
        for message in reader.messages():
            if isinstance(message, ConfigFile | ConfigScript):
                config = message
            elif isinstance(message, HeaderXml):
                header = message.xml
        complete = reader.complete
    if header is None:
        raise DataError(f"{title} broke off before its header came: there is nothing to reconstruct.")
    request = None
    if config is not None:
        try:
            request = parse_request(config)
        except ConfigError:
            request = None  # a wrong request failed it; --pipeline gives another

    def messages() -> Iterator[Message]:
        with LogReader(path) as reader:
            for message in reader.messages():
                if not isinstance(message, ConfigFile | ConfigScript | HeaderXml):
                    yield message

    return Material(title, header, request, complete, messages)


def replay(
    material: Material,
    *,
    pipeline: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    incomplete: bool = False,
) -> Replay:
    """Reconstruct.

    Parameters
    ----------
    pipeline
        Takes the place of the requested one.
    overrides
        Take the place of the requested properties of the same names.
    incomplete
        Reconstruct also what is not complete.

    Raises
    ------
    ConfigError
        If nobody says which pipeline.
    DataError
        If no image is complete; the message says what is missing.
    """
    request = material.request
    if pipeline is None and request is None:
        raise ConfigError(f"{material.title} does not say by which pipeline to reconstruct it: choose with --pipeline.")
    values = dict(request.values if request is not None else {})
    values.pop("deadline", None)  # nobody waits any more
    overrides = overrides or {}
    if "model" in overrides:
        values.pop("bundle", None)
    values |= overrides
    header = parse_header(material.header_xml)
    stream, remark = material.messages(), ""
    if pipeline is None and request is not None and request.kind == "node":
        if not material.complete:
            remark = "the exam broke off: the images are of what had come until then"
        chain = STAGES[request.name].bind(values, f"target {request.name}")(stream, header)
        chain = STAGES["split_image_array"].bind({}, "")(chain, header)
        images = [message for message in chain if isinstance(message, Image)]
        name = request.name
    else:
        name = Path(pipeline).stem if pipeline is not None else request.name if request is not None else ""
        if not material.complete:
            stream, remark = _complete_part(material, header, incomplete=incomplete)
        images = list(run_chain(pipeline or name, material.header_xml, stream, overrides=values))
    if not images:
        raise DataError(f"{material.title} gave no image through {name}: it holds no complete image data.")
    if remark:
        images = [Image(i.header, with_attributes(i.meta, {"MEL_warning": remark}), i.data) for i in images]
    return Replay(images, name, remark)


def _complete_part(material: Material, header: Header, *, incomplete: bool) -> tuple[Iterator[Message], str]:
    """The repetitions of an exam that broke off which are whole, and words about them."""
    heads = [message.header for message in material.messages() if isinstance(message, Acquisition)]
    headers = np.array(heads, ACQUISITION_HEADER)
    whole, last, lines = complete_repetitions(headers, header)
    where = f"the exam broke off after {len(headers)} readouts"
    if last is None:
        raise DataError(f"{material.title}: {where}, none of them of an image: there is nothing to reconstruct.")
    if last in whole:
        return material.messages(), f"{where}, but its images are complete"
    if incomplete:
        return material.messages(), f"{where}: repetition {last} is reconstructed from the {lines} lines that came"
    if not whole:
        raise DataError(
            f"{material.title}: {where}. Repetition {last} has {lines} lines, and none of them is marked as its last: "
            "no image is complete. --incomplete reconstructs what there is."
        )

    def stream() -> Iterator[Message]:
        for message in material.messages():
            if not isinstance(message, Acquisition) or int(message.header["idx"]["repetition"]) != last:
                yield message

    return stream(), f"{where}: repetition {last}, of which {lines} lines came, is left out"


def complete_repetitions(headers: npt.NDArray[np.void], header: Header) -> tuple[set[int], int | None, int]:
    """Which repetitions of a stream that may have broken off are whole.

    Those that another one followed; the last one if a readout says that it is the last, if the lines of an earlier one
    are all there, or if all lines of the matrix are.

    Returns
    -------
    whole
    last
        The repetition of the last readout of an image; None without any.
    lines
        How many readouts it has.
    """
    imaging = headers[~has_any_flag(headers, NOT_IMAGING)] if len(headers) else headers
    if not len(imaging):
        return set(), None, 0
    repetitions = imaging["idx"]["repetition"]
    last = int(repetitions[-1])
    whole = {int(one) for one in np.unique(repetitions)} - {last}
    of_last = imaging[repetitions == last]
    lines = _lines(of_last)
    marked = bool(has_any_flag(of_last, (LAST_IN_MEASUREMENT, LAST_IN_REPETITION)).any())
    repeats = any(_lines(imaging[repetitions == one]) <= lines for one in whole)
    if marked or repeats or len(lines) >= _all_lines(header):
        whole.add(last)
    return whole, last, len(of_last)


def _lines(headers: npt.NDArray[np.void]) -> set[tuple[int, ...]]:
    counters = headers["idx"]
    columns = [counters[name].tolist() for name in (*_GROUPS, "kspace_encode_step_1", "kspace_encode_step_2")]
    return set(zip(*columns, strict=True))


def _all_lines(header: Header) -> int:
    encoding = header.encodings[0]
    count = encoding.encoded_matrix[1] * encoding.encoded_matrix[2]
    for name in _GROUPS:
        limit = encoding.limits.get(name)
        count *= limit.maximum - limit.minimum + 1 if limit is not None else 1
    return count
