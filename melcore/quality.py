"""Figures that tell whether a reconstruction can be trusted, from the data alone, and the doubts that they raise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from melcore.defects import Residual
from melcore.physics import Sense
from melcore.preprocess.preparation import Prepared

# An image that fits the samples so much worse than their noise, and than CG-SENSE does, shows something else than was
# measured; and so a readout.
_WORST_FIT, _BEYOND_FIT = 1.5, 0.01
_WORST_LINE = 36.0
# Of the signal, explained by the coil maps.
_LEAST_IN_MAPS = 0.8
# How far beyond what a network was trained on it may go: it is local, so the matrix matters least.
_ACCELERATION_BEYOND, _MATRIX_BEYOND = 1.25, 4.0
_HARDLY_ACCELERATED = 1.1


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


def noise_part(prepared: Prepared) -> float:
    """``|noise| / |y|`` of the data: the `data_residual` of a perfect image."""
    data = prepared.k_space.data
    taken = prepared.k_space.mask.expand(data.shape[0], 1, *data.shape[2:]).sum(dim=(1, 2, 3, 4, 5)) * data.shape[1]
    energy = (taken * prepared.sigma.cpu().square()).sum()
    return math.sqrt(float(energy)) / float(data.norm())


def map_support(prepared: Prepared) -> float:
    """Fraction of the field of view in which signal was found; near 0 or 1 it tells of failed maps."""
    return float(prepared.support[:, 0].float().mean())


def acceleration(prepared: Prepared) -> float:
    """Samples of the full grid for each sample that was taken."""
    return 1.0 / float(prepared.k_space.mask.float().mean())


def departures(image: Sequence[Residual], cg_sense: Sequence[Residual]) -> list[str]:
    """How a network's image departs from the measurement, beyond the noise and beyond CG-SENSE; one line each.

    Parameters
    ----------
    image, cg_sense
        `melcore.defects.residuals` of both.
    """
    found = []
    for index, (ours, theirs) in enumerate(zip(image, cg_sense, strict=True)):
        where = f" (slice {index})" if len(image) > 1 else ""
        if ours.relative > _WORST_FIT * max(theirs.relative, ours.noise) + _BEYOND_FIT:
            found.append(
                f"the image departs from the measurement by {ours.relative:.1%}, CG-SENSE by {theirs.relative:.1%}, "
                f"the noise is {ours.noise:.1%}{where}"
            )
            continue
        worst = ours.lines / torch.maximum(theirs.lines, torch.ones(()))
        if bool((worst > _WORST_LINE).any()):
            place = tuple(ours.line_at[int(worst.argmax())].tolist())
            found.append(f"the image departs from the readout at {place} (time, z, y), which CG-SENSE fits{where}")
    return found


def doubts(figures: Mapping[str, float], prepared: Prepared, card: Mapping[str, Any]) -> list[str]:
    """Where data are unlike those that a network was trained on, or its maps fit them badly; one line each.

    Parameters
    ----------
    figures
        ``acceleration``, ``noise_part`` and ``signal_in_maps``.
    prepared
        The data.
    card
        Of the network's bundle: it says what the network was trained on. Contrast and field strength are not compared,
        for simulated training data have none.
    """
    found = []
    # Of noise, one image explains what one coil has.
    if figures["signal_in_maps"] < _LEAST_IN_MAPS - figures["noise_part"]:
        found.append(f"only {figures['signal_in_maps']:.0%} of the signal is explained by the coil maps")
    return found + _beyond_training(figures["acceleration"], prepared, card)


def _beyond_training(acceleration: float, prepared: Prepared, card: Mapping[str, Any]) -> list[str]:
    config = card.get("config", {})
    data = config.get("data", {})
    found = []
    rates = [rate for mask in data.get("masks", []) for rate in mask.get("acceleration") or []]
    if rates and acceleration > _ACCELERATION_BEYOND * max(rates):
        found.append(f"the acceleration is {acceleration:.1f}, but the network was trained for {max(rates):g} at most")
    # Those of the array: how many virtual ones rise above the noise says nothing of the training. Without acceleration
    # the coils need not encode anything.
    coils, most = prepared.mixing.shape[2], config.get("preparation", {}).get("coils")
    if "coils" in data and acceleration > _HARDLY_ACCELERATED:
        least = min(data["coils"][0], most or data["coils"][0])
        if coils < least:
            found.append(f"there are {coils} coils, but the network was trained with {least} at least")
    for axis, size in zip("zyx", prepared.k_space.data.shape[-3:], strict=True):
        low, high = data.get(axis, (size, size))
        if not low / _MATRIX_BEYOND <= size <= high * _MATRIX_BEYOND:
            found.append(f"the matrix has {size} samples along {axis}, but the network was trained on {low} to {high}")
    return found
