"""One unrolled iteration: pure mathematics, cut where the learned part begins and ends.

Every scheme is ``after(regulariser(before(state)))``: what precedes the learned regulariser, and what follows it.
Memory executors need only this cut: the regulariser holds nearly all activations, the rest holds the physics.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from melcore.errors import ShapeError
from melcore.networks import Regulariser
from melcore.physics import LinearOperator

State = tuple[Tensor, ...]


# Noise of one unit is a fifth of a network's unit of intensity: images of usual noise are then of order one there.
_NOISE_UNITS = 5.0


@dataclass(frozen=True)
class Encoding:
    """The measurement, as a scheme needs it: the operator, its adjoint applied to the data, and the noise level.

    k-space itself is not needed: the gradient of the data term is ``operator.normal(x) - adjoint_data``.

    Attributes
    ----------
    operator
        From images ``(batch, set, time, z, y, x)`` to k-space.
    adjoint_data
        ``operator.adjoint(k_space)``, an image.
    sigma
        Noise level, real and positive, ``(batch,)`` or ``(1,)``: standard deviation of the complex noise of one
        whitened sample, in units of the scaled image.
    phase
        Global phase of the image, a complex number of magnitude 1 for each element of the batch, shaped
        ``(batch, 1, 1, 1, 1, 1)``. By default that of `adjoint_data`, weighted towards what is bright.

    Raises
    ------
    ShapeError
        If `sigma` is not one number for each element of the batch.
    """

    operator: LinearOperator
    adjoint_data: Tensor
    sigma: Tensor
    phase: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sigma.shape not in ((1,), self.adjoint_data.shape[:1]):
            raise ShapeError(
                f"the noise level has the shape {tuple(self.sigma.shape)}, but images {tuple(self.adjoint_data.shape)} "
                f"need one number for each element of the batch: give a tensor of {self.adjoint_data.shape[0]} numbers."
            )
        if self.phase is None:
            object.__setattr__(self, "phase", _global_phase(self.adjoint_data.detach()))

    @property
    def network_unit(self) -> Tensor:
        """What a learned regulariser takes for one: five times the noise level, turned by the global phase.

        A network ``N`` applied as ``unit * N(x / unit)`` sees how far an image rises above the noise; scaling or
        turning image and noise together scales or turns its result exactly. Shaped ``(batch, 1, 1, 1, 1, 1)``.
        """
        assert self.phase is not None
        return self.phase * (_NOISE_UNITS * self.sigma).view(-1, 1, 1, 1, 1, 1).to(self.phase.real.dtype)


def _global_phase(image: Tensor) -> Tensor:
    """Phase of the sum of an image, each sample weighted by its magnitude; 1 where the sum vanishes."""
    total = image.abs().mul(image).sum(dim=tuple(range(1, image.ndim)), keepdim=True)
    magnitude = total.abs()
    return torch.where(magnitude > 0, total / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny), 1.0)


class Iteration(nn.Module, ABC):
    """One iteration of a scheme. Its state is a tuple of images, the reconstruction first."""

    regulariser: Regulariser

    def start(self, initial: Tensor, encoding: Encoding) -> State:  # noqa: ARG002
        """State before the first iteration, from an initial image."""
        return (initial,)

    @abstractmethod
    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """The regulariser's input, and what `after` needs of the state."""

    @abstractmethod
    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """The next state, from the regulariser's output and what `before` passed on."""

    def forward(self, state: State, encoding: Encoding) -> State:
        """The next state."""
        x, carry = self.before(state, encoding)
        return self.after(self.regulariser(x), carry, encoding)
