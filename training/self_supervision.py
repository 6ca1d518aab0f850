"""Learning from undersampled data alone (SSDU): some samples are held out, and judge the image made from the others.

Yaman, Hosseini, Moeller, Ellermann, Ugurbil, Akcakaya: Self-supervised learning of physics-guided reconstruction
neural networks without fully sampled reference data, Magn Reson Med 84:3172 (2020).

Coil maps, scale and prior still come from all samples: the calibration region is sampled fully, and what is held out of
it would hardly change them. The start image is made again, for it would give the held-out samples away.
"""

from dataclasses import replace

import torch
from torch import Tensor

from melcore.errors import DataError
from melcore.physics import Sense
from melcore.preprocess.preparation import Preparation, start_image
from training.config import SelfSupervisionSettings
from training.example import Example
from training.problem import HeldOut, Problem, place


def split(mask: Tensor, fraction: float, centre: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples that the model sees, and samples that judge it: two masks without a common sample.

    Parameters
    ----------
    mask
        ``(batch, 1, time, z, y, x)``, sizes 1 where nothing depends on the axis.
    fraction
        Of the samples outside the centre that are held out.
    centre
        Samples around the centre along each axis of space that are never held out.
    generator
        Draws the split.

    Raises
    ------
    DataError
        If there are too few samples for both.
    """
    sampled = mask != 0
    free = sampled.clone()
    box = [slice(None)] * 3 + [_middle(size, centre) for size in mask.shape[3:]]
    free[tuple(box)] = False
    candidates = free.flatten().nonzero()[:, 0]
    count = round(fraction * len(candidates))
    if count == 0 or count == int(sampled.sum()):
        raise DataError(
            f"of {int(sampled.sum())} sampled positions, {count} would be held out: self-supervision needs some on "
            "either side; change loss.self_supervised."
        )
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    held_out = torch.zeros(sampled.numel(), dtype=torch.bool)
    held_out[chosen] = True
    held_out = held_out.view(sampled.shape)
    return sampled & ~held_out, held_out


def _middle(size: int, width: int) -> slice:
    """The centre of an axis; nothing is kept of an axis that nothing depends on, for that would be all of it."""
    if size == 1:
        return slice(None)
    start = max(size // 2 - width // 2, 0)
    return slice(start, start + width)


def divide(
    example: Example,
    settings: SelfSupervisionSettings,
    preparation: Preparation,
    generator: torch.Generator,
    device: torch.device | None = None,
    factor: complex = 1,
    *,
    sigma_factor: float = 1,
) -> Problem:
    """As `training.problem.place`, with samples held out; the truth is not used, if there is one."""
    prepared = example.prepared
    seen, held_out = split(prepared.k_space.mask, settings.fraction, settings.centre, generator)
    k_space = replace(prepared.k_space, data=prepared.k_space.data * seen, mask=seen)
    initial = start_image(k_space, prepared.coil_maps, prepared.sigma, preparation, prepared.prior)
    less = Example(replace(prepared, k_space=k_space, initial=initial), None)
    problem = place(less, device, factor, sigma_factor=sigma_factor)
    where = problem.initial.device
    operator = Sense(prepared.coil_maps.data, held_out, time=prepared.k_space.data.shape[2]).to(where)
    samples = (prepared.k_space.data * held_out * factor).to(where)
    return replace(problem, held_out=HeldOut(operator, samples))


def held_out_terms(image: Tensor, held_out: HeldOut) -> dict[str, Tensor]:
    """Error of an image's prediction of the held-out samples, relative to them, averaged over the batch.

    Returns
    -------
    dict of Tensor
        ``l1``, ``l2``, and ``nrmse``, the root of the latter.
    """
    error = (held_out.operator(image) - held_out.k_space).abs().flatten(1)
    size = held_out.k_space.abs().flatten(1)
    tiny = torch.finfo(size.dtype).tiny
    l1 = error.sum(1) / size.sum(1).clamp(min=tiny)
    l2 = error.square().sum(1) / size.square().sum(1).clamp(min=tiny)
    return {"l1": l1.mean(), "l2": l2.mean(), "nrmse": (l2 + 1e-12).sqrt().mean()}
