"""A regulariser of invertible blocks: the input of each is computed back from its output.

One block's activations exist at a time, and each block is computed a fixed number of times, whatever their number.
Computing back is exact only up to rounding, which may grow from block to block. So every result is certified: the image
that comes out at the front is compared with the one that went in, which is known, and where they differ by more than a
bound the gradient is computed again from kept activations, and a warning says so.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from melcore.memory.executors.whole import Whole
from melcore.memory.noise import draws_anew
from melcore.memory.protocols import Gradients


@runtime_checkable
class ReversibleLike(Protocol):
    """A chain of blocks, each with an ``inverse``."""

    blocks: nn.ModuleList


def why_not(regulariser: nn.Module) -> str | None:
    """Why a regulariser cannot be reversed, or None if it can."""
    blocks = regulariser.blocks if isinstance(regulariser, ReversibleLike) else ()
    if not blocks or not all(hasattr(block, "inverse") for block in blocks):
        return f"{type(regulariser).__name__} is not made of invertible blocks"
    if draws_anew(regulariser):
        return f"{type(regulariser).__name__} has dropout of its own, which would be drawn anew for every inversion"
    return None


class Reverse:
    """Blocks are undone one by one.

    Parameters
    ----------
    bound
        Largest relative error of the recovered input; by default the square root of the precision's epsilon, 3e-4 in
        single precision.
    """

    def __init__(self, bound: float | None = None) -> None:
        self.bound = bound

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        return regulariser(x), ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        assert isinstance(regulariser, ReversibleLike)
        sums: list[Tensor | None] = [None] * len(parameters)
        upstream = gradient
        with torch.no_grad():
            y = regulariser(x)
        for block in reversed(regulariser.blocks):
            with torch.no_grad():
                y = block.inverse(y)  # type: ignore[operator]
            with torch.enable_grad():
                leaf = y.requires_grad_()
                output = block(leaf)
            upstream, *found = torch.autograd.grad(output, [leaf, *parameters], upstream, allow_unused=True)
            del output
            y = leaf.detach()
            for index, value in enumerate(found):
                if value is not None:
                    total = sums[index]
                    sums[index] = value if total is None else total + value
        error = (y - x).norm() / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
        bound = self.bound if self.bound is not None else torch.finfo(x.dtype).eps ** 0.5
        if not bool(error <= bound):
            warnings.warn(
                f"a state computed back through {type(regulariser).__name__} was off by {float(error):.1e}, more than "
                f"{bound:.1e}: its gradient is computed from kept activations instead, which takes more memory.",
                stacklevel=2,
            )
            return Whole().vjp(regulariser, x, gradient, kept, parameters)
        return upstream, sums
