"""The inner product that solvers divide by: real, of each element of the batch, without a volume of products."""

import torch
from torch import Tensor

_PIECE = 1 << 22  # numbers; a product of whole volumes would be one more volume


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Real part of ``<a, b>`` over all axes but the first, shaped to broadcast against the arguments.

    Large ones are summed in pieces. Differentiable.
    """
    flat = [(torch.view_as_real(c.contiguous()) if c.is_complex() else c).flatten(1) for c in (a, b)]
    pieces = zip(*(c.split(_PIECE, dim=1) for c in flat), strict=True)
    total = torch.stack([(c * d).sum(dim=1) for c, d in pieces]).sum(dim=0)
    return total.view(-1, *[1] * (a.ndim - 1))
