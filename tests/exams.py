"""Small simulated exams and what may be special about them, as files and as a Gadgetron hands them on."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gadgets.chain import read_pipeline
from gadgets.encode import message_parts
from gadgets.header import parse_header
from gadgets.messages import Acquisition, Close, ConfigScript, HeaderXml, Message
from melcore.io.mrd import open_raw, write_raw
from melcore.io.mrd_types import IS_CALIBRATION, IS_CALIBRATION_AND_IMAGING, IS_NOISE
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol

#: Small exams of each kind.
PROTOCOLS = {
    "slice": Protocol((1, 32, 28), slices=True, coils=3, acceleration=2.0, calibration=(0, 12), seed=6),
    "slices": Protocol((3, 32, 28), slices=True, coils=4, acceleration=2.0, calibration=(0, 12), seed=1),
    "cine": Protocol((2, 32, 28), slices=True, time=4, coils=4, acceleration=2.0, calibration=(0, 12), seed=2),
    "volume": Protocol((10, 24, 20), coils=4, acceleration=2.0, calibration=(8, 10), seed=3),
    "volumes": Protocol((8, 20, 16), time=3, coils=3, acceleration=1.5, calibration=(8, 10), seed=4),
}

_CALIBRATION, _BOTH, _NOISE = (1 << flag - 1 for flag in (IS_CALIBRATION, IS_CALIBRATION_AND_IMAGING, IS_NOISE))

Change = Callable[[str, list[Acquisition]], tuple[str, list[Acquisition]]]


def write(path: Path, protocol: str, *changes: Change) -> Path:
    """Simulate an exam of `PROTOCOLS`, changed."""
    write_exam(path, PROTOCOLS[protocol])
    if changes:
        with open_raw(path) as raw:
            xml, readouts = raw.header_xml, list(raw.acquisitions())
        for change in changes:
            xml, readouts = change(xml, readouts)
        path.unlink()
        write_raw(path, xml, readouts)
    return path


def _flagged(readout: Acquisition, add: int = 0, remove: int = 0) -> Acquisition:
    header = readout.header.copy()
    header["flags"] = int(header["flags"]) & ~remove | add
    return readout._replace(header=header)


def separate_calibration(mode: str, *, counted_from: int = 0, size: float = 1.0, whole: bool = False) -> Change:
    """Calibration lines come first, as readouts of their own.

    They may be counted from another line on, be larger than the image's, and be all lines that there are.
    """

    def change(xml: str, readouts: list[Acquisition]) -> tuple[str, list[Acquisition]]:
        noise = [one for one in readouts if int(one.header["flags"]) & _NOISE]
        lines = [one for one in readouts if not int(one.header["flags"]) & _NOISE]
        chosen = [one for one in lines if whole or int(one.header["flags"]) & _BOTH]
        first = [_flagged(one, _CALIBRATION, _BOTH)._replace(data=one.data * np.complex64(size)) for one in chosen]
        for one in first:
            one.header["idx"]["kspace_encode_step_1"] -= counted_from
        xml = xml.replace("<calibrationMode>embedded<", f"<calibrationMode>{mode}<")
        return xml, [*noise, *first, *(_flagged(one, 0, _BOTH) for one in lines)]

    return change


def partial_fourier(missing: int) -> Change:
    """The first lines along y are not acquired; counters begin at 0 all the same, and the header says so."""

    def change(xml: str, readouts: list[Acquisition]) -> tuple[str, list[Acquisition]]:
        kept = []
        for one in readouts:
            header = one.header.copy()
            line = int(header["idx"]["kspace_encode_step_1"]) - missing
            if int(header["flags"]) & _NOISE:
                kept.append(one)
            elif line >= 0:
                header["idx"]["kspace_encode_step_1"] = line
                kept.append(one._replace(header=header))

        def limits(match: re.Match[str]) -> str:
            last, centre = int(match[1]) - missing, int(match[2]) - missing
            return (
                f"<kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></"
                "kspace_encoding_step_1>"
            )

        pattern = r"<kspace_encoding_step_1>.*?<maximum>(\d+)</maximum><center>(\d+)</center></kspace_encoding_step_1>"
        xml, count = re.subn(pattern, limits, xml, count=1)
        assert count == 1
        return xml, kept

    return change


def without_parallel_imaging(xml: str, readouts: list[Acquisition]) -> tuple[str, list[Acquisition]]:
    """Nothing in the header or the readouts tells which lines are for calibration."""
    xml = re.sub(r"<parallelImaging>.*?</parallelImaging>", "", xml, flags=re.DOTALL)
    return xml, [_flagged(one, 0, _BOTH) for one in readouts]


def arriving(path: Path, pipeline: str | None = None) -> tuple[str, list[Message]]:
    """Header, and messages that arrive at the external node of a pipeline, or as they are in the file."""
    with open_raw(path) as raw:
        header = parse_header(raw.header_xml.encode())
        stream: Iterable[Message] = raw.acquisitions()
        for node in read_pipeline(pipeline) if pipeline else ():
            if node.external:
                break
            stream = node.stage.bind(node.values, node.name)(iter(stream), header)
        return raw.header_xml, list(stream)


def recording(config: str, header_xml: str, messages: Sequence[Message]) -> bytes:
    """What a server sends to an external node."""
    whole = [ConfigScript(config.encode()), HeaderXml(header_xml.encode()), *messages, Close()]
    return b"".join(bytes(part) for message in whole for part in message_parts(message))
