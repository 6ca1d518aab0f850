"""Centred, orthonormal Fourier transforms without shifts.

With ``c = n // 2`` the centre of an axis of ``n`` samples, the centred transform is
``X[k] = n**-0.5 sum_j x[j] exp(-2 pi i (k - c) (j - c) / n)``. Expanding the product turns both shifts into one phase
ramp ``p[j] = exp(2 pi i c j / n)`` before and after the plain transform, and a constant. No copy of the array is
shuffled, and an operator may fold the ramps into arrays that it multiplies by anyway (`melcore.physics.sense` does).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from melcore.physics.operator import LinearOperator


@functools.lru_cache(maxsize=256)
def _ramp(size: int, dtype: torch.dtype, device: torch.device, conjugate: bool) -> Tensor:
    """``exp(2 pi i (c j / n - c c / 2 n))``: the ramp, with half of the constant phase in each of its two uses."""
    centre = size // 2
    # The integer part of the turns is removed exactly, so that long axes lose no precision.
    turns = (torch.arange(size, dtype=torch.int64) * (2 * centre) - centre * centre) % (2 * size)
    angle = turns.to(torch.float64) * (torch.pi / size)
    ramp = torch.polar(torch.ones_like(angle), -angle if conjugate else angle)
    return ramp.to(dtype=dtype, device=device)


def centring_phase(shape: Sequence[int], axes: Sequence[int], *, like: Tensor, conjugate: bool = False) -> list[Tensor]:
    """Phase ramps of the centred transform along `axes`, each shaped to broadcast against `shape`.

    Axes of one sample have no ramp. `like` gives the complex dtype and the device.
    """
    ramps = []
    for axis in axes:
        size = shape[axis]
        if size > 1:
            view = [1] * len(shape)
            view[axis] = size
            ramps.append(_ramp(size, like.dtype, like.device, conjugate).view(view))
    return ramps


def _centred(x: Tensor, axes: Sequence[int], inverse: bool) -> Tensor:
    long = [axis for axis in axes if x.shape[axis] > 1]
    if not long:
        return x
    ramps = centring_phase(x.shape, long, like=x, conjugate=inverse)
    first, *others = ramps
    y = x * first
    for ramp in others:
        y = y * ramp if y.requires_grad else y.mul_(ramp)
    y = torch.fft.ifftn(y, dim=long, norm="ortho") if inverse else torch.fft.fftn(y, dim=long, norm="ortho")
    for ramp in ramps:
        y = y * ramp if y.requires_grad else y.mul_(ramp)
    return y


def fft(x: Tensor, axes: Sequence[int] = (-3, -2, -1)) -> Tensor:
    """Centred orthonormal Fourier transform of a complex tensor along `axes`; index ``n // 2`` is the centre."""
    return _centred(x, axes, inverse=False)


def ifft(x: Tensor, axes: Sequence[int] = (-3, -2, -1)) -> Tensor:
    """Inverse, and adjoint, of `fft`."""
    return _centred(x, axes, inverse=True)


class Fourier(LinearOperator):
    """Centred orthonormal Fourier transform of tensors of one shape along `axes`; unitary."""

    def __init__(self, shape: Sequence[int], axes: Sequence[int] = (-3, -2, -1)) -> None:
        super().__init__(tuple(shape), tuple(shape))
        self.axes = tuple(axes)

    def _forward(self, x: Tensor) -> Tensor:
        return fft(x, self.axes)

    def _adjoint(self, y: Tensor) -> Tensor:
        return ifft(y, self.axes)

    def _normal(self, x: Tensor) -> Tensor:
        return x.clone()
