"""Readout oversampling: scanners sample the readout twice as finely as asked, so that nothing wraps along it."""

import torch

from melcore.errors import ShapeError
from melcore.physics.fourier import fft, ifft


def remove_readout_oversampling(samples: torch.Tensor, size: int) -> torch.Tensor:
    """Keep the middle of the field of view along the readout, as Gadgetron's RemoveROOversampling does.

    Parameters
    ----------
    samples
        k-space, complex ``(..., x)``, with its centre at ``x // 2``.
    size
        Readout samples to keep, at most ``x``.

    Returns
    -------
    torch.Tensor
        k-space ``(..., size)``. The transforms are orthonormal, so white noise keeps its variance.

    Raises
    ------
    ShapeError
        If `size` is not within 1 and ``x``.
    """
    full = samples.shape[-1]
    if not 1 <= size <= full:
        raise ShapeError(
            f"the readout has {full} samples and cannot be reduced to {size}: "
            "the header's reconstruction matrix and fields of view do not fit its encoded matrix."
        )
    if size == full:
        return samples
    start = full // 2 - size // 2
    return fft(ifft(samples, (-1,))[..., start : start + size], (-1,))
