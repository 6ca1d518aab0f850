"""The regulariser as a wavefront of planes along the readout, or of frames along time: exact, in bounded memory.

Each layer keeps the few planes that its neighbours still need. In the backward, the recomputed activations, the
gradients of the inputs and those of the weights advance in one sweep. No tensor of features is ever as large as the
volume; even the image becomes features a chunk at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from melcore.memory.plan import Axis, Way
from melcore.memory.protocols import Gradients, LayeredLike, LayerLike
from melcore.memory.streaming.sweep import AXES, Sweep


def why_not(regulariser: nn.Module, axis: Axis = "readout") -> str | None:
    """Why a regulariser cannot be streamed along an axis, or None if it can."""
    if not isinstance(regulariser, LayeredLike):
        return f"{type(regulariser).__name__} is not made of local layers"
    layers: list[LayerLike] = list(regulariser.layers)  # type: ignore[arg-type]
    if any(layer.kernel[0] > 1 and layer.kernel[1:] != (1, 1, 1) for layer in layers):
        return "a layer convolves space and time at once"
    if layers[-1].slope != 1:
        return "the last layer has an activation"
    if any(layer.slope < 0 for layer in layers):
        return "a negative slope hides the sign of an activation's input"
    if len({str(layer.padding) for layer in layers if layer.halo[AXES[axis]]}) > 1:
        return f"layers continue the volume in different ways along {'time' if axis == 'time' else 'the readout'}"
    return None


class Stream:
    """A wavefront in steps of `chunk` planes along `axis`, which convolves in a `way`."""

    def __init__(self, chunk: int, axis: Axis = "readout", way: Way = "channels_last") -> None:
        self.chunk, self.axis, self.way = chunk, axis, way

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        with torch.no_grad():
            return Sweep(regulariser, x, self.chunk, self.axis, self.way, backward=False).forward(), ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],  # noqa: ARG002
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        with torch.no_grad():
            return Sweep(regulariser, x, self.chunk, self.axis, self.way, backward=True).vjp(gradient, parameters)


class Keep(Stream):
    """A wavefront whose activations stay in memory from the forward to the backward, so that nothing is recomputed.

    The output of the first layer is never kept: it is the cheapest to compute, and as large as any other.

    Parameters
    ----------
    layers
        How many activations to keep, the last ones first; None is all.
    dtype
        In which precision; None is that of the computation.
    """

    def __init__(
        self,
        chunk: int,
        layers: int | None = None,
        dtype: torch.dtype | None = None,
        axis: Axis = "readout",
        way: Way = "channels_last",
    ) -> None:
        super().__init__(chunk, axis, way)
        self.layers, self.dtype = layers, dtype

    def _signals(self, regulariser: nn.Module) -> list[int]:
        assert isinstance(regulariser, LayeredLike)
        depth = len(regulariser.layers)
        count = depth if self.layers is None else self.layers
        return list(range(2, depth))[max(0, depth - 2 - count) :]

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        with torch.no_grad():
            sweep = Sweep(regulariser, x, self.chunk, self.axis, self.way, backward=False)
            sweep.record(self._signals(regulariser), self.dtype)
            return sweep.forward(), list(sweep.recorded.values())

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        with torch.no_grad():
            signals = dict(zip(self._signals(regulariser), kept, strict=True))
            return Sweep(regulariser, x, self.chunk, self.axis, self.way, backward=True, kept=signals).vjp(
                gradient, parameters
            )
