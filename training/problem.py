"""An example as a training step or a validation needs it on the device: k-space and what made the maps stay behind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.unrolled import Encoding
from training.data import Example


@dataclass(frozen=True)
class Problem:
    """What a model starts from, and what it should give.

    Attributes
    ----------
    encoding
        The operator, and its adjoint applied to the data.
    initial, truth
        Start image and target, ``(batch, set, time, z, y, x)``.
    support
        Where the maps are not zero, ``(batch, set, 1, z, y, x)``.
    """

    encoding: Encoding
    initial: Tensor
    truth: Tensor
    support: Tensor


def place(example: Example, device: torch.device | None = None, factor: complex = 1) -> Problem:
    """Bring an example to a device (by default where it is), multiplied by a factor.

    On the device exist the coil maps once, the mask, and three images; k-space passes by coil for coil. That is what
    `melcore.unrolled.plan` counts.
    """
    prepared = example.prepared
    support = example.support
    device = device or example.truth.device
    operator = prepared.operator().to(device)  # made on the host, where there is room for what making it takes
    adjoint_data = operator.adjoint(prepared.k_space.data) * factor
    initial, truth = ((image * factor).to(device) for image in (prepared.initial, example.truth))
    return Problem(Encoding(operator, adjoint_data), initial, truth, support.to(device))
