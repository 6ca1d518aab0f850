"""What a Gadgetron server starts: ``python -m gadgetron PORT gadgets TARGET``.

The launcher swallows exceptions, so that the operator would see nothing at all: whatever goes wrong here, from a
missing package on, is reported by `Wire.fail`, and the process ends with exit code 1. For the same reason nothing heavy
is imported before a target runs.
"""

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)

Target = Callable[[Any], None]

_NO_MEMORY = ("out of memory", "allocate memory", "failed to map segment")

#: Names that a server may give as `target`: those of `gadgets.stages.STAGES`.
TARGETS = (
    "accumulate_trigger",
    "adjust_asymmetric_echo",
    "bucket_to_buffer",
    "extract",
    "finish",
    "noise_adjust",
    "passthrough",
    "reconstruct",
    "remove_readout_oversampling",
    "simple_recon",
    "split_image_array",
)


def find(name: str, *, report: bool = False) -> Target | None:
    """Target of that name.

    Parameters
    ----------
    name
        One of `TARGETS`.
    report
        Return a target that fails with a list of the right names, instead of None, if there is none such.
    """
    if name not in TARGETS and not report:
        return None

    def target(connection: Any) -> None:
        serve(connection, name)

    target.__name__ = name
    return target


def serve(connection: Any, name: str) -> None:
    """Run one stage on a `gadgetron.external.Connection` whose configuration and header have been read.

    Raises
    ------
    SystemExit
        With code 1 after a failure, which the other side has been told.
    """
    from gadgets.wire import Wire

    wire = Wire.take_over(connection)
    try:
        _serve(wire, connection, name)
        wire.close()
    except Exception as error:
        # Everything must be reported: at the scanner an unknown error is worth as much as a known one.
        text = describe(error)
        _log.error("%s\n%s", text, traceback.format_exc())
        wire.fail(text)
        # Not raised further: the launcher's own report would come after CLOSE, from a socket that is gone.
        sys.exit(1)


def describe(error: BaseException) -> str:
    """One line for the operator."""
    from melcore.errors import MelError

    words = " ".join(str(error).split())
    if isinstance(error, MelError):
        return f"MEL: {words}"
    # torch has kinds of error of its own for it, or none.
    if isinstance(error, MemoryError) or any(sign in words for sign in _NO_MEMORY):
        return f"MEL: there is not enough memory for this ({type(error).__name__}: {words or 'no details'})"
    return f"MEL failed unexpectedly, please report it: {type(error).__name__}: {words}"


def _serve(wire: Any, connection: Any, name: str) -> None:
    from gadgets.header import parse_header
    from gadgets.settings import properties
    from gadgets.stages import STAGES
    from melcore.errors import unknown

    if name not in STAGES:
        raise unknown("target of gadgets", name, STAGES)
    where = f"external node gadgets.{name}"
    stage = STAGES[name].bind(properties(connection.config, where), where)
    for message in stage(iter(wire), parse_header(connection.raw_bytes.header)):
        wire.send_soon(message)
