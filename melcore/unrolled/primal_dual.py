"""Learned primal-dual: the steps of the best classical methods, with learned filters, thresholds and step sizes.

Condat, A primal-dual splitting method for convex optimization, J Optim Theory Appl 158:460 (2013); Vu, Adv Comput Math
38:667 (2013); unrolled: Adler and Oektem, Learned primal-dual reconstruction, IEEE Trans Med Imaging 37:1322 (2018).
"""

import math

import torch
from torch import Tensor, nn

from melcore.networks import Shrinkage
from melcore.unrolled.iteration import Encoding, Iteration, State


class PrimalDual(Iteration):
    """``u = clip(u + s W z)``; ``x' = x - t (A^H A x - A^H y + W^H u)``; ``z = x' + r (x' - x)``.

    With fixed thresholds these steps minimise ``|A x - y|^2 / 2 + sum over filters of |threshold * W x|_1``, without
    inner iterations. Untrained, the filters are discrete cosines and the thresholds follow the noise: a classical
    reconstruction, so that training begins from a good image. The state is the image, the stack of dual variables that
    `melcore.networks.Shrinkage` describes, and the extrapolated image ``z``.

    Everything depends on magnitudes alone, so a global phase of the data turns the result exactly.

    Parameters
    ----------
    regulariser
        The dual step.
    step, relaxation
        Initial ``t`` and ``r``. With ``|A| <= 1`` and ``|W| <= 1`` the classical steps converge where
        ``1 / t - s >= 1 / 2``.
    """

    regulariser: Shrinkage

    def __init__(self, regulariser: Shrinkage, *, step: float = 1.0, relaxation: float = 1.0) -> None:
        super().__init__()
        self.regulariser = regulariser
        self.log_step = nn.Parameter(torch.tensor(math.log(step)))
        self.relaxation = nn.Parameter(torch.tensor(relaxation))

    def start(self, initial: Tensor, encoding: Encoding) -> State:
        """See `Iteration.start`."""
        rows = to_rows(initial)
        stack = rows.new_zeros((*rows.shape[:3], self.regulariser.channels, *rows.shape[4:]))
        rate = torch.full_like(encoding.sigma, encoding.operator.acceleration)
        for channel, value in ((-2, encoding.sigma.log()), (-1, rate.log())):
            each = value.to(rows.dtype).expand(len(initial)).repeat_interleave(len(rows) // len(initial))
            stack[:, :, :, channel] = each.view(-1, 1, 1, 1, 1)
        return initial, stack, initial

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:  # noqa: ARG002
        """See `Iteration.before`."""
        x, stack, extrapolated = state
        return torch.cat([to_rows(extrapolated), stack[:, :, :, 1:]], dim=3), (x,)

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """See `Iteration.after`."""
        (x,) = carry
        gradient = encoding.operator.normal(x) - encoding.adjoint_data + from_rows(regularised[:, :, :, :1], x.shape)
        moved = x - self.log_step.exp() * gradient
        return moved, regularised, moved + self.relaxation * (moved - x)


def to_rows(image: Tensor) -> Tensor:
    """Complex ``(batch, set, time, z, y, x)`` to real ``(batch set 2, time, z, 1, y, x)``."""
    return torch.view_as_real(image.resolve_conj()).movedim(-1, 2).flatten(0, 2)[:, :, :, None]


def from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `to_rows`, for images of such a shape."""
    parts = rows[:, :, :, 0].unflatten(0, (*shape[:2], 2)).movedim(2, -1)
    return torch.view_as_complex(parts.contiguous())
