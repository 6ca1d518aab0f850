"""Variational network: a gradient step of the data term and a learned one, from the same image.

Hammernik et al., Learning a variational network for reconstruction of accelerated MRI data, Magn Reson Med 79:3055
(2018); with a network in place of filters: Sriram et al., End-to-end variational networks, MICCAI 2020.
"""

import math

import torch
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.unrolled.iteration import Encoding, Iteration, State


class VarNet(Iteration):
    """``x = regulariser(x) - step * gradient of |A x - y|^2 / 2``, with a residual regulariser.

    The regulariser works in units of the noise, as in `melcore.unrolled.MoDL`.

    Parameters
    ----------
    regulariser
        Its residual is the learned gradient.
    step
        Initial step size of the data term, learned as ``exp(log_step)``.
    """

    def __init__(self, regulariser: Regulariser, *, step: float = 1.0) -> None:
        super().__init__()
        if step <= 0:
            raise ConfigError(f"VarNet needs a step > 0, but got {step}.")
        self.regulariser = regulariser
        self.log_step = nn.Parameter(torch.tensor(math.log(step)))

    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """See `Iteration.before`."""
        return state[0] / encoding.network_unit, (state[0],)

    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """See `Iteration.after`."""
        gradient = encoding.operator.normal(carry[0]) - encoding.adjoint_data
        return (regularised * encoding.network_unit - self.log_step.exp() * gradient,)
