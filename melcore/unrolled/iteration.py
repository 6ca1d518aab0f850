"""One unrolled iteration: pure mathematics, cut where the learned part begins and ends.

Every scheme is ``after(regulariser(before(state)))``: what precedes the learned regulariser, and what follows it.
Memory executors need only this cut: the regulariser holds nearly all activations, the rest holds the physics.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks import Regulariser
from melcore.physics import LinearOperator

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Encoding:
    """The measurement, as a scheme needs it: the operator, and its adjoint applied to the data.

    k-space itself is not needed: the gradient of the data term is ``operator.normal(x) - adjoint_data``.

    Attributes
    ----------
    operator
        From images ``(batch, set, time, z, y, x)`` to k-space.
    adjoint_data
        ``operator.adjoint(k_space)``, an image.
    """

    operator: LinearOperator
    adjoint_data: Tensor


class Iteration(nn.Module, ABC):
    """One iteration of a scheme. Its state is a tuple of images, the reconstruction first."""

    regulariser: Regulariser
    #: Why `undo_before` and `undo_after` cannot compute states back from later ones, or None if they can.
    irreversible: str | None = "it declares no way back"

    def start(self, initial: Tensor) -> State:
        """State before the first iteration, from an initial image."""
        return (initial,)

    @abstractmethod
    def before(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:
        """The regulariser's input, and what `after` needs of the state."""

    @abstractmethod
    def after(self, regularised: Tensor, carry: State, encoding: Encoding) -> State:
        """The next state, from the regulariser's output and what `before` passed on."""

    def undo_before(self, x: Tensor, carry: State, encoding: Encoding) -> State:  # noqa: ARG002
        """The state of which ``(x, carry)`` is the `before`; needed only for memory plans with states in ``reverse``.

        Need not be exact: every state that is computed back is compared with a certificate of the true one. Called
        without automatic differentiation.
        """
        raise ConfigError(f"{type(self).__name__} cannot be undone: {self.irreversible}.")

    def undo_after(self, state: State, encoding: Encoding) -> tuple[Tensor, State]:  # noqa: ARG002
        """The `regularised` and `carry` of which `state` is the `after`; see `undo_before`."""
        raise ConfigError(f"{type(self).__name__} cannot be undone: {self.irreversible}.")

    def forward(self, state: State, encoding: Encoding) -> State:
        """The next state."""
        x, carry = self.before(state, encoding)
        return self.after(self.regulariser(x), carry, encoding)
