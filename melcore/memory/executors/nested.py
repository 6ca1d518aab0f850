"""The regulariser layer by layer: the activations before each layer are computed again from the start.

Two activations exist at a time, whatever the depth; the work grows with the square of the number of layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from melcore.memory.noise import NoiseLike, noise_of
from melcore.memory.protocols import Gradients, LayeredLike


def why_not(regulariser: nn.Module) -> str | None:
    """Why a regulariser cannot be taken apart, or None if it can."""
    if not isinstance(regulariser, LayeredLike):
        return f"{type(regulariser).__name__} is not a chain of layers"
    return None


class Nested:
    """One layer at a time."""

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`; without automatic differentiation a layer's input is freed after it."""
        return regulariser(x), ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],  # noqa: ARG002
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        assert isinstance(regulariser, LayeredLike)
        found: dict[int, Tensor] = {}
        layers = _with_noise(regulariser, noise_of(regulariser, x))
        wanted = {id(parameter) for parameter in parameters}
        upstream = regulariser.to_features(gradient)
        for depth in range(len(layers) - 1, -1, -1):
            with torch.no_grad():
                features = regulariser.to_features(x)
                for layer, noise in layers[:depth]:
                    features = layer(features, *noise)
            upstream = _through(layers[depth], features, upstream, wanted, found)
        to_input = gradient + regulariser.from_features(upstream.to(x.real.dtype))
        return to_input, [found.get(id(parameter)) for parameter in parameters]


def _with_noise(regulariser: LayeredLike, noise: NoiseLike | None) -> list[tuple[nn.Module, tuple[NoiseLike, ...]]]:
    """The layers, each with what it is called with besides features."""
    last = len(regulariser.layers) - 1
    return [
        (layer, () if noise is None or number == last else (noise.layer(number),))
        for number, layer in enumerate(regulariser.layers)
    ]


def _through(
    numbered: tuple[nn.Module, tuple[NoiseLike, ...]],
    features: Tensor,
    upstream: Tensor,
    wanted: set[int],
    found: dict[int, Tensor],
) -> Tensor:
    """Gradient of a layer's input; those of its parameters are added to `found`."""
    layer, noise = numbered
    parameters: list[Tensor] = [p for p in layer._parameters.values() if p is not None and id(p) in wanted]
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        output = layer(leaf, *noise)
    first, *others = torch.autograd.grad(output, [leaf, *parameters], upstream.to(output.dtype))
    for parameter, value in zip(parameters, others, strict=True):
        found[id(parameter)] = found[id(parameter)] + value if id(parameter) in found else value
    return first
