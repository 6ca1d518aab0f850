"""What to do about k-space of which one side was not acquired: fill it, or leave it and say so."""

import warnings
from dataclasses import replace
from typing import Literal

import torch

from melcore.data import KSpace
from melcore.errors import unknown
from melcore.physics import PartialFourierWarning, fft, find_partial_fourier, homodyne, pocs

Method = Literal["zero", "homodyne", "pocs"]


def treat_partial_fourier(k_space: KSpace, method: Method) -> KSpace:
    """Fill k-space that is one-sided along z, y or x (an asymmetric echo), coil by coil.

    What was done is recorded in ``info.provenance["partial Fourier"]`` of the result. Symmetric k-space is returned as
    it came.

    Parameters
    ----------
    k_space
        Complete on the sampled side: undersampled data are filled after parallel imaging, by `melcore.physics.homodyne`
        or `melcore.physics.pocs` of the image's k-space, or left to a network, which knows the mask.
    method
        ``"zero"`` leaves zeros, at the price of resolution, with a `PartialFourierWarning`; the mask still tells what
        is missing. ``"homodyne"`` and ``"pocs"`` fill; the mask of the result is true where they did.

    Raises
    ------
    DataError
        If there is too little beyond the centre to estimate the phase, or (homodyne) more than one axis is one-sided.
    """
    if method not in ("zero", "homodyne", "pocs"):
        raise unknown("partial Fourier method", method, ("zero", "homodyne", "pocs"))
    parts = find_partial_fourier(k_space.mask)
    if not parts:
        return k_space
    what = f"k-space holds {' and '.join(map(str, parts))}"
    data, mask = k_space.data, k_space.mask
    if method == "zero":
        record = f"{what}: zero-filled, which blurs and may shade; homodyne or pocs would fill it"
        warnings.warn(f"{record}.", PartialFourierWarning, stacklevel=2)
    else:
        if method == "homodyne":
            image, record = homodyne(data, mask), f"{what}: filled by homodyne reconstruction"
        else:
            result = pocs(data, mask)
            image, record = result.image, f"{what}: filled by {result.iterations} steps of POCS"
            if not result.converged:
                record += f", not converged (the last one changed the image by {result.change:.1e})"
                warnings.warn(f"{record}.", PartialFourierWarning, stacklevel=2)
        data, mask = torch.where(mask, data, fft(image)), torch.ones_like(mask)
    info = replace(k_space.info, provenance={**k_space.info.provenance, "partial Fourier": record})
    return replace(k_space, data=data, mask=mask, info=info)
