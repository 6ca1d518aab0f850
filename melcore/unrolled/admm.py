"""Alternating direction method of multipliers with a learned proximal step.

Yang, Sun, Li, Xu, Deep ADMM-Net for compressive sensing MRI, NeurIPS 2016; in the scaled form of Boyd et al., Found
Trends Mach Learn 3:1 (2011).
"""

import torch
from torch import Tensor

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.networks.noise_curve import NoiseCurve, weight_of
from melcore.physics import GradientMode, data_consistency
from melcore.unrolled.iteration import Encoding, Iteration, State


class ADMM(Iteration):
    """``z = regulariser(x + u)``, ``u = u + x - z``, and ``x`` minimises ``|A x - y|^2 + rho |x - z + u|^2``.

    The regulariser works in units of the noise, and ``rho`` follows the noise, as in `melcore.unrolled.MoDL`. The state
    is ``(x, u)`` with the scaled dual variable ``u``, which starts at zero.

    Parameters
    ----------
    regulariser
        The learned proximal step.
    rho
        Initial penalty, in squares of the noise level, and at most 1, as `mu` of `melcore.unrolled.MoDL`.
    cg_iterations, relative_tolerance, gradient
        As for `melcore.unrolled.MoDL`; conjugate gradients begin from ``z - u``.
    """

    def __init__(
        self,
        regulariser: Regulariser,
        *,
        rho: float = 30.0,
        cg_iterations: int = 10,
        relative_tolerance: float = 0.0,
        gradient: GradientMode = "exact",
    ) -> None:
        super().__init__()
        if rho <= 0 or cg_iterations < 1:
            raise ConfigError(
                f"ADMM needs rho > 0 and cg_iterations >= 1, but got rho={rho}, cg_iterations={cg_iterations}."
            )
        self.regulariser = regulariser
        self.rho = NoiseCurve(1, lambda sigma: min(rho * sigma**2, 1.0))
        if gradient not in ("exact", "implicit"):
            raise ConfigError(f"gradients of data consistency are exact or implicit, not {gradient!r}.")
        self.cg_iterations, self.relative_tolerance = cg_iterations, relative_tolerance
        self.gradient: GradientMode = gradient

    def start(self, initial: Tensor, encoding: Encoding) -> State:  # noqa: ARG002
        """See `Iteration.start`."""
        return initial, torch.zeros_like(initial)

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """See `Iteration.before`."""
        shifted = state[0] + state[1]
        return shifted / encoding.network_unit, (shifted,)

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """See `Iteration.after`."""
        z = regularised * encoding.network_unit
        dual = carry[0] - z
        target = z - dual
        x = data_consistency(
            encoding.operator.normal,
            encoding.adjoint_data,
            target,
            weight_of(self.rho, encoding.sigma),
            max_iterations=self.cg_iterations,
            relative_tolerance=self.relative_tolerance,
            gradient=self.gradient,
        )
        return x, dual
