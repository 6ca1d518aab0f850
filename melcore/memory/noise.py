"""Random numbers inside regularisers: those that can be had for a piece of a volume, and those that cannot."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

_Dropout = torch.nn.modules.dropout._DropoutNd


class NoiseLike(Protocol):
    """Dropout as a function of the place in the features; see `melcore.networks.dropout.Noise`."""

    def layer(self, number: int, /) -> "NoiseLike":
        """The noise of a layer."""

    def part(self, axis: str, index: Sequence[int], /) -> "NoiseLike":
        """The noise at some positions of an axis, ``b t c z y`` or ``x``."""

    def drop_(self, features: Tensor, layout: Sequence[str], /) -> Tensor:
        """Drop samples in place; the layout names the axes that each dimension holds."""


def noise_of(regulariser: nn.Module, x: Tensor) -> NoiseLike | None:
    """The noise of one evaluation on `x`, drawn if the regulariser has dropout and is in training.

    Such a regulariser takes the noise, or a part of it, as its second argument, and so does each of its layers but the
    last. An executor draws it once in the forward and once in the backward, before anything else: the random state is
    then the same, and so is the noise.
    """
    draw = getattr(regulariser, "draw_noise", None)
    noise: NoiseLike | None = draw(x) if callable(draw) else None
    return noise


def draws_anew(regulariser: nn.Module) -> bool:
    """Whether some module drops samples as torch does, differently each time that it is called."""
    return any(isinstance(module, _Dropout) and module.training and module.p > 0 for module in regulariser.modules())
