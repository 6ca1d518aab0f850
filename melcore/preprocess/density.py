"""Density compensation of non-Cartesian samples: the weights that make the adjoint an approximate inverse.

Pipe and Menon, Sampling density compensation in MRI: rationale and an iterative numerical solution, Magn Reson Med
41:179 (1999).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.errors import DataError
from melcore.physics.nonuniform import NonUniformFourier, check_trajectory


@dataclass(frozen=True)
class Density:
    """What `density_compensation` found.

    Attributes
    ----------
    weights
        Real, positive ``(time, readout, sample)``: the area (in 3D the volume) of k-space that each sample stands for,
        in cells of the Cartesian grid; 1 on that grid.
    iterations
        Steps taken.
    deviation
        How far the weighted samples, convolved, are from 1, as root mean square over the samples.
    converged
        Whether the deviation reached the tolerance.
    """

    weights: Tensor
    iterations: int
    deviation: float
    converged: bool


def density_compensation(
    trajectory: Tensor, matrix: tuple[int, int, int], *, max_iterations: int = 50, tolerance: float = 0.01
) -> Density:
    """Weights such that the weighted samples, convolved with the kernel of the field of view, are 1 at each sample.

    The kernel is the square of the field of view's Fourier transform (a product of ``sinc^2``), which is what limits
    errors in the image to outside the field of view. It is applied in image space, as a window on twice the field.

    Parameters
    ----------
    trajectory
        ``(time, readout, sample, 2 or 3)`` in cycles per field of view, as in `melcore.physics.NonUniformSense`.
    matrix
        Image (z, y, x).
    max_iterations
        Stop in any case. Not having converged is told in the result, not raised.
    tolerance
        Stop when the deviation is below.
    """
    check_trajectory(trajectory, matrix)
    dims = trajectory.shape[-1]
    sizes = (1,) * (3 - dims) + tuple(matrix[3 - dims :])
    double = tuple(2 * size - 1 for size in sizes)
    # Cycles per (nearly) twice the field of view: the voxels stay where they are.
    scale = torch.tensor([d / s for d, s in zip(double, sizes, strict=True)][::-1][:dims], dtype=torch.float64)
    frames = trajectory.shape[0]
    scaled = trajectory.to(torch.float64) * scale.to(trajectory.device)
    fourier = NonUniformFourier((1, 1, frames, *double), scaled, accuracy=min(1e-4, tolerance / 10))
    window = torch.ones(double, dtype=torch.float32, device=trajectory.device)
    for axis, size in zip((-3, -2, -1), sizes, strict=True):
        offset = torch.arange(1 - size, size, device=trajectory.device).abs() / size
        window = window * (1 - offset).view(-1, *[1] * (-axis - 1))
    # The transforms on the double grid are orthonormal there; the kernel is normalised on the grid itself.
    gain = float(torch.tensor(double).prod() / torch.tensor(sizes).prod())
    weights = torch.ones(fourier.codomain, dtype=torch.float32, device=trajectory.device)
    deviation, iterations = float("inf"), 0
    while True:
        sums = gain * fourier(window * fourier.adjoint(weights.to(torch.complex64))).real
        if not bool((sums > 0).all()):
            raise DataError("the density of this trajectory cannot be compensated: the samples' sums are not positive.")
        deviation = float((sums - 1).square().mean().sqrt())
        if deviation <= tolerance or iterations == max_iterations:
            return Density(weights[0, 0, :, 0], iterations, deviation, deviation <= tolerance)
        weights = weights / sums
        iterations += 1
