"""From an image to the k-space that a scanner would have measured of it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from melcore import layout
from melcore.data import Image, KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, ShapeError
from melcore.physics.fourier import fft
from melcore.simulate.noise import complex_noise, correlated_noise


class Simulation(NamedTuple):
    """A simulated scan, and the image that it should give, in the units of its k-space."""

    k_space: KSpace
    truth: Image


def scale_to_snr(image: Tensor, snr: float) -> Tensor:
    """Scale an image so that noise of standard deviation 1 in each part gives this signal-to-noise ratio.

    The signal is the mean magnitude of what is brighter than a tenth of the maximum. With maps of unit sum of squares
    and whitened k-space, the fully sampled, coil-combined image has exactly this noise.
    """
    if not 0 < snr < math.inf:
        raise ConfigError(f"the signal-to-noise ratio must be positive and finite, but is {snr}.")
    magnitude = image.abs()
    signal = magnitude[magnitude > 0.1 * magnitude.max()]
    if signal.numel() == 0:
        raise ShapeError("an image without signal cannot be scaled to a signal-to-noise ratio.")
    return image * (snr / signal.mean())


def simulate_k_space(
    image: Tensor,
    coil_maps: Tensor,
    mask: Tensor,
    *,
    snr: float | None,
    covariance: Tensor | None = None,
    seed: int,
) -> Simulation:
    """Measure an image.

    Parameters
    ----------
    image
        Complex ``(time, z, y, x)`` or ``(batch, 1, time, z, y, x)``.
    coil_maps
        Complex ``(coil, z, y, x)`` or ``(batch, 1, coil, 1, z, y, x)``, with unit sum of squares over the coils.
    mask
        Boolean; broadcasts against ``(batch, coil, time, z, y, x)`` (`melcore.preprocess.masks.k_space_mask`).
    snr
        Of the fully sampled image, see `scale_to_snr`, which is applied to each example of the batch; None: no noise
        and no scaling.
    covariance
        None: white noise of complex variance 2, which is what whitening makes of measured noise (Gadgetron's
        convention). Else ``(coil, coil)``: noise with twice this covariance, to be whitened.
    seed
        Of the noise.

    Returns
    -------
    Simulation
        k-space with zeros where `mask` is false, and the scaled image.
    """
    image = image.reshape(1, 1, *image.shape) if image.ndim == 4 else image
    maps = coil_maps.reshape(1, 1, len(coil_maps), 1, *coil_maps.shape[1:]) if coil_maps.ndim == 4 else coil_maps
    layout.check_axes(tuple(image.shape), layout.IMAGE_AXES, "the image")
    layout.check_axes(tuple(maps.shape), layout.COIL_MAPS_AXES, "coil maps")
    if image.shape[1] != 1 or maps.shape[1] != 1 or image.shape[3:] != maps.shape[4:]:
        raise ShapeError(
            f"coil maps {tuple(maps.shape)} do not fit the image {tuple(image.shape)}, or have several sets."
        )
    if snr is not None:
        image = torch.stack([scale_to_snr(example, snr) for example in image])
    k_space = fft(maps[:, 0] * image[:, 0].unsqueeze(1))
    if snr is not None:
        generator = torch.Generator().manual_seed(seed)
        batch, coils, *rest = k_space.shape
        if covariance is None:
            noise = complex_noise(tuple(k_space.shape), generator)
        else:
            noise = correlated_noise((coils, batch, *rest), 2 * covariance, generator).transpose(0, 1)
        k_space = k_space + noise
    grid = tuple(image.shape[3:])
    info = ScanInfo(
        encoded_matrix=(grid[0], grid[1], grid[2]),
        recon_matrix=(grid[0], grid[1], grid[2]),
        provenance={"simulated": f"snr {snr}, seed {seed}"},
    )
    treated = Noise(whitened=covariance is None, source="simulated")
    return Simulation(KSpace(k_space * mask, mask, info, treated), Image(image, info))
