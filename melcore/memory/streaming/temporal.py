"""A layer over time on streamed planes; see `melcore.memory.streaming.kernels.Kernel`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from melcore.memory.protocols import LayerLike
from melcore.memory.streaming.arrangement import Arrangement
from melcore.memory.streaming.faces import continued, runs
from melcore.memory.streaming.spatial import wide


class TemporalKernel:
    """A convolution over time: for each tap a matrix product over the channels.

    Along the readout all frames are there, and time is continued here. Along time frames come continued, a few at once.
    """

    def __init__(self, layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype) -> None:
        self._layer, self._streamed = layer, arrangement.axis == "time"
        self._split = (arrangement.batch, arrangement.time, 1 if arrangement.volumetric else arrangement.z)
        self._weight = layer.weight.detach()[..., 0, 0, 0].to(dtype)
        self._bias = layer.bias.detach().to(dtype)
        taps, time = layer.kernel[0], arrangement.time
        self._reach, self._moves = taps - 1, []
        if not self._streamed:
            index = continued(layer.padding, time, taps // 2, taps // 2)
            self._moves = [runs(index[tap : tap + time]) for tap in range(taps)]
        self._time = 0 if self._streamed else 1  # dimension of rows
        self._sum = [torch.zeros(s.shape, dtype=wide(dtype), device=s.device) for s in (self._weight, self._bias)]

    def _rows(self, planes: Tensor) -> Tensor:
        """(time, n, ..., channel) or (batch, time, z, ..., channel): the products run over the last axis."""
        if self._streamed:
            return planes.movedim((2, 1), (0, -1))
        return planes.unflatten(0, self._split).movedim(3, -1)

    def _planes(self, rows: Tensor) -> Tensor:
        if self._streamed:
            return rows.movedim((0, -1), (2, 1))
        return rows.movedim(-1, 3).flatten(0, 2)

    def _pairs(self, outputs: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each tap with frames of the output, and as many frames of the input that it takes to them."""
        for tap in range(self._reach + 1):
            count = outputs.shape[self._time]
            for position, first, length in [(0, tap, count)] if self._streamed else self._moves[tap]:
                yield tap, outputs.narrow(self._time, position, length), inputs.narrow(self._time, first, length)

    def _zeros(self, rows: Tensor, channels: int) -> Tensor:
        shape = [*rows.shape[:-1], channels]
        shape[self._time] -= self._reach if self._streamed else 0
        return rows.new_zeros(shape)

    def forward(self, planes: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        rows = self._rows(planes)
        result = self._zeros(rows, self._weight.shape[0]).add_(self._bias)
        for tap, outputs, inputs in self._pairs(result, rows):
            outputs.add_(inputs @ self._weight[:, :, tap].T)
        return self._planes(result)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See `Kernel.input_gradient`."""
        rows = self._rows(gradient)
        result = self._zeros(rows, self._weight.shape[1])
        if self._streamed:  # the taps in reverse: a frame goes to the outputs that lie around it
            for tap, inputs, outputs in self._pairs(result, rows):
                inputs.add_(outputs @ self._weight[:, :, self._reach - tap])
        else:
            for tap, outputs, inputs in self._pairs(rows, result):
                inputs.add_(outputs @ self._weight[:, :, tap])
        return self._planes(result)

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """See `Kernel.add_weight_gradient`."""
        rows, inputs = self._rows(gradient), self._rows(planes)
        for tap, outputs, sources in self._pairs(rows, inputs):
            matrix = outputs.reshape(-1, outputs.shape[-1]).T @ sources.reshape(-1, sources.shape[-1])
            self._sum[0][:, :, tap] += matrix
        self._sum[1] += rows.sum(tuple(range(rows.ndim - 1)), dtype=self._sum[1].dtype)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        return self._sum[0].reshape(self._layer.weight.shape), self._sum[1]
