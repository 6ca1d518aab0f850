"""The linear operator: what every physical model in MEL is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from melcore.errors import ShapeError

Shape = tuple[int, ...]
Linear = Callable[[Tensor], Tensor]


class _Apply(torch.autograd.Function):
    """Apply a linear map and differentiate it by its adjoint: nothing is saved, to any order of differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Linear, adjoint: Linear) -> Tensor:
        ctx.maps = (adjoint, apply)  # `ctx.apply` is the engine's own
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Apply.apply(gradients[0], *ctx.maps), None, None


class LinearOperator(nn.Module, ABC):
    """A linear map between two shapes, and its adjoint.

    A subclass writes `_forward` and `_adjoint`, and may write `_normal` where the adjoint of the forward map is cheaper
    than its two parts. The public methods check shapes and make the adjoint the backward, so that differentiation
    stores no intermediate results. Gradients flow to the argument only: coil maps and trajectories are data.

    Parameters
    ----------
    domain, codomain
        Shapes of the arguments of `forward` and of `adjoint`.
    """

    def __init__(self, domain: Shape, codomain: Shape) -> None:
        super().__init__()
        self.domain, self.codomain = tuple(domain), tuple(codomain)

    @property
    def acceleration(self) -> float:
        """Samples of the full grid for each sample that is taken; 1 where that has no meaning."""
        return 1.0

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...

    def _normal(self, x: Tensor) -> Tensor:
        return self._adjoint(self._forward(x))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator: shape `domain` to shape `codomain`.

        Raises
        ------
        ShapeError
            If `x` has another shape.
        """
        self._check(x, self.domain, "forward")
        return _Apply.apply(x, self._forward, self._adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint: shape `codomain` to shape `domain`; `ShapeError` on any other."""
        self._check(y, self.codomain, "adjoint")
        return _Apply.apply(y, self._adjoint, self._forward)

    def normal(self, x: Tensor) -> Tensor:
        """Apply the adjoint of the forward map to the forward map, which is self-adjoint; keeps shape `domain`."""
        self._check(x, self.domain, "normal")
        return _Apply.apply(x, self._normal, self._normal)

    def extra_repr(self) -> str:
        """Shapes, from right to left as the operator acts."""
        return f"{list(self.codomain)} <- {list(self.domain)}"

    def _check(self, x: Tensor, expected: Shape, method: str) -> None:
        if tuple(x.shape) != expected:
            raise ShapeError(
                f"{type(self).__name__} [{list(self.codomain)} <- {list(self.domain)}]: "
                f"{method} expects the shape {expected}, but got {tuple(x.shape)}."
            )
