"""Alternating direction method of multipliers with a learned proximal step.

Yang, Sun, Li, Xu, Deep ADMM-Net for compressive sensing MRI, NeurIPS 2016; in the scaled form of Boyd et al., Found
Trends Mach Learn 3:1 (2011).
"""

import math

import torch
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.physics import conjugate_gradient
from melcore.unrolled.iteration import Encoding, Iteration, State


class ADMM(Iteration):
    """``z = regulariser(x + u)``, ``u = u + x - z``, and ``x`` minimises ``|A x - y|^2 + rho |x - z + u|^2``.

    The state is ``(x, u)`` with the scaled dual variable ``u``, which starts at zero.

    Parameters
    ----------
    regulariser
        The learned proximal step.
    rho
        Initial penalty, learned as ``exp(log_rho)``.
    cg_iterations, relative_tolerance
        As for `melcore.unrolled.MoDL`; conjugate gradients begin from ``z - u``.
    """

    def __init__(
        self, regulariser: Regulariser, *, rho: float = 0.05, cg_iterations: int = 10, relative_tolerance: float = 0.0
    ) -> None:
        super().__init__()
        if rho <= 0 or cg_iterations < 1:
            raise ConfigError(
                f"ADMM needs rho > 0 and cg_iterations >= 1, but got rho={rho}, cg_iterations={cg_iterations}."
            )
        self.regulariser = regulariser
        self.log_rho = nn.Parameter(torch.tensor(math.log(rho)))
        self.cg_iterations, self.relative_tolerance = cg_iterations, relative_tolerance

    def start(self, initial: Tensor) -> State:
        """See `Iteration.start`."""
        return initial, torch.zeros_like(initial)

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:  # noqa: ARG002
        """See `Iteration.before`."""
        shifted = state[0] + state[1]
        return shifted, (shifted,)

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """See `Iteration.after`."""
        rho = self.log_rho.exp()
        dual = carry[0] - regularised
        target = regularised - dual
        solution = conjugate_gradient(
            lambda v: encoding.operator.normal(v) + rho * v,
            encoding.adjoint_data + rho * target,
            initial=target,
            relative_tolerance=self.relative_tolerance,
            max_iterations=self.cg_iterations,
        )
        return solution.value, dual
