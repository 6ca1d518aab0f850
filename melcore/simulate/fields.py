"""Smooth random fields and antialiased level sets: the two tools that the phantoms are made of.

A field is a function of position, sampled where it is asked for, so that the same anatomy can be cut by a volume or by
a single oblique slice, at any resolution.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class RandomField:
    """Band-limited periodic Gaussian noise with zero mean and unit variance, of one or more channels.

    Parameters
    ----------
    rng
        Source of randomness.
    wavelength
        Typical distance between two maxima, in units of the positions it is sampled at.
    channels
        Number of independent fields.
    exponent
        None: one band of about an octave. A number: wavelengths from `wavelength` down to a tenth of it, of a power
        spectrum that falls with this exponent (a fractal texture).
    """

    def __init__(
        self, rng: np.random.Generator, wavelength: float, *, channels: int = 1, exponent: float | None = None
    ) -> None:
        # A tile of noise in Fourier space: eight samples to a wavelength are smooth under linear interpolation.
        size, waves = (24, 3) if exponent is None else (36, 2)
        frequency = np.fft.fftfreq(size, 1 / size)
        radius = np.sqrt(sum(f**2 for f in np.meshgrid(frequency, frequency, np.fft.rfftfreq(size, 1 / size))))
        if exponent is None:
            gain = np.exp(-0.5 * ((radius - waves) / (0.25 * waves)) ** 2)
        else:
            gain = np.where(radius >= waves - 1, np.maximum(radius, 1) ** (-exponent / 2), 0)
        noise = np.fft.rfftn(rng.standard_normal((channels, size, size, size), dtype=np.float32), axes=(1, 2, 3))
        tile = np.fft.irfftn(noise * gain, s=(size,) * 3, axes=(1, 2, 3))
        tile /= tile.std(axis=(1, 2, 3), keepdims=True)
        # Interpolation wraps around: one more sample on each side.
        self._tile = torch.from_numpy(np.pad(tile, ((0, 0), *((0, 1),) * 3), mode="wrap").astype(np.float32))
        self._period = waves * wavelength
        self._origin = torch.from_numpy(rng.random(3, dtype=np.float32))

    def __call__(self, position: Tensor) -> Tensor:
        """Sample at positions ``(..., 3)``: ``(channels, ...)``."""
        turns = position / self._period + self._origin
        inside = 2 * (turns - turns.floor()) - 1
        grid = inside.reshape(1, 1, 1, -1, 3)
        values = F.grid_sample(self._tile.unsqueeze(0), grid, mode="bilinear", align_corners=True)
        return values.reshape(len(self._tile), *position.shape[:-1])


def slope(field: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """Magnitude of the gradient of ``(..., z, y, x)`` for voxels of size `spacing`; axes of one voxel do not count."""
    total = torch.full_like(field, 1e-12)
    for axis in (-3, -2, -1):
        if field.shape[axis] > 1:
            (along,) = torch.gradient(field, spacing=spacing[axis], dim=axis)
            total += along.square()
    return total.sqrt()


def inside(field: Tensor) -> Tensor:
    """Fraction of each voxel ``(..., z, y, x)`` in which `field` is negative: a sharp edge with its partial volumes."""
    return (0.5 - field / slope(field, (1.0, 1.0, 1.0))).clamp(0, 1)


def paint(image: Tensor, coverage: Tensor, value: Tensor | float) -> None:
    """Cover `image` with `value`, in place, where and as far as `coverage` says."""
    image += coverage * (value - image)


def rotation(rng: np.random.Generator, degrees: float) -> Tensor:
    """Rotation about a random axis by a random angle with this standard deviation."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis) * math.radians(degrees) * rng.standard_normal()
    generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(generator).float()
