"""Checks that are cheap enough to be made on every piece of data that enters."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_SMALL = 1 << 15  # values; below this, preparing the shortcut costs more than it saves


def all_finite(array: npt.NDArray[Any]) -> bool:
    """Whether a float or complex array holds neither NaN nor infinity.

    A sum of squares is finite only if every term is; for large arrays it costs a fifth of `numpy.isfinite`. It
    overflows for values beyond 1e19, so a sum that is not finite is looked at again, value by value.
    """
    if array.dtype == np.complex64 and array.flags.c_contiguous:
        array = array.view(np.float32) if array.ndim else array
    if array.dtype == np.float32 and array.flags.c_contiguous and array.size > _SMALL:
        flat = array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(array).all())
