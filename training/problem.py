"""An example as a training step or a validation needs it on the device: k-space and what made the maps stay behind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.errors import DataError
from melcore.physics import Sense
from melcore.preprocess.preparation import cg_sense, cg_sense_weight
from melcore.unrolled import Encoding
from training.example import Example, window_readout


@dataclass(frozen=True)
class HeldOut:
    """Samples that the model does not see, on which it is judged where there is no truth.

    Attributes
    ----------
    operator
        From images to those samples.
    k_space
        The samples, zero elsewhere, ``(batch, coil, time, z, y, x)``.
    """

    operator: Sense
    k_space: Tensor


@dataclass(frozen=True)
class Problem:
    """What a model starts from, and what it should give.

    Attributes
    ----------
    encoding
        The operator, its adjoint applied to the data, and the noise level that the model is told.
    initial
        Start image, ``(batch, set, time, z, y, x)``.
    target
        What the image should be, of the same shape; None for data that have no truth.
    support
        Where the maps are not zero, ``(batch, set, 1, z, y, x)``.
    sigma
        The noise level as it is, ``(batch,)``.
    held_out
        What judges an image without a truth; see `training.self_supervision`.
    """

    encoding: Encoding
    initial: Tensor
    target: Tensor | None
    support: Tensor
    sigma: Tensor
    held_out: HeldOut | None = None
    prior: Tensor | None = None  #: of CG-SENSE, see `melcore.preprocess.preparation.Prepared`

    @property
    def truth(self) -> Tensor:
        """The target, where there is one."""
        assert self.target is not None
        return self.target

    def cg_sense(self, iterations: int = 60, weight: float | None = None) -> Tensor:
        """The product's CG-SENSE, frame by frame; its weight follows the noise unless another one is given."""
        operator = self.encoding.operator
        chosen = cg_sense_weight(self.sigma, operator.acceleration)
        if weight is not None:
            chosen = torch.full_like(self.sigma, weight)
        with torch.no_grad():
            return cg_sense(operator, self.encoding.adjoint_data, chosen, prior=self.prior, iterations=iterations)


def place(
    example: Example, device: torch.device | None = None, factor: complex = 1, *, sigma_factor: float = 1
) -> Problem:
    """Bring an example to a device (by default where it is), multiplied by a factor.

    On the device exist the coil maps once, the mask, and three images; k-space passes by coil for coil. That is what
    `melcore.unrolled.plan` counts.

    Parameters
    ----------
    example, device
        What, and where.
    factor
        Multiplies k-space, start image and truth, and by its magnitude the noise level.
    sigma_factor
        By how much the noise level that the model is told is wrong.
    """
    prepared = example.prepared
    support = example.support
    device = device or prepared.initial.device
    operator = prepared.operator().to(device)  # made on the host, where there is room for what making it takes
    adjoint_data = operator.adjoint(prepared.k_space.data) * factor
    initial = (prepared.initial * factor).to(device)
    target = None if example.truth is None else (example.truth * factor).to(device)
    sigma = prepared.sigma.to(device) * abs(factor)
    encoding = Encoding(operator, adjoint_data, sigma * sigma_factor)
    return Problem(encoding, initial, target, support.to(device), sigma, prior=prepared.prior.to(device) * abs(factor))


def check_layout(example: Example, dimensions: str, sets: int, name: str) -> None:
    """Raise `DataError` if an example is not of the layout that a model is for; `name` says which one it is."""
    found_sets, frames, slices = example.prepared.initial.shape[1:4]
    wrong = ""
    if found_sets != sets:
        wrong = f"{found_sets} map sets, but the model is for {sets}"
    elif frames > 1 and not dimensions.endswith("+t"):
        wrong = f"{frames} frames, but the model is for {dimensions}"
    elif slices > 1 and not dimensions.startswith("3d"):
        wrong = f"{slices} slices, but the model is for {dimensions}"
    elif slices == 1 and dimensions.startswith("3d"):
        wrong = f"a single slice, but the model is for {dimensions}"
    if wrong:
        raise DataError(f"example {name} has {wrong}: take it out of the data, or train a model for it.")


def crop(example: Example, window: int | None, generator: torch.Generator | None = None) -> Example:
    """A window of the readout, at a random place or, without a generator, in the middle; all of it if None or short."""
    size = example.prepared.initial.shape[-1]
    if window is None or window >= size:
        return example
    rest = size - window
    start = rest // 2 if generator is None else int(torch.randint(rest + 1, (), generator=generator))
    return window_readout(example, start, window)
