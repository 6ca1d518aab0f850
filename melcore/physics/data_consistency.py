"""Data consistency: the regularised least-squares problem of MoDL and ADMM, with gradients that cost little memory.

Differentiating conjugate gradients by autograd keeps five images for each step. The recursion itself allows less: the
search directions ``p_i`` alone determine the residuals, ``r_{i+1} = p_{i+1} - b_i p_i``, and these the images of the
directions, ``q_i = (r_i - r_{i+1}) / a_i``; neither loses digits, because residuals of neighbouring steps are
orthogonal. So the exact gradient of the truncated iterations keeps one image for each step, and applies the normal
operator as often as the forward does.

Hestenes and Stiefel, J Res NBS 49:409 (1952); implicit gradients: Aggarwal et al., IEEE Trans Med Imaging 38:394
(2019).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from melcore.errors import ConfigError, MelError
from melcore.physics.conjugate_gradient import conjugate_gradient
from melcore.physics.inner_product import inner_product

GradientMode = Literal["exact", "implicit"]
Normal = Callable[[Tensor], Tensor]


class ConvergenceWarning(UserWarning):
    """A solver stopped before it reached its tolerance where the result relies on it."""


def data_consistency(
    normal: Normal,
    adjoint_data: Tensor,
    z: Tensor,
    mu: Tensor,
    *,
    unit: Tensor | None = None,
    max_iterations: int,
    relative_tolerance: float = 0.0,
    gradient: GradientMode = "exact",
) -> Tensor:
    """Minimise ``|A x - y|^2 + mu |x - unit z|^2`` by conjugate gradients that begin at ``unit z``.

    Parameters
    ----------
    normal
        ``A^H A``, self-adjoint.
    adjoint_data
        ``A^H y``, complex ``(batch, ...)``.
    z, mu
        Where the solution is drawn to, shaped as `adjoint_data`, and how strongly: a positive tensor, a scalar or one
        number for each element of the batch, ``(batch, 1, ...)``.
    unit
        What `z` is measured in, ``(batch, 1, ...)`` and not differentiated; 1 by default. Scaling here costs no image.
    max_iterations, relative_tolerance
        As for `melcore.physics.conjugate_gradient`.
    gradient
        ``"exact"``: of the iterations as they are executed, truncated or not. ``"implicit"``: of the exact solution, by
        a second solve; it is right only if both solves converge, and a `ConvergenceWarning` gives the residuals
        if they do not (at 10 iterations and mu 0.05 it was seen to be 35 % off).

    Returns
    -------
    Tensor
        The solution; differentiable once with respect to `adjoint_data`, `z` and `mu`.
    """
    if gradient == "exact":
        return _Truncated.apply(adjoint_data, z, mu, unit, normal, max_iterations, relative_tolerance)
    if gradient != "implicit":
        raise ConfigError(f"gradients of data consistency are exact or implicit, not {gradient!r}.")
    if relative_tolerance <= 0:
        raise ConfigError("implicit gradients need a relative_tolerance > 0 for their solves, for example 1e-5.")
    return _Implicit.apply(
        adjoint_data, z if unit is None else z * unit, mu, normal, max_iterations, relative_tolerance
    )


def _add(target: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """``target += factor * addend`` without a temporary; the factor is a real number for each batch element."""
    return target.addcmul_(addend, factor.to(addend.dtype))


def _residual(directions: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], index: int) -> Tensor:
    """Residual before step `index`, which its search direction and the one before determine."""
    if index == 0:
        return directions[0].clone()
    factor = -rows[index - 1][1]
    return torch.addcmul(directions[index], directions[index - 1], factor.to(directions[index].dtype))


def _shaped(gradient: Tensor, mu: Tensor) -> Tensor:
    """The gradient of a weight from one number for each element of the batch."""
    total = gradient.sum() if mu.numel() == 1 else gradient
    return total.reshape(mu.shape).to(mu.dtype)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise MelError(
            "data consistency has first derivatives only, but its backward was asked for a graph of its own "
            "(create_graph=True): differentiate melcore.physics.conjugate_gradient to go twice."
        )


class _Truncated(torch.autograd.Function):
    """The iterations as they are executed; keeps the search directions, the last residual, and scalars."""

    @staticmethod
    def forward(
        ctx: Any,
        adjoint_data: Tensor,
        z: Tensor,
        mu: Tensor,
        unit: Tensor | None,
        normal: Normal,
        max_iterations: int,
        tolerance: float,
    ) -> Tensor:
        record = any(ctx.needs_input_grad[:3])
        x = z.clone() if unit is None else z * unit
        residual = adjoint_data - normal(x)  # mu x cancels
        direction = residual.clone()
        energy = inner_product(residual, residual)
        limit = torch.zeros_like(energy)
        if tolerance > 0:
            rhs = adjoint_data + mu * x
            limit = tolerance**2 * inner_product(rhs, rhs)
            del rhs
        directions, scalars = [], []
        for _ in range(max_iterations):
            active = energy > limit
            if tolerance > 0 and not bool(active.any()):
                break
            applied = normal(direction)
            _add(applied, mu, direction)
            # Elements of the batch that are done take steps of length zero; the divisor 1 keeps them finite.
            curvature = torch.where(active, inner_product(direction, applied), 1.0)
            step = torch.where(active, energy, 0.0) / curvature
            _add(x, step, direction)
            _add(residual, -step, applied)
            del applied
            new_energy = inner_product(residual, residual)
            ratio = new_energy / torch.where(energy > 0, energy, 1.0)
            if record:
                directions.append(direction)
                scalars += [step, ratio, curvature, energy, active]
                direction = torch.addcmul(residual, direction, ratio.to(direction.dtype))
            else:
                direction.mul_(ratio).add_(residual)
            energy = new_energy
        ctx.normal, ctx.unit = normal, unit
        if record:
            ctx.save_for_backward(mu, residual, *directions, *scalars)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (gradient,) = gradients
        mu, last, *rest = ctx.saved_tensors
        count = len(rest) // 6
        directions, scalars = rest[:count], rest[count:]
        rows = [scalars[5 * i : 5 * i + 5] for i in range(count)]
        to_residual, to_direction = torch.zeros_like(gradient), torch.zeros_like(gradient)
        to_energy = torch.zeros_like(rows[0][3]) if rows else gradient.real.new_zeros(())
        to_mu = torch.zeros_like(to_energy)
        for index in range(count - 1, -1, -1):
            direction, (step, ratio, curvature, energy, active) = directions[index], rows[index]
            earlier_energy = torch.zeros_like(energy)
            if index < count - 1:
                to_ratio = inner_product(to_direction, direction)
                to_residual += to_direction
                to_direction *= ratio
                safe = torch.where(energy > 0, energy, 1.0)
                to_energy = to_energy + to_ratio / safe
                earlier_energy = torch.where(energy > 0, -to_ratio * ratio / safe, 0.0)
            # Residuals are made of directions when they are wanted, so that none waits while the operator works.
            after = last if index == count - 1 else _residual(directions, rows, index + 1)
            _add(to_residual, 2 * to_energy, after)
            applied = _residual(directions, rows, index)
            applied -= after
            applied *= torch.where(active, 1 / torch.where(active, step, 1.0), 0.0)
            del after
            to_step = torch.where(active, inner_product(gradient, direction) - inner_product(to_residual, applied), 0.0)
            _add(to_direction, step, gradient)
            to_energy = earlier_energy + to_step / curvature
            to_curvature = -to_step * step / curvature
            _add(to_direction, to_curvature, applied)
            to_applied = torch.mul(direction, to_curvature, out=applied)
            del applied
            _add(to_applied, -step, to_residual)
            to_mu = to_mu + inner_product(to_applied, direction)
            _add(to_direction, mu, to_applied)
            to_direction += ctx.normal(to_applied)
            del to_applied
        to_residual += to_direction
        if count:
            _add(to_residual, 2 * to_energy, _residual(directions, rows, 0))
        del to_direction
        to_z = ctx.normal(to_residual).neg_().add_(gradient)
        if ctx.unit is not None:
            to_z *= ctx.unit.conj()
        return to_residual, to_z, _shaped(to_mu, mu), None, None, None, None


class _Implicit(torch.autograd.Function):
    """The exact solution: its gradient is another solve with the same operator."""

    @staticmethod
    def forward(
        ctx: Any, adjoint_data: Tensor, z: Tensor, mu: Tensor, normal: Normal, max_iterations: int, tolerance: float
    ) -> Tensor:
        ctx.solve = _Solve(normal, mu.detach(), max_iterations, tolerance)
        x = ctx.solve("forward", adjoint_data + mu * z, z)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(mu, z, x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        mu, z, x = ctx.saved_tensors
        to_rhs = ctx.solve("backward", gradients[0], None)
        to_mu = _shaped(inner_product(to_rhs, z - x), mu)
        return to_rhs, mu * to_rhs, to_mu, None, None, None


class _Solve:
    """Conjugate gradients that warn where they did not converge."""

    def __init__(self, normal: Normal, mu: Tensor, max_iterations: int, tolerance: float) -> None:
        self.normal, self.mu, self.max_iterations, self.tolerance = normal, mu, max_iterations, tolerance

    def __call__(self, which: str, rhs: Tensor, initial: Tensor | None) -> Tensor:
        solution = conjugate_gradient(
            lambda v: self.normal(v) + self.mu * v,
            rhs,
            initial=initial,
            relative_tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        if not solution.converged:
            warnings.warn(
                f"the {which} solve of an implicit gradient stopped after {solution.iterations} iterations at a "
                f"relative residual of {float(solution.residual.max()):.1e}, above its tolerance {self.tolerance:.1e}: "
                "the gradient is off by about as much as that times the condition number. Allow more iterations, or "
                'use gradient="exact".',
                ConvergenceWarning,
                stacklevel=2,
            )
        return solution.value
