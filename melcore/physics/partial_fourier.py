"""Partial Fourier: what lies on one side of k-space is missing, and follows from the other where the phase is smooth.

Applies to any axis: lines along y or z, or an asymmetric echo along x. Both methods take k-space of whatever has a
smooth phase: each coil, or ``fft(image)`` of a combined image after parallel imaging, with the mask of the part of
k-space that it covers.

Homodyne: Noll, Nishimura, Macovski, IEEE Trans Med Imaging 10:154 (1991). POCS: Haacke, Lindskog, Lin, J Magn Reson
92:126 (1991); Liang et al., Rev Magn Reson Med 4:67 (1992).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from melcore import layout
from melcore.errors import DataError, ShapeError
from melcore.physics.fourier import fft, ifft

_SPACE = (-3, -2, -1)
_LEAST_OVERLAP = 2  # samples beyond the centre: fewer give no phase to rely on


class PartialFourierWarning(UserWarning):
    """Part of k-space was not acquired, and what replaced it is not what was missing."""


@dataclass(frozen=True)
class PartialSampling:
    """An axis along which one side of k-space ends early.

    Attributes
    ----------
    axis
        -3, -2 or -1: z, y or x.
    start, stop
        The samples from `start` to before `stop` hold data.
    size
        Samples of the whole axis; its centre is ``size // 2``.
    """

    axis: int
    start: int
    stop: int
    size: int

    @property
    def fraction(self) -> float:
        """Part of the axis that holds data."""
        return (self.stop - self.start) / self.size

    @property
    def overlap(self) -> int:
        """Samples on the short side of the centre; negative if the centre itself is missing."""
        centre = self.size // 2
        return min(centre - self.start, self.stop - 1 - centre)

    def __str__(self) -> str:
        name = layout.K_SPACE_AXES[self.axis]
        return f"{self.fraction:.0%} of {name} ({self.start} to {self.stop - 1} of {self.size})"


def find_partial_fourier(mask: Tensor, *, tolerance: float = 0.05) -> tuple[PartialSampling, ...]:
    """The axes along which a sampling mask is one-sided.

    Parameters
    ----------
    mask
        Boolean ``(batch, 1, time, z, y, x)`` of the whole grid, axes of size 1 being sampled alike everywhere.
    tolerance
        Sides that differ by this part of the axis, by two samples, or by no more than two neighbouring samples lie
        apart, are still symmetric: random and regularly spaced lines end anywhere.
    """
    layout.check_axes(tuple(mask.shape), layout.K_SPACE_AXES, "the sampling mask")
    found = []
    for axis in _SPACE:
        others = [other for other in range(mask.ndim) if other != mask.ndim + axis]
        sampled = (mask != 0).any(dim=others[-1])
        for other in reversed(others[:-1]):
            sampled = sampled.any(dim=other)
        indices = sampled.nonzero().flatten()
        size = mask.shape[axis]
        if size == 1 or not len(indices):
            continue
        part = PartialSampling(axis, int(indices[0]), int(indices[-1]) + 1, size)
        centre = size // 2
        # An even axis has one sample more before its centre than behind.
        imbalance = (centre - part.start) - (part.stop - 1 - centre) - (1 - size % 2)
        step = int(indices.diff().max()) if len(indices) > 1 else 1
        if abs(imbalance) > max(2, step, tolerance * size):
            found.append(part)
    return tuple(found)


def homodyne(k_space: Tensor, mask: Tensor) -> Tensor:
    """Image from k-space that is one-sided along one axis.

    Missing samples count by their mirrored ones, weighted so that each pair counts fully with a smooth step across the
    centre; the real part is taken after the phase of the symmetric centre is removed. That phase is returned to the
    image, so that its Fourier transform is k-space filled up.

    Parameters
    ----------
    k_space
        Complex ``(batch, coil or set, time, z, y, x)``, zero where nothing was sampled.
    mask
        Boolean, broadcastable; one-sided along one axis.

    Raises
    ------
    DataError
        If the mask is not one-sided along exactly one axis, or holds too little beyond the centre.
    """
    parts = _parts(k_space, mask)
    if len(parts) > 1:
        raise DataError(f"homodyne reconstruction fills one axis, but k-space has {_text(parts)}: use pocs.")
    (part,) = parts
    # Weights of mirrored samples add up to 2: 0 and 2 outside the band about the centre, and a ramp in it.
    index = torch.arange(part.size, device=k_space.device, dtype=k_space.real.dtype) - part.size // 2
    ramp = (1 + index / (part.overlap + 1)).clamp(0, 2)
    weights = ramp if part.start > part.size - part.stop else 2 - ramp
    if part.size % 2 == 0:
        weights[0] = weights[0].clamp(max=1)  # the outermost sample of an even axis has no mirror
    phase = _phase(k_space, parts)
    return phase * (phase.conj() * ifft(k_space * _along(weights, part.axis))).real


@dataclass(frozen=True)
class FilledImage:
    """What `pocs` found.

    Attributes
    ----------
    image
        Complex, shaped as the k-space.
    iterations
        Steps taken.
    change
        ``|x - previous x| / |x|`` of the last step.
    converged
        Whether it reached the tolerance.
    """

    image: Tensor
    iterations: int
    change: float
    converged: bool


def pocs(k_space: Tensor, mask: Tensor, *, max_iterations: int = 50, relative_tolerance: float = 1e-3) -> FilledImage:
    """Image from k-space that is one-sided along one or more axes, by alternating projections.

    In turn the image is projected on those with the phase of the symmetric centre (a real image times that phase), and
    on those that agree with the samples. Both sets are convex.

    Parameters
    ----------
    k_space, mask
        As for `homodyne`.
    max_iterations
        Stop in any case. Not having converged is told in the result, not raised.
    relative_tolerance
        Stop when a step changes the image by less, relatively.

    Raises
    ------
    DataError
        If the mask is not one-sided along any axis, or holds too little beyond the centre.
    """
    parts = _parts(k_space, mask)
    phase = _phase(k_space, parts)
    image = ifft(k_space)
    change, iterations = float("inf"), 0
    while iterations < max_iterations and not change <= relative_tolerance:
        filled = fft(phase * (phase.conj() * image).real)
        update = ifft(torch.where(mask, k_space, filled))
        change = float((update - image).norm() / update.norm().clamp(min=torch.finfo(update.real.dtype).tiny))
        image = update
        iterations += 1
    return FilledImage(image, iterations, change, change <= relative_tolerance)


def _parts(k_space: Tensor, mask: Tensor) -> tuple[PartialSampling, ...]:
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
    if mask.ndim != k_space.ndim or any(m not in (1, k) for m, k in zip(mask.shape, k_space.shape, strict=True)):
        raise ShapeError(f"the mask {tuple(mask.shape)} does not broadcast against k-space {tuple(k_space.shape)}.")
    parts = find_partial_fourier(mask)
    if not parts:
        raise DataError("no axis of k-space is one-sided, so there is nothing for partial Fourier methods to fill.")
    for part in parts:
        if part.overlap < _LEAST_OVERLAP:
            raise DataError(
                f"partial Fourier needs at least {_LEAST_OVERLAP} samples beyond the centre ({part.size // 2}) to "
                f"estimate the phase, but k-space holds {part}: leave the part to the reconstruction (zero-filled)."
            )
    return parts


def _phase(k_space: Tensor, parts: tuple[PartialSampling, ...]) -> Tensor:
    """Unit complex numbers with the phase of the image that the symmetric centre of k-space gives."""
    for part in parts:
        index = torch.arange(part.size, device=k_space.device, dtype=k_space.real.dtype) - part.size // 2
        window = torch.cos((index / (part.overlap + 1)).clamp(-1, 1) * (torch.pi / 2)).square()
        k_space = k_space * _along(window, part.axis)
    return torch.sgn(ifft(k_space))


def _along(values: Tensor, axis: int) -> Tensor:
    return values.view(-1, *[1] * (-axis - 1))


def _text(parts: tuple[PartialSampling, ...]) -> str:
    return " and ".join(map(str, parts))
