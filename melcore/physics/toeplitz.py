"""The normal operator of a non-Cartesian trajectory as a convolution: two FFTs instead of two gridding steps.

``A^H W A`` of a Fourier transform at any points is a convolution with the point spread function, hence a Toeplitz
matrix, which zero padding turns into a circulant one.

Fessler et al., Toeplitz-based iterative image reconstruction for MRI with correction for magnetic field inhomogeneity,
IEEE Trans Signal Process 53:3393 (2005).
"""

import math

import torch
from torch import Tensor

from melcore.physics.nufft_plan import NufftPlan


def toeplitz_kernel(points: Tensor, shape: tuple[int, ...], power: Tensor) -> Tensor:
    """Transfer function of ``A^H diag(power) A``, where ``A`` is the orthonormal transform at `points`.

    Parameters
    ----------
    points
        float64 ``(frame, sample, axis)`` in radians per voxel, the axes in the order of `shape`.
    shape
        Of the arrays.
    power
        Real weights ``(frame, sample)``, or of one frame; their precision is the kernel's. Either may have one frame.

    Returns
    -------
    Tensor
        Real ``(frame, *padded)``, on the device of `power`: the eigenvalues, for `apply_toeplitz`. It is computed on
        the CPU, so that a GPU on which only the normal operator is applied needs no nonuniform transforms.
    """
    frames = max(points.shape[0], power.shape[0])
    differences = tuple(2 * size - 1 for size in shape)
    padded = tuple(_fast_size(size) for size in differences)
    plan = NufftPlan(points, differences)
    weights = power.cpu().to(power.dtype.to_complex())
    axes = tuple(range(-len(shape), 0))
    kernels = []
    for frame in range(frames):
        spread = plan.arrays(weights[frame % len(weights)][None], frame % len(points))[0] / math.prod(shape)
        whole = spread.new_zeros(padded)
        whole[tuple(slice(0, size) for size in differences)] = spread
        # The difference 0 moves to index 0, negative ones to the end.
        whole = torch.roll(whole, [1 - size for size in shape], axes)
        # A point spread function is Hermitian, so its transform is real, and the operator exactly self-adjoint.
        kernels.append(torch.fft.fftn(whole).real)
    return torch.stack(kernels).to(power.device)


def apply_toeplitz(arrays: Tensor, kernel: Tensor) -> Tensor:
    """Apply the operator of one frame's `kernel` to ``(..., *shape)``.

    The axes are padded and cropped one by one, so that no transform runs over zeros that another axis brings.
    """
    axes = range(-1, -1 - kernel.ndim, -1)
    shape = arrays.shape
    for axis in axes:
        arrays = torch.fft.fft(arrays, n=kernel.shape[axis], dim=axis)
    arrays = arrays * kernel
    for axis in reversed(axes):
        arrays = torch.fft.ifft(arrays, dim=axis).narrow(axis, 0, shape[axis])
    return arrays


def _fast_size(size: int) -> int:
    """The least size from `size` on that has no prime factor above 5."""
    rest = size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return size if rest == 1 else _fast_size(size + 1)
