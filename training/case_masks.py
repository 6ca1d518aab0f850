"""The masks of test cases: of one kind and one acceleration, with a centre that coil maps can be estimated from."""

import math

import torch
from torch import Tensor

from melcore.errors import unknown
from melcore.preprocess import masks

MASKS = ("auto", "poisson", "lines", "uniform-lines", "grid", "time-lines")
_CENTRE = 24  # samples of the calibration region along an axis, where the acceleration leaves room for them


def draw_mask(kind: str, shape: tuple[int, ...], acceleration: float, seed: int) -> Tensor:
    """A mask of six axes for k-space of `shape` ``(batch, coil, time, z, y, x)``."""
    _, _, frames, z, y, x = shape
    if acceleration == 1:
        return torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    plane, axes = ((z, y), ("z", "y")) if z > 1 else ((y, x), ("y", "x"))
    lines = max(2, min(_CENTRE, int(0.5 * y / acceleration), y))
    # ESPIRiT's kernel has 6 samples: the centre must be larger where the acceleration allows it at all.
    lines = max(lines, min(8, int(0.95 * y / acceleration)))
    square = min(_CENTRE, int(math.sqrt(0.4 * plane[0] * plane[1] / acceleration)))
    centre = (min(square, plane[0]), min(square, plane[1]))
    if kind == "poisson":
        return masks.k_space_mask(masks.poisson_disc(plane, acceleration, calibration=centre, seed=seed), axes)
    if kind == "grid":
        return masks.k_space_mask(_grid(plane, _steps(acceleration), centre), axes)
    if kind == "lines":
        return masks.k_space_mask(masks.random_lines(y, acceleration, lines, seed=seed), ("y",))
    if kind == "uniform-lines":
        return masks.k_space_mask(masks.uniform_lines(y, acceleration, lines), ("y",))
    if kind == "time-lines":
        lines = min(8, max(2, int(0.95 * y / acceleration)))
        return masks.k_space_mask(masks.variable_density_kt(frames, y, acceleration, lines, seed=seed), ("time", "y"))
    raise unknown("mask", kind, MASKS)


def _steps(acceleration: float) -> tuple[int, int]:
    """Steps along both axes, as square as can be."""
    whole = round(acceleration)
    first = max(step for step in range(1, math.isqrt(whole) + 1) if whole % step == 0)
    return first, whole // first


def _grid(plane: tuple[int, int], steps: tuple[int, int], centre: tuple[int, int]) -> Tensor:
    """Every n-th sample along both axes, the centre among them, and the calibration region on top."""
    mask = torch.zeros(plane, dtype=torch.bool)
    mask[(plane[0] // 2) % steps[0] :: steps[0], (plane[1] // 2) % steps[1] :: steps[1]] = True
    first, second = (
        slice(n // 2 - size // 2, n // 2 - size // 2 + size) for n, size in zip(plane, centre, strict=True)
    )
    mask[first, second] = True
    return mask
