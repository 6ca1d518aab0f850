"""What to do about k-space of which one side was not acquired: fill it, or leave it and say so."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch

from melcore.data import KSpace
from melcore.errors import unknown
from melcore.physics import PartialFourierWarning, fft, find_partial_fourier, homodyne, pocs

Method = Literal["zero", "homodyne", "pocs"]
METHODS: tuple[Method, ...] = ("zero", "homodyne", "pocs")


def treat_partial_fourier(k_space: KSpace, method: Method) -> KSpace:
    """Fill k-space that is one-sided along z, y or x (an asymmetric echo), coil by coil.

    What was done is recorded in ``info.provenance["partial_fourier"]`` of the result. Symmetric k-space is returned as
    it came.

    Parameters
    ----------
    k_space
        Complete on the sampled side: undersampled data are filled after parallel imaging (`treat_image`), or left to a
        network, which knows the mask.
    method
        ``"zero"`` leaves zeros, at the price of resolution, with a `PartialFourierWarning`; the mask still tells what
        is missing. ``"homodyne"`` and ``"pocs"`` fill; the mask of the result is true where they did.

    Raises
    ------
    DataError
        If there is too little beyond the centre to estimate the phase, or (homodyne) more than one axis is one-sided.
    """
    _check(method)
    parts = find_partial_fourier(k_space.mask)
    if not parts:
        return k_space
    what = f"k-space holds {' and '.join(map(str, parts))}"
    data, mask = k_space.data, k_space.mask
    record, complaint = f"{what}: {_ZERO}", method == "zero"
    if method != "zero":
        image, how, complaint = _fill(data, mask, method)
        record = f"{what}: {how}"
        data, mask = torch.where(mask, data, fft(image)), torch.ones_like(mask)
    if complaint:
        warnings.warn(f"{record}.", PartialFourierWarning, stacklevel=2)
    info = replace(k_space.info, provenance={**k_space.info.provenance, "partial_fourier": record})
    return replace(k_space, data=data, mask=mask, info=info)


@dataclass(frozen=True)
class Treated:
    """An image, and what was done about the missing side of its k-space.

    Attributes
    ----------
    image
        Shaped as the one that came.
    record
        In words; empty if no side is missing.
    warning
        Whether the image is less than it could be: zero-filled, or not converged.
    """

    image: torch.Tensor
    record: str = ""
    warning: bool = False


def treat_image(image: torch.Tensor, mask: torch.Tensor, method: Method | None) -> Treated:
    """Fill the k-space of an image that parallel imaging gave, where the scan was one-sided along z, y or x.

    Parameters
    ----------
    image
        Complex ``(batch, set, time, z, y, x)``.
    mask
        Sampling mask of the scan, ``(batch, 1, time, z, y, x)``, undersampled or not; an axis of size 1 is sampled
        alike everywhere.
    method
        As for `treat_partial_fourier`; no Python warning is given, the result says it. None: the image is from a
        network, which knew the mask; the result only says that.

    Raises
    ------
    DataError
        As for `treat_partial_fourier`.
    """
    if method is not None:
        _check(method)
    parts = find_partial_fourier(mask)
    if not parts:
        return Treated(image)
    what = f"k-space holds {' and '.join(map(str, parts))}"
    if method is None:
        return Treated(image, f"{what}: left to the network")
    if method == "zero":
        return Treated(image, f"{what}: {_ZERO}", warning=True)
    # Parallel imaging has filled the gaps between the outermost lines: that box is what there is.
    covered = torch.ones(1, 1, 1, *image.shape[3:], dtype=torch.bool, device=image.device)
    for part in parts:
        index = torch.arange(part.size, device=image.device)
        within = (index >= part.start) & (index < part.stop)
        covered = covered & within.view(-1, *[1] * (-part.axis - 1))
    filled, how, complaint = _fill(fft(image) * covered, covered, method)
    return Treated(filled, f"{what}: {how}", complaint)


_ZERO = "zero-filled, which blurs and may shade; homodyne or pocs would fill it"


def _check(method: str) -> None:
    if method not in METHODS:
        raise unknown("partial Fourier method", method, METHODS)


def _fill(k_space: torch.Tensor, mask: torch.Tensor, method: Method) -> tuple[torch.Tensor, str, bool]:
    """Image, how it was filled, and whether that did not quite succeed."""
    if method == "homodyne":
        return homodyne(k_space, mask), "filled by homodyne reconstruction", False
    result = pocs(k_space, mask)
    how = f"filled by {result.iterations} steps of POCS"
    if not result.converged:
        how += f", not converged (the last one changed the image by {result.change:.1e})"
    return result.image, how, not result.converged
