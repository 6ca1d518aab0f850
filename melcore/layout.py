"""The one axis convention, and the ways into and out of the layouts of BART and Gadgetron.

==========  ==========================================
k-space     ``(batch, coil, time, z, y, x)``
coil maps   ``(batch, set, coil, 1, z, y, x)``
image       ``(batch, set, time, z, y, x)``
==========  ==========================================

``x`` is the readout, ``y`` the first and ``z`` the second phase-encoding direction, ``time`` whatever repeats (cardiac
phase, repetition, contrast), ``batch`` what is reconstructed independently (slices, examples), ``set`` the ESPIRiT map
sets of soft SENSE. No axis is ever dropped: singletons broadcast. Every conversion of axes lives in this module.

The functions only permute and insert axes. They accept numpy arrays and return views where numpy can.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from melcore.errors import ShapeError

K_SPACE_AXES = ("batch", "coil", "time", "z", "y", "x")
COIL_MAPS_AXES = ("batch", "set", "coil", "1", "z", "y", "x")
IMAGE_AXES = ("batch", "set", "time", "z", "y", "x")

Array = npt.NDArray[Any]

# BART's dimensions in its own (column-major) numbering.
BART_DIMENSIONS = 16
_READ, _PHASE_1, _PHASE_2, _COIL, _MAPS, _TIME, _SLICE, _BATCH = 0, 1, 2, 3, 4, 10, 13, 15


def check_axes(shape: tuple[int, ...], axes: tuple[str, ...], what: str) -> None:
    """Raise `ShapeError` unless `shape` has one size, of at least 1, for each of `axes`."""
    if len(shape) != len(axes) or min(shape, default=0) < 1:
        raise ShapeError(
            f"{what} must have the {len(axes)} axes ({', '.join(axes)}), none empty, but its shape is {tuple(shape)}: "
            "insert missing axes as size 1 (melcore.layout)."
        )


def _to_bart(array: Array, dimensions: tuple[int, ...]) -> Array:
    """Place axis ``i`` of `array` at BART dimension ``dimensions[i]``; the result has 16 axes in BART's order."""
    shape = [1] * BART_DIMENSIONS
    for size, dimension in zip(array.shape, dimensions, strict=True):
        shape[dimension] = size
    order = sorted(range(array.ndim), key=lambda axis: dimensions[axis])
    return array.transpose(order).reshape(shape)


def _from_bart(array: Array, dimensions: tuple[int, ...], what: str) -> Array:
    """Inverse of `_to_bart`; every BART dimension that is not named must be 1."""
    shape = array.shape + (1,) * (BART_DIMENSIONS - array.ndim)
    extra = {dimension: size for dimension, size in enumerate(shape) if size != 1 and dimension not in dimensions}
    if extra:
        raise ShapeError(
            f"{what} from BART may extend along dimensions {sorted(dimensions)} only, "
            f"but its shape is {array.shape}: dimensions {sorted(extra)} are in the way."
        )
    ordered = sorted(dimensions)
    compact = array.reshape([shape[dimension] for dimension in ordered])
    return compact.transpose([ordered.index(dimension) for dimension in dimensions])


_BART_K_SPACE = (_BATCH, _COIL, _TIME, _PHASE_2, _PHASE_1, _READ)
_BART_COIL_MAPS = (_BATCH, _MAPS, _COIL, _TIME, _PHASE_2, _PHASE_1, _READ)
_BART_IMAGE = (_BATCH, _MAPS, _TIME, _PHASE_2, _PHASE_1, _READ)


def k_space_to_bart(k_space: Array) -> Array:
    """``(batch, coil, time, z, y, x)`` to BART's 16 dimensions (read 0, phases 1 and 2, coil 3, time 10, batch 15)."""
    check_axes(k_space.shape, K_SPACE_AXES, "k-space")
    return _to_bart(k_space, _BART_K_SPACE)


def k_space_from_bart(array: Array) -> Array:
    """BART dimensions to ``(batch, coil, time, z, y, x)``.

    Raises
    ------
    ShapeError
        If `array` extends along any other BART dimension.
    """
    return _from_bart(array, _BART_K_SPACE, "k-space")


def coil_maps_to_bart(coil_maps: Array) -> Array:
    """``(batch, set, coil, 1, z, y, x)`` to BART's 16 dimensions (map sets in dimension 4)."""
    check_axes(coil_maps.shape, COIL_MAPS_AXES, "coil maps")
    return _to_bart(coil_maps, _BART_COIL_MAPS)


def coil_maps_from_bart(array: Array) -> Array:
    """BART dimensions to ``(batch, set, coil, 1, z, y, x)``."""
    return _from_bart(array, _BART_COIL_MAPS, "coil maps")


def image_to_bart(image: Array) -> Array:
    """``(batch, set, time, z, y, x)`` to BART's 16 dimensions (map sets in dimension 4, time in 10)."""
    check_axes(image.shape, IMAGE_AXES, "image")
    return _to_bart(image, _BART_IMAGE)


def image_from_bart(array: Array) -> Array:
    """BART dimensions to ``(batch, set, time, z, y, x)``."""
    return _from_bart(array, _BART_IMAGE, "image")


def k_space_from_gadgetron(array: Array) -> Array:
    """Gadgetron's buffer ``[RO, E1, E2, CHA, N, S, LOC]`` to ``(batch, coil, time, z, y, x)``.

    ``N`` becomes time; slices (``LOC``) and ``S`` become the batch, ``LOC`` slowest.
    """
    if array.ndim != 7:
        raise ShapeError(f"a Gadgetron buffer has 7 axes [RO, E1, E2, CHA, N, S, LOC], but this one has {array.shape}.")
    readout, phase_1, phase_2, coils, time, sets, locations = array.shape
    return array.transpose(6, 5, 3, 4, 2, 1, 0).reshape(locations * sets, coils, time, phase_2, phase_1, readout)


def image_to_gadgetron(image: Array, sets: int = 1) -> Array:
    """``(batch, set, time, z, y, x)`` to Gadgetron's ``[X, Y, Z, CHA, N, S, LOC]``, inverse of the buffer's conversion.

    Parameters
    ----------
    image
        Its map sets become ``CHA``; its batch is split into ``LOC`` (slow) and ``S`` (fast).
    sets
        Size of ``S``; must divide the batch.
    """
    check_axes(image.shape, IMAGE_AXES, "image")
    if image.shape[0] % sets:
        raise ShapeError(f"a batch of {image.shape[0]} cannot be split into S = {sets}.")
    split = image.reshape(image.shape[0] // sets, sets, *image.shape[1:])
    return np.ascontiguousarray(split).transpose(6, 5, 4, 2, 3, 1, 0)
