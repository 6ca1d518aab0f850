"""Non-Cartesian samples: their density, and the centre of k-space that they imply, from which coil maps come."""

import torch
from torch import Tensor

from melcore.data import KSpace, Samples
from melcore.errors import DataError
from melcore.physics import NonUniformFourier, conjugate_gradient, fft
from melcore.preprocess.density import Density, density_compensation

_CG_ITERATIONS, _CG_WEIGHT = 12, 1e-3


def sample_density(samples: Samples) -> tuple[Tensor, tuple[Density, ...]]:
    """Density compensation of each frame, ``(time, readout, sample)``, zero where no readout was taken.

    Also returns what `density_compensation` said of each frame.
    """
    weights = torch.zeros(samples.trajectory.shape[:3], dtype=torch.float32)
    found = []
    for frame, taken in enumerate(samples.taken):
        if not bool(taken.any()):
            raise DataError(f"frame {frame} of {len(samples.taken)} has no readouts: leave it out.")
        one = density_compensation(samples.trajectory[frame : frame + 1, taken], samples.info.encoded_matrix)
        weights[frame, taken] = one.weights[0]
        found.append(one)
    return weights, tuple(found)


def calibration_from_samples(samples: Samples, size: int = 24) -> KSpace:
    """The centre of the Cartesian k-space that belongs to the samples of all frames together.

    For each coil the image of `size` voxels across is found that fits the samples within its k-space best, by conjugate
    gradients; its Fourier transform is a fully sampled calibration region.

    Parameters
    ----------
    samples
        Not undersampled within the region, all frames taken together.
    size
        Of the region along each axis; less along shorter axes.

    Returns
    -------
    KSpace
        On the encoded matrix, one frame, sampled in the region only.

    Raises
    ------
    DataError
        If fewer than two samples for each of its positions lie in the region, which then cannot be found.
    """
    matrix = samples.info.encoded_matrix
    region = (min(size, matrix[0]), min(size, matrix[1]), min(size, matrix[2]))
    dims = samples.trajectory.shape[-1]
    frames = samples.data.shape[2]
    trajectory = samples.trajectory.expand(frames, *samples.trajectory.shape[1:])
    sizes = torch.tensor(region[::-1][:dims])
    low, high = -(sizes // 2), sizes - 1 - sizes // 2  # beyond, a sample would fold to the other side
    inside = ((trajectory >= low - 1e-3) & (trajectory <= high + 1e-3)).all(-1)
    inside &= samples.taken.expand(frames, -1)[:, :, None]
    count = int(inside.sum())
    if count < torch.tensor(region).prod():
        raise DataError(
            f"{count} samples lie within the central {'x'.join(map(str, region))} (z, y, x) of k-space, fewer than it "
            "has positions: coil maps cannot be estimated from them; give a smaller calibration size."
        )
    points = trajectory[inside][None, None]
    batch, coils = samples.data.shape[:2]
    values = samples.data[:, :, :, 0][:, :, inside].reshape(batch, coils, 1, 1, 1, count)
    density = density_compensation(points, region, max_iterations=30, tolerance=0.03).weights
    fourier = NonUniformFourier((batch, coils, 1, *region), points)
    solution = conjugate_gradient(
        lambda v: fourier.adjoint(density[:, None] * fourier(v)) + _CG_WEIGHT * v,
        fourier.adjoint(density[:, None] * values),
        relative_tolerance=1e-4,
        max_iterations=_CG_ITERATIONS,
    )
    data = samples.data.new_zeros(batch, coils, 1, *matrix)
    mask = torch.zeros(1, 1, 1, *matrix, dtype=torch.bool)
    first = [n // 2 - used // 2 for n, used in zip(matrix, region, strict=True)]
    z, y, x = (slice(start, start + used) for start, used in zip(first, region, strict=True))
    data[..., z, y, x] = fft(solution.value)
    mask[..., z, y, x] = True
    return KSpace(data, mask, samples.info, samples.noise)
