"""MoDL: a learned regulariser and data consistency by conjugate gradients, in turn.

Aggarwal, Mani, Jacob: MoDL: model-based deep learning architecture for inverse problems, IEEE Trans Med Imaging 38:394
(2019).
"""

from torch import Tensor

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.networks.noise_curve import NoiseCurve, weight_of
from melcore.physics import GradientMode, data_consistency
from melcore.unrolled.iteration import Encoding, Iteration, State


class MoDL(Iteration):
    """``z = unit * regulariser(x / unit)``, then ``x`` minimises ``|A x - y|^2 + mu |x - z|^2``, begun from ``z``.

    The unit follows the noise (`Encoding.network_unit`), and so does ``mu``, by a learned curve.

    Parameters
    ----------
    regulariser
        The learned part.
    mu
        Initial weight of the regulariser, in squares of the noise level, and at most 1: the curve that is learned
        begins as ``min(mu * sigma**2, 1)``.
    cg_iterations
        At most so many steps of conjugate gradients.
    relative_tolerance
        Where they stop earlier; 0 always runs `cg_iterations`.
    gradient
        ``"exact"``: of the iterations as they are executed. ``"implicit"``: of the solution that they approach; needs a
        `relative_tolerance`, and warns where it is not reached. See `melcore.physics.data_consistency`.
    """

    def __init__(
        self,
        regulariser: Regulariser,
        *,
        mu: float = 30.0,
        cg_iterations: int = 10,
        relative_tolerance: float = 0.0,
        gradient: GradientMode = "exact",
    ) -> None:
        super().__init__()
        if mu <= 0 or cg_iterations < 1:
            raise ConfigError(
                f"MoDL needs mu > 0 and cg_iterations >= 1, but got mu={mu}, cg_iterations={cg_iterations}."
            )
        self.regulariser = regulariser
        self.mu = NoiseCurve(1, lambda sigma: min(mu * sigma**2, 1.0))
        if gradient not in ("exact", "implicit"):
            raise ConfigError(f"gradients of data consistency are exact or implicit, not {gradient!r}.")
        self.cg_iterations, self.relative_tolerance = cg_iterations, relative_tolerance
        self.gradient: GradientMode = gradient

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """See `Iteration.before`."""
        return state[0] / encoding.network_unit, ()

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:  # noqa: ARG002
        """See `Iteration.after`."""
        x = data_consistency(
            encoding.operator.normal,
            encoding.adjoint_data,
            regularised,
            weight_of(self.mu, encoding.sigma),
            unit=encoding.network_unit,
            max_iterations=self.cg_iterations,
            relative_tolerance=self.relative_tolerance,
            gradient=self.gradient,
        )
        return (x,)
