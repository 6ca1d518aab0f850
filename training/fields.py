"""Random numbers and smooth random fields for drawing examples, and the resampling that a scanner does."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from melcore.physics.fourier import fft, ifft


def whole(rng: np.random.Generator, span: tuple[int, int]) -> int:
    """A whole number of a range, both ends included."""
    return int(rng.integers(span[0], span[1] + 1))


def log_uniform(rng: np.random.Generator, span: tuple[float, float]) -> float:
    """A positive number whose logarithm is uniform over a range."""
    return math.exp(rng.uniform(math.log(span[0]), math.log(span[1])))


def draw_seed(rng: np.random.Generator) -> int:
    """Seed for a generator of another kind."""
    return int(rng.integers(2**31))


def smooth_field(shape: Sequence[int], bends: float, rng: np.random.Generator) -> Tensor:
    """Smooth random field of about unit variance, float32 of any shape: a cubic spline through random numbers.

    Parameters
    ----------
    shape
        Axes of one sample are constant.
    bends
        Random numbers along the longest axis; shorter axes have fewer, in proportion.
    """
    longest = max(shape)
    counts = [1 if size == 1 else max(2, round(bends * size / longest)) + 2 for size in shape]
    field = torch.from_numpy(rng.standard_normal(counts).astype(np.float32))
    for size, count in zip(shape, counts, strict=True):
        field = torch.tensordot(field, _spline(size, count), ([0], [1]))  # the axis moves to the end, one after another
    # The spline averages neighbours: about 0.69 of the deviation is left along each axis.
    return field / 0.69 ** sum(count > 1 for count in counts)


def _spline(size: int, count: int) -> Tensor:
    """Uniform cubic B-splines ``(size, count)``, from one end of the axis to the other."""
    if count == 1:
        return torch.ones(size, 1)
    positions = torch.linspace(1, count - 2, size) if count > 3 else torch.linspace(0.5, count - 1.5, size)
    distance = (positions[:, None] - torch.arange(count)).abs()
    near = 2 / 3 - distance.square() * (1 - distance / 2)
    far = (2 - distance).clamp(min=0).pow(3) / 6
    return torch.where(distance < 1, near, far)


def add_phase(image: Tensor, strength: float, rng: np.random.Generator, *, smooth: bool = True) -> Tensor:
    """Give images ``(time, z, y, x)``, real or complex, a phase like that of measured ones.

    A slow phase of receiver and field (`smooth`); one that follows the tissue; the brightest tissue, mostly fat, turned
    by any angle as by its chemical shift (without this, networks take the scalp of measured heads for an artefact);
    and local disturbances of the field, by about `strength` in rad.
    """
    shape = image.shape[1:]
    magnitude = image.abs()
    phase = torch.zeros_like(magnitude[:1])
    if smooth:
        phase = phase + rng.uniform(-math.pi, math.pi) + rng.uniform(0, 1.5) * smooth_field(shape, 2, rng)
    if rng.random() < 0.7:
        bright = torch.sigmoid((magnitude - rng.uniform(0.7, 1.1)) / rng.uniform(0.03, 0.1))
        phase = phase + rng.uniform(-math.pi, math.pi) * bright
    phase = phase + rng.uniform(0, 0.3) * magnitude
    phase = phase + strength * rng.uniform(0, 1) * smooth_field(shape, rng.uniform(4, 14), rng)
    return image * torch.polar(torch.ones(()), phase)


def fourier_resample(image: Tensor, shape: Sequence[int], roll_off: float = 0.0) -> Tensor:
    """What a scan of matrix `shape` sees of a finer complex image ``(..., z, y, x)``: the middle of its k-space.

    Intensities stay.

    Parameters
    ----------
    roll_off
        Fraction of the k-space radius, at its end, over which it fades along each axis: less ringing.
    """
    axes = [axis for axis in (-3, -2, -1) if image.shape[axis] != shape[axis]]
    if not axes:
        return image
    spectrum, factor = fft(image, axes), 1.0
    for axis in axes:
        full, size = image.shape[axis], shape[axis]
        spectrum = spectrum.narrow(axis, full // 2 - size // 2, size)
        factor *= math.sqrt(size / full)
        if roll_off > 0:
            radius = (torch.arange(size) - size // 2).abs() / (size / 2)
            fade = torch.cos(0.5 * math.pi * ((radius - 1 + roll_off) / roll_off).clamp(0, 1)).square()
            spectrum = spectrum * fade.view([-1 if other == axis else 1 for other in (-3, -2, -1)])
    return ifft(spectrum, axes) * factor


def normalised(magnitude: Tensor) -> Tensor:
    """Scaled so that bright tissue is about 1: the 99th percentile of what is not air."""
    flat = magnitude.abs().flatten()
    bright = flat[flat > 0.1 * flat.max()]
    if bright.numel() == 0:
        return magnitude
    return magnitude / bright.kthvalue(max(1, round(0.99 * bright.numel()))).values.clamp(min=1e-6)
