"""What a training minimises on one example: its loss, relative to what CG-SENSE reaches with the same data."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from melcore.learning import ReconstructionLoss
from training.config import Config
from training.example import Example
from training.problem import HeldOut, Problem, crop, place
from training.schedule import random_factor, sigma_factor
from training.self_supervision import divide, held_out_terms

# Steps of conjugate gradients of the reference: its error, not its last digit, is what losses are divided by.
_REFERENCE_ITERATIONS = 20
_LEAST = {"l1": 1e-4, "nrmse": 1e-4, "l2": 1e-8}


class Objective:
    """Makes problems of examples, and judges images of them.

    Parameters
    ----------
    config
        Its sections ``loss``, ``preparation`` and ``training``.
    device
        Where problems are placed.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.settings, self.device, self.config = config.loss, device, config
        self.preparation = config.to_preparation()
        volume = config.data.dimensions.startswith("3d")
        s = config.loss
        self.images = ReconstructionLoss(s.l1, s.l2, s.ssim, s.nrmse, dimensions=3 if volume else 2, region=s.region)

    def problem(self, example: Example, generator: torch.Generator, *, jitter: bool) -> Problem:
        """An example on the device, of random phase, scale and told noise level with `jitter`, or as it is."""
        training = self.config.training
        factor, wrong = complex(1), 1.0
        if jitter:
            factor = random_factor(training.scale_jitter, generator)
            wrong = sigma_factor(training.sigma_jitter, generator)
        if self.settings.self_supervised is None:
            return place(example, self.device, factor, sigma_factor=wrong)
        settings = self.settings.self_supervised
        return divide(example, settings, self.preparation, generator, self.device, factor, sigma_factor=wrong)

    def problems(self, examples: Sequence[Example]) -> Iterator[Problem]:
        """Problems for a validation, the same every time; of long readouts the middle."""
        for index in range(len(examples)):
            example = crop(examples[index], self.config.training.readout_window)
            yield self.problem(example, torch.Generator().manual_seed(index), jitter=False)

    def loss(self, image: Tensor, problem: Problem, divisors: Mapping[str, Tensor] | None) -> Tensor:
        """The loss of an image, a scalar; `divisors` are those of the problem."""
        if problem.held_out is None:
            return self.images(image, problem.truth, problem.support, divisors)
        terms = self._held_out(image, problem.held_out)
        total = image.real.new_zeros(())
        for name, value in terms.items():
            weighted = getattr(self.settings, name) * value
            total = total + (weighted if divisors is None else weighted / divisors[name])
        return total

    @torch.no_grad()
    def divisors(self, problem: Problem) -> Mapping[str, Tensor] | None:
        """What the terms of the loss are divided by: those of the image that the configuration compares with."""
        if self.settings.relative_to == "truth":
            return None
        # The start image that is begun from zero, with a weight for its noise, is the product's CG-SENSE.
        is_start = self.preparation.start == "zero" and self.preparation.start_weight is None
        if self.settings.relative_to == "start" or is_start:
            reference = problem.initial
        else:
            reference = problem.cg_sense(_REFERENCE_ITERATIONS)
        if problem.held_out is None:
            return self.images.divisors(reference, problem.truth, problem.support)
        terms = self._held_out(reference, problem.held_out)
        return {name: value.clamp(min=_LEAST[name]) for name, value in terms.items()}

    def _held_out(self, image: Tensor, held_out: HeldOut) -> dict[str, Tensor]:
        return {name: value for name, value in held_out_terms(image, held_out).items() if getattr(self.settings, name)}


def finite(example: Example) -> bool:
    """Whether all numbers of an example are."""
    p = example.prepared
    tensors = [p.k_space.data, p.coil_maps.data, p.initial, p.sigma]
    tensors += [] if example.truth is None else [example.truth]
    return all(math.isfinite(float(tensor.abs().sum())) for tensor in tensors)
