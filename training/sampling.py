"""Draws sampling masks from the kinds of a configuration."""

import math

import numpy as np
import torch
from torch import Tensor

from melcore.preprocess import masks
from training.config import MaskSettings
from training.fields import draw_seed, log_uniform, whole

# Of what is sampled, at most, that the fully sampled centre may take: something must be left elsewhere.
_LARGEST_CENTRE = 0.65
_MISSING = 3 / 8  # of k-space along one axis, at most, with partial Fourier


def choose_kind(kinds: list[MaskSettings], rng: np.random.Generator) -> MaskSettings:
    """Draw a kind by its weight."""
    weights = np.array([kind.weight for kind in kinds])
    return kinds[rng.choice(len(kinds), p=weights / weights.sum())]


def draw_mask(kind: MaskSettings, matrix: tuple[int, int, int], frames: int, rng: np.random.Generator) -> Tensor:
    """Draw an acceleration, a calibration size, and the mask itself: boolean, six axes, 1 wherever it does not vary."""
    acceleration, calibration = log_uniform(rng, kind.acceleration), whole(rng, kind.calibration)
    z, y, x = matrix
    plane, axes = ((z, y), ("z", "y")) if z > 1 else ((y, x), ("y", "x"))
    if kind.kind in ("poisson", "elliptical"):
        mask = masks.k_space_mask(_poisson(plane, acceleration, calibration, kind.kind == "elliptical", rng), axes)
    elif kind.kind == "grid":
        mask = masks.k_space_mask(_grid(plane, kind.acceleration, calibration, rng), axes)
    elif kind.kind == "uniform lines":
        mask = masks.k_space_mask(_regular_lines(1, y, acceleration, calibration, rng)[0], ("y",))
    elif kind.kind == "shifted lines":
        mask = masks.k_space_mask(_regular_lines(frames, y, acceleration, calibration, rng), ("time", "y"))
    else:
        count = frames if kind.kind == "time lines" else 1
        lines = masks.variable_density_kt(
            count,
            y,
            acceleration,
            max(1, min(calibration, int(_LARGEST_CENTRE * y / acceleration))),
            seed=draw_seed(rng),
            decay=log_uniform(rng, (0.1, 8.0)),
        )
        mask = masks.k_space_mask(lines, ("time", "y"))
    if rng.random() < kind.partial_fourier:
        mask = _partial(mask, calibration, rng)
    return mask


def _poisson(
    plane: tuple[int, int], acceleration: float, calibration: int, elliptical: bool, rng: np.random.Generator
) -> Tensor:
    inside = torch.ones(plane, dtype=torch.bool)
    if elliptical:
        axes = (2 * (torch.arange(size) - size // 2) / size for size in plane)
        first, second = torch.meshgrid(*axes, indexing="ij")
        inside = torch.hypot(first, second) <= 1
        acceleration = max(1.0, acceleration * float(inside.float().mean()))
    calibration = min(calibration, int(math.sqrt(_LARGEST_CENTRE * plane[0] * plane[1] / acceleration)), *plane)
    mask = masks.poisson_disc(
        plane,
        acceleration,
        calibration=(calibration, calibration),
        seed=draw_seed(rng),
        variable_density=rng.uniform(0, 2.5),
    )
    return mask & inside


def _grid(
    plane: tuple[int, int], acceleration: tuple[float, float], calibration: int, rng: np.random.Generator
) -> Tensor:
    """Every n-th sample along both axes, from any one on, sometimes sheared (CAIPIRINHA), and a square centre."""
    least, most = acceleration
    steps = [(a, b) for a in range(1, 7) for b in range(1, 7) if least <= a * b <= most]
    first, second = steps[rng.integers(len(steps))] if steps else (round(least), 1)
    shear = int(rng.integers(second)) if rng.random() < 0.3 else 0
    mask = torch.zeros(plane, dtype=torch.bool)
    offset = int(rng.integers(second))
    for count, row in enumerate(range(int(rng.integers(first)), plane[0], first)):
        mask[row, (offset + count * shear) % second :: second] = True
    sizes = [min(calibration, n) for n in plane]
    centre = [slice(n // 2 - size // 2, n // 2 - size // 2 + size) for n, size in zip(plane, sizes, strict=True)]
    mask[centre[0], centre[1]] = True
    return mask


def _regular_lines(frames: int, y: int, acceleration: float, calibration: int, rng: np.random.Generator) -> Tensor:
    """Every n-th line, from any one on and moved by the same step from frame to frame, and a centre: ``(time, y)``."""
    step = max(1, round(acceleration))
    start, shift = int(rng.integers(step)), int(rng.integers(1, step)) if step > 1 else 0
    mask = torch.zeros(frames, y, dtype=torch.bool)
    for frame in range(frames):
        mask[frame, (start + frame * shift) % step :: step] = True
    size = min(calibration, y)
    mask[:, y // 2 - size // 2 : y // 2 - size // 2 + size] = True
    return mask


def _partial(mask: Tensor, calibration: int, rng: np.random.Generator) -> Tensor:
    """Without one end of a phase-encoding axis; the centre stays."""
    axes = [axis for axis in (-3, -2) if mask.shape[axis] > 1] or [-2]
    axis = axes[int(rng.integers(len(axes)))]
    size = mask.shape[axis]
    missing = min(int(rng.uniform(0.1, _MISSING) * size), size // 2 - (calibration + 1) // 2 - 1)
    if missing < 1:
        return mask
    mask = mask.clone()
    mask.narrow(axis, size - missing if rng.random() < 0.5 else 0, missing).fill_(False)
    return mask
