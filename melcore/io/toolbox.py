"""Runs BART's commands: arrays in, arrays out, and an error instead of a wrong result.

What BART 0.8 does by itself that must not reach a user: a failing command leaves a zero-filled, valid-looking output;
NaN in the input gives finite, wrong maps and exit code 0; errors are spread over coloured lines; with several
threads on a busy machine it spins and becomes up to 20 times slower.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from melcore.errors import DataError, MissingDependencyError, ToolError
from melcore.io.cfl import Complex, read_cfl, write_cfl
from melcore.io.checks import all_finite
from melcore.io.scratch import temporary_folder
from melcore.units import format_bytes

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_POLL = 0.05  # s between two looks at `cancel`
_INSTALL = (
    "install it (Debian, Ubuntu: apt install bart; conda: conda install -c conda-forge bart; source: "
    "https://mrirecon.github.io/bart), or name its binary in MEL_BART"
)


class EmptyOutputError(ToolError):
    """BART ended well, but an output holds nothing but zeros."""


def executable() -> str:
    """Path of the BART binary: ``MEL_BART``, else ``bart`` on the PATH.

    Raises
    ------
    MissingDependencyError
        If there is none; the message says how to install it.
    """
    named = os.environ.get("MEL_BART")
    found = shutil.which(named or "bart")
    if found is None:
        where = f"MEL_BART names {named!r}, which is no program" if named else "BART was not found on the PATH"
        raise MissingDependencyError(f"{where}: {_INSTALL}.")
    return found


def version(timeout: float = 10.0) -> str:
    """Version of BART, for example ``"0.8.00"``."""
    with temporary_folder() as folder:
        return _execute([executable(), "version"], folder, timeout, 1, None).strip().removeprefix("v")


def scratch_folder(needed: int = 0) -> Path:
    """Folder for temporary files: ``MEL_SCRATCH``, else memory (``/dev/shm``) with room enough, else the system's.

    Containers often give ``/dev/shm`` 64 MiB only, and a program that maps a file there dies of SIGBUS when it is full.

    Parameters
    ----------
    needed
        Bytes that will be written.
    """
    named = os.environ.get("MEL_SCRATCH")
    if named:
        if not os.access(named, os.W_OK | os.X_OK):
            raise DataError(
                f"MEL_SCRATCH names {named!r}, which is no folder that can be written: create it or unset it."
            )
        return Path(named)
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > needed + (64 << 20):
        return memory
    return Path(tempfile.gettempdir())


def run(
    command: Sequence[str],
    inputs: Sequence[npt.NDArray[Any]] | Mapping[str, npt.NDArray[Any]] = (),
    outputs: int = 1,
    *,
    timeout: float | None = None,
    threads: int = 1,
    cancel: threading.Event | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> list[Complex]:
    """Run one command of BART.

    Parameters
    ----------
    command
        The command and its options, for example ``["ecalib", "-m", "1"]``. The names of inputs and outputs follow
        by themselves.
    inputs
        Arrays in BART's order of axes (`melcore.layout`), appended to the command in their order. A mapping is not
        appended: its keys are file names that the command itself mentions, as in ``["reconet", "--pattern=pat"]``.
    outputs
        How many arrays the command writes.
    timeout
        In s; BART has no limit of its own.
    threads
        For OpenMP and BLAS.
    cancel
        When set from another thread, the command is stopped.
    scratch
        Folder for the temporary files; `scratch_folder` chooses one if None.

    Returns
    -------
    list of numpy.ndarray
        Complex64, column-major, with 16 axes.

    Raises
    ------
    DataError
        If an input holds NaN or infinity, which BART would turn into a plausible wrong result.
    MissingDependencyError
        If BART is not installed.
    ToolError
        If the command fails (its own words are in the message), takes too long or is cancelled, or if an output holds
        NaN or infinity. `EmptyOutputError` if an output holds only zeros.
    """
    name = f"bart {command[0]}"
    binary = executable()
    appended = [] if isinstance(inputs, Mapping) else [f"in{index}" for index in range(len(inputs))]
    named = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(appended, inputs, strict=True))
    for key, array in named.items():
        if not all_finite(array):
            raise DataError(f"input {key} of {name} holds NaN or infinity: find out where they come from.")
    # Outputs are rarely larger than the inputs; ecalib writes twice as much at most.
    folder = (
        Path(scratch) if scratch is not None else scratch_folder(4 * sum(8 * array.size for array in named.values()))
    )
    with temporary_folder(folder) as place:
        for key, array in named.items():
            write_cfl(place / key, array)
        produced = [f"out{index}" for index in range(outputs)]
        _execute([binary, *command, *appended, *produced], place, timeout, threads, cancel)
        return [_result(place / output, name) for output in produced]


def _result(path: Path, name: str) -> Complex:
    try:
        array = np.array(read_cfl(path), order="F")
    except DataError as error:
        raise ToolError(f"{name} reported success but wrote no valid {path.name}: {error}") from None
    if not all_finite(array.T):
        raise ToolError(f"{name} reported success but its output {path.name} holds NaN or infinity.")
    if not array.any():
        raise EmptyOutputError(f"{name} reported success but its output {path.name} holds only zeros.")
    return array


@functools.cache
def _leash() -> tuple[str, ...]:
    """What to put before a command so that it ends with this process, even where that is killed; maybe nothing."""
    found = shutil.which("setpriv")
    if found is None:
        return ()
    leash = (found, "--pdeathsig", "KILL", "--")
    # That of Busybox knows no such option.
    test = subprocess.run(
        [*leash, found, "--version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return () if test.returncode else leash


def _environment(binary: str, threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    # The names changed after version 0.8: set both.
    home = environment.get("BART_TOOLBOX_PATH") or environment.get("TOOLBOX_PATH") or str(Path(binary).parent)
    environment |= {"TOOLBOX_PATH": home, "BART_TOOLBOX_PATH": home, "DEBUG_LEVEL": "1", "BART_DEBUG_LEVEL": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return environment


def _execute(
    arguments: list[str], folder: Path, timeout: float | None, threads: int, cancel: threading.Event | None
) -> str:
    """Run `arguments` in `folder` and return their standard output."""
    name = f"bart {arguments[1]}"
    try:
        process = subprocess.Popen(
            [*_leash(), *arguments],
            cwd=folder,
            env=_environment(arguments[0], threads),
            # Under Gadgetron, standard input is closed and its number may be that of the socket.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ToolError(f"{arguments[0]} cannot be started: {error.strerror}.") from None
    try:
        output, complaint = _wait(process, name, timeout, cancel)
    except BaseException:
        _kill(process)
        raise
    if process.returncode != 0:
        raise ToolError(_failure(name, process.returncode, complaint, folder))
    return output


def _wait(
    process: subprocess.Popen[str], name: str, timeout: float | None, cancel: threading.Event | None
) -> tuple[str, str]:
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        if cancel is not None and cancel.is_set():
            raise ToolError(f"{name} was cancelled.")
        rest = None if end is None else max(end - time.monotonic(), 0)
        wait = rest if cancel is None else _POLL if rest is None else min(rest, _POLL)
        try:
            return process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            if end is not None and time.monotonic() >= end:
                raise ToolError(
                    f"{name} did not end within {timeout:.3g} s and was stopped: allow it more time."
                ) from None


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and whatever it started: `start_new_session` made it the leader of a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _failure(name: str, code: int, complaint: str, folder: Path) -> str:
    words = " ".join(_COLOURS.sub("", complaint).split())
    words = re.sub(r"\s*\bDone\.|\bERROR: *$", "", words).strip() or "it gave no reason"
    if code == -signal.SIGBUS:
        left = format_bytes(shutil.disk_usage(folder).free)
        words += f" (the scratch folder {folder.parent} is probably full: {left} left; see MEL_SCRATCH)"
    if code == -signal.SIGKILL:
        words += " (killed, probably for want of memory)"
    return f"{name} failed (exit code {code if code >= 0 else 128 - code}): {words[-600:]}"
