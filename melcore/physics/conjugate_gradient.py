"""Conjugate gradients that say whether they converged.

Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J Res NBS 49:409 (1952).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.errors import DataError, ShapeError
from melcore.physics.inner_product import inner_product


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes
    ----------
    value
        The solution, shaped as the right-hand side.
    iterations
        Applications of the normal operator after the start.
    residual
        ``|rhs - normal(value)| / |rhs|`` of each batch element, as the recursion tracked it.
    converged
        Whether every element reached the tolerance.
    """

    value: Tensor
    iterations: int
    residual: Tensor
    converged: bool


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    initial: Tensor | None = None,
    relative_tolerance: float = 1e-6,
    max_iterations: int = 100,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve ``normal(x) = rhs`` for a self-adjoint positive definite `normal`.

    Elements of the batch (the first axis) are independent systems: each has its own steps and stops on its own, so that
    the result does not depend on what else is in the batch. The iterations are differentiable as they are executed
    (the gradient of *truncated* conjugate gradients, not the implicit one).

    Parameters
    ----------
    normal
        The operator; applied once an iteration, and once more for an `initial` value.
    rhs
        Right-hand side, ``(batch, ...)``, real or complex.
    initial
        Where to begin; zero by default.
    relative_tolerance
        Stop when ``|residual| <= relative_tolerance * |rhs|``. Zero runs all `max_iterations`.
    max_iterations
        Stop in any case. Not having converged is told in the result, not raised.
    callback
        Called with (iteration, value, relative residual) after each iteration.
    preconditioner
        A self-adjoint positive definite approximation of the inverse of `normal`, which leaves the elements of the
        batch apart as `normal` does; applied once an iteration, and once before. It changes the number of iterations;
        convergence is still that of the plain residual.

    Raises
    ------
    ShapeError
        If `initial`, or what the preconditioner returns, is not shaped as `rhs`.
    DataError
        If the preconditioner shows that it is not positive definite.
    """
    if initial is not None and initial.shape != rhs.shape:
        raise ShapeError(
            f"initial {tuple(initial.shape)} and rhs {tuple(rhs.shape)} of conjugate_gradient differ in shape."
        )
    x = torch.zeros_like(rhs) if initial is None else initial
    residual = rhs if initial is None else rhs - normal(x)
    energy = inner_product(residual, residual)
    # A zero right-hand side has the solution zero: its norm is replaced, so that the residual is 0 and not NaN.
    scale = inner_product(rhs, rhs).detach()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    limit = relative_tolerance**2 * scale
    iterations = 0
    # Written so that NaN counts as not converged: it must reach the result, not stop the iterations unseen.
    active = ~(energy.detach() <= limit)
    direction, product = residual, energy
    if preconditioner is not None:
        direction, product = _precondition(preconditioner, residual, active)
    while iterations < max_iterations and bool(active.any()):
        applied = normal(direction)
        curvature = inner_product(direction, applied)
        # Elements that are done take steps of length zero; the divisor 1 keeps them finite, in the backward too.
        step = torch.where(active, product, 0.0) / torch.where(active, curvature, 1.0)
        x = x + step * direction
        residual = residual - step * applied
        energy = inner_product(residual, residual)
        iterations += 1
        active = active & ~(energy.detach() <= limit)
        prepared, new_product = residual, energy
        if preconditioner is not None:
            prepared, new_product = _precondition(preconditioner, residual, active)
        direction = prepared + new_product / torch.where(product > 0, product, 1.0) * direction
        product = new_product
        if callback is not None:
            callback(iterations, x, (energy.detach() / scale).sqrt().flatten())
    relative = (energy.detach() / scale).sqrt()
    return Solution(x, iterations, relative.flatten(), bool((energy.detach() <= limit).all()))


def _precondition(
    preconditioner: Callable[[Tensor], Tensor], residual: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """The preconditioned residual, and its inner product with the residual, which must be positive."""
    prepared = preconditioner(residual)
    if prepared.shape != residual.shape:
        raise ShapeError(
            f"the preconditioner of conjugate_gradient made {tuple(prepared.shape)} of {tuple(residual.shape)}."
        )
    product = inner_product(residual, prepared)
    if bool((active & (product.detach() <= 0)).any()):
        raise DataError(
            "the preconditioner of conjugate_gradient is not positive definite: its inner product with a residual is "
            f"{float(product.detach().min()):.3g}. Give it a positive definite approximation of the operator's inverse."
        )
    return prepared, product
