"""Figures that tell whether a reconstruction can be trusted, computed from the data alone."""

import torch

from melcore.physics import Sense
from melcore.preprocess.preparation import Prepared


def data_residual(image: torch.Tensor, prepared: Prepared) -> float:
    """``|A x - y| / |y|`` over the samples: how far the image is from the measurement, noise included.

    Parameters
    ----------
    image
        Scaled image ``(batch, set, time, z, y, x)``.
    prepared
        The data that it was made from.
    """
    operator: Sense = prepared.operator().to(image.device)
    measured = prepared.k_space.data.to(image.device)
    return float((operator(image) - measured).norm() / measured.norm())


def map_support(prepared: Prepared) -> float:
    """Fraction of the field of view in which the coil maps are not zero; near 0 or 1 it tells of failed maps."""
    return float((prepared.coil_maps.data.abs().sum(2) > 0).float().mean())


def acceleration(prepared: Prepared) -> float:
    """Samples of the full grid for each sample that was taken."""
    return 1.0 / float(prepared.k_space.mask.float().mean())
