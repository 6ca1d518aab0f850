"""The regulariser as one piece, differentiated by autograd: works for any module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from melcore.memory.protocols import Gradients


class Whole:
    """All activations of one regulariser exist at once, and of one regulariser only."""

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        return regulariser(x), ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],  # noqa: ARG002
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = regulariser(leaf)
        found: list[Tensor | None] = list(torch.autograd.grad(output, [leaf, *parameters], gradient, allow_unused=True))
        return found[0], found[1:]
