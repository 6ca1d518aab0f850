"""BART's files: ``NAME.hdr`` (the sizes, as text) beside ``NAME.cfl`` (complex64, first axis fastest)."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from melcore.errors import DataError
from melcore.io.atomic import replacing
from melcore.layout import BART_DIMENSIONS

Complex = npt.NDArray[np.complex64]


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    name = Path(path)
    base = name.with_suffix("") if name.suffix in (".cfl", ".hdr") else name
    return base.with_name(base.name + ".hdr"), base.with_name(base.name + ".cfl")


def _read_header(path: Path) -> tuple[int, ...]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: a BART array is a pair of files, NAME.hdr and NAME.cfl.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    starts = [number for number, line in enumerate(lines) if line.strip().lower() == "# dimensions"]
    fields = lines[starts[0] + 1].split() if starts and starts[0] + 1 < len(lines) else []
    sizes = tuple(int(field) for field in fields if field.isdecimal())
    if not sizes or len(sizes) != len(fields) or min(sizes) < 1:
        raise DataError(
            f"{path} is not the header of a BART array: expected a line '# Dimensions' followed by a line of sizes."
        )
    return sizes


def read_cfl(path: str | os.PathLike[str]) -> Complex:
    """Map a BART array into memory, without reading it.

    Parameters
    ----------
    path
        With ``.cfl``, ``.hdr`` or neither.

    Returns
    -------
    numpy.ndarray
        Complex64, column-major, at least 16 axes (see `melcore.layout`). What is written into it stays in memory.

    Raises
    ------
    DataError
        If a file of the pair is missing, or they do not fit together.
    """
    header, samples = _paths(path)
    sizes = _read_header(header)
    sizes += (1,) * (BART_DIMENSIONS - len(sizes))
    expected = 8 * math.prod(sizes)
    try:
        found = samples.stat().st_size
        if found < expected:
            raise DataError(
                f"{samples} holds {found} bytes, but {header.name} announces {math.prod(sizes)} complex values, which "
                f"is {expected} bytes: the file is incomplete or belongs to another header."
            )
        return np.memmap(samples, np.complex64, "c", shape=sizes, order="F")
    except FileNotFoundError:
        raise DataError(f"{samples} does not exist, though {header.name} does: copy both files.") from None
    except OSError as error:
        raise DataError(f"{samples} cannot be read: {error.strerror}.") from None


def write_cfl(path: str | os.PathLike[str], array: npt.NDArray[Any]) -> None:
    """Write a BART array. Both files are written beside their names first, so that none is ever half there.

    Parameters
    ----------
    path
        With ``.cfl``, ``.hdr`` or neither.
    array
        Anything that converts to complex64, in BART's order of axes (`melcore.layout`).
    """
    header, samples = _paths(path)
    sizes = array.shape + (1,) * (BART_DIMENSIONS - array.ndim)
    # The transpose of a column-major array is row-major: nothing is copied where the array lies as the file does.
    values = np.ascontiguousarray(array.T, np.complex64)
    with replacing(samples) as temporary:
        values.tofile(temporary)
    with replacing(header) as temporary:
        temporary.write_text("# Dimensions\n" + " ".join(map(str, sizes)) + "\n", encoding="ascii")
