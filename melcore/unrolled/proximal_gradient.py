"""Proximal gradient descent with a learned proximal step.

Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm, SIAM J Imaging Sci 2:183 (2009); unrolled with a
network in place of the proximal operator: Mardani et al., NeurIPS 2018.
"""

import math

import torch
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.unrolled.iteration import Encoding, Iteration, State


class ProximalGradient(Iteration):
    """``x = regulariser(x - step * gradient of |A x - y|^2 / 2)``.

    The regulariser works in units of the noise, as in `melcore.unrolled.MoDL`.

    Parameters
    ----------
    regulariser
        The learned proximal step.
    step
        Initial step size, learned as ``exp(log_step)``. Maps whose squares sum to 1 and an orthonormal transform make
        steps below 2 stable.
    """

    def __init__(self, regulariser: Regulariser, *, step: float = 1.0) -> None:
        super().__init__()
        if step <= 0:
            raise ConfigError(f"ProximalGradient needs a step > 0, but got {step}.")
        self.regulariser = regulariser
        self.log_step = nn.Parameter(torch.tensor(math.log(step)))

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """See `Iteration.before`."""
        x = state[0]
        x = x - self.log_step.exp() * (encoding.operator.normal(x) - encoding.adjoint_data)
        return x / encoding.network_unit, ()

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:  # noqa: ARG002
        """See `Iteration.after`."""
        return (regularised * encoding.network_unit,)
