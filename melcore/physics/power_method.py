"""The largest eigenvalue of a normal operator, hence the operator's norm, by repeated application.

Golub and Van Loan, Matrix Computations, 4th edition, section 8.2 (2013).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.physics.inner_product import inner_product


@dataclass(frozen=True)
class Eigenvalue:
    """What `power_method` found, each ``(batch,)``.

    Attributes
    ----------
    value
        Estimate of the largest eigenvalue, never above it (but for rounding). The norm of an operator is the square
        root of that of its normal operator.
    residual
        ``|normal(v) - value v| / value`` for the unit vector ``v`` reached: an eigenvalue lies that close to `value`,
        relatively.
    iterations
        Applications of the operator.
    converged
        Whether every element reached the tolerance.
    """

    value: Tensor
    residual: Tensor
    iterations: int
    converged: bool


@torch.no_grad()
def power_method(
    normal: Callable[[Tensor], Tensor], like: Tensor, *, iterations: int = 100, relative_tolerance: float = 0.01
) -> Eigenvalue:
    """Estimate the largest eigenvalue of a self-adjoint positive semidefinite `normal`, for each element of the batch.

    Parameters
    ----------
    normal
        The operator; elements of the batch (the first axis) are independent systems.
    like
        A tensor of the operator's shape, dtype and device; its values are not used. The start is random, always the
        same, and the same for each element of the batch.
    iterations
        Stop in any case after so many applications. Not having converged is told in the result, not raised.
    relative_tolerance
        Stop when the relative residual is below. The error of `value` is then mostly far smaller: it is of the
        order of the residual's square over the gap to the next eigenvalue.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(
        like.shape[1:], generator=generator, dtype=torch.complex128 if like.is_complex() else torch.float64
    )
    vector = vector.to(like.device, like.dtype).expand_as(like)
    value = residual = torch.zeros_like(inner_product(vector, vector))
    done, count = torch.zeros_like(value, dtype=torch.bool), 0
    while count < iterations and not bool(done.all()):
        size = inner_product(vector, vector).sqrt()
        # An operator that is zero maps to the vector zero: its eigenvalue is 0, and nothing is divided by 0.
        vector = vector / torch.where(size > 0, size, 1.0)
        applied = normal(vector)
        value = inner_product(vector, applied)
        error = applied - value * vector
        residual = inner_product(error, error).sqrt() / torch.where(value > 0, value, 1.0)
        done = residual <= relative_tolerance
        vector = applied
        count += 1
    return Eigenvalue(value.flatten(), residual.flatten(), count, bool(done.all()))
