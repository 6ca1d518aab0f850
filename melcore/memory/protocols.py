"""What the engine asks of the things that it runs. It knows no scheme and no network by name."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


class EncodingLike(Protocol):
    """The measurement: a dataclass whose tensor `adjoint_data` may take part in differentiation."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def adjoint_data(self) -> Tensor:
        """The adjoint of the operator, applied to the data."""


E = TypeVar("E", bound=EncodingLike)
E_contra = TypeVar("E_contra", bound=EncodingLike, contravariant=True)


class IterationLike(Protocol[E_contra]):
    """One iteration, cut where its learned part begins and ends: ``after(regulariser(before(state)))``."""

    @property
    def regulariser(self) -> nn.Module:
        """The learned part, from one image to another."""

    def before(self, state: State, encoding: E_contra, /) -> tuple[Tensor, State]:
        """The regulariser's input, and what `after` needs of the state."""

    def after(self, regularised: Tensor, carry: State, encoding: E_contra, /) -> State:
        """The next state."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Parameters, those of the regulariser included."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and everything inside."""


class LayerLike(Protocol):
    """A convolution and a leaky ReLU, along space or along time; see `melcore.networks.LocalLayer`."""

    weight: nn.Parameter  #: (outputs, inputs, time, z, y, x)
    bias: nn.Parameter
    slope: float  #: 1 is no activation
    padding: Any  #: zeros, replicate, reflect or circular
    kernel: tuple[int, int, int, int]  #: along (time, z, y, x)

    @property
    def halo(self) -> tuple[int, int, int, int]:
        """Neighbours read on either side along (time, z, y, x)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features ``(batch, time, channel, z, y, x)`` to features."""


@runtime_checkable
class LayeredLike(Protocol):
    """A regulariser ``x + from_features(layers(to_features(x)))`` of `LayerLike` layers."""

    layers: nn.ModuleList

    def to_features(self, x: Tensor, /) -> Tensor:
        """Complex ``(batch, set, time, z, y, x)`` to real ``(batch, time, channel, z, y, x)``."""

    def from_features(self, features: Tensor, /) -> Tensor:
        """Inverse of `to_features`."""


@runtime_checkable
class SampledLike(Protocol):
    """A regulariser that knows what its input looks like, if not an image."""

    def sample(self, matrix: tuple[int, int, int, int], generator: torch.Generator, /) -> Tensor:
        """Random input in double precision, for images of a (time, z, y, x)."""


Gradients = tuple[Tensor | None, list[Tensor | None]]


class ExecutorLike(Protocol):
    """How one regulariser is computed, and differentiated."""

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The regulariser's output, and what is to be kept for `vjp`; called without automatic differentiation."""

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """Gradients with respect to `x` and to each of `parameters`, from the gradient of the output."""
