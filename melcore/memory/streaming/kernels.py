"""The layers of a regulariser as bare kernels on planes: output, gradient of the input, gradient of the weights.

Planes are ``(n, channel, x, z, y)``, or ``(n, channel, x, y)`` where no layer reads neighbours along z; ``n`` is batch
and time, and z too in the second case. The streamed axis x is never padded here: the planes that come in reach as far
as the kernel does.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from melcore.memory.protocols import LayerLike
from melcore.memory.streaming.faces import continued, fold, gather, runs

_convolution: Any = torch.ops.aten.convolution.default
_convolution_backward: Any = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Arrangement:
    """Between features ``(batch, time, channel, z, y, x)`` and planes."""

    batch: int
    time: int
    z: int
    y: int
    volumetric: bool

    def planes(self, features: Tensor) -> Tensor:
        """Features to planes; a view."""
        if self.volumetric:
            return features.permute(0, 1, 2, 5, 3, 4).flatten(0, 1)
        return features.permute(0, 1, 3, 2, 5, 4).flatten(0, 2)

    def features(self, planes: Tensor) -> Tensor:
        """Planes to features; a view."""
        if self.volumetric:
            return planes.unflatten(0, (self.batch, self.time)).permute(0, 1, 2, 4, 5, 3)
        return planes.unflatten(0, (self.batch, self.time, self.z)).permute(0, 1, 3, 2, 5, 4)

    def shape(self, channels: int, planes: int) -> tuple[int, ...]:
        """Shape of so many planes."""
        if self.volumetric:
            return (self.batch * self.time, channels, planes, self.z, self.y)
        return (self.batch * self.time * self.z, channels, planes, self.y)


class Kernel(Protocol):
    """One layer, without its activation."""

    def forward(self, planes: Tensor) -> Tensor:
        """Output planes, fewer than came in by twice the halo along x."""

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of input planes from that of output planes, fewer by twice the halo along x."""

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """Add up the contribution of output planes, whose input planes reach further by the halo on either side."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The sums for weight and bias, shaped as the layer's."""


def make_kernel(layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype) -> Kernel:
    """The kernel for a layer, computing in `dtype`."""
    if layer.kernel[1:] == (1, 1, 1):
        return TemporalKernel(layer, arrangement, dtype)
    return SpatialKernel(layer, arrangement, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_slow(planes: Tensor) -> bool:
    """Whether torch would run a single small image through its plain CPU kernel, 5 to 10 times slower than oneDNN's.

    ATen's `use_mkldnn` sends float32 images to oneDNN only if there are two of them, or if the first four sizes
    multiply to more than 20480.
    """
    small = planes.shape[0] == 1 and planes.shape[:4].numel() <= 20480
    return small and planes.device.type == "cpu" and planes.dtype == torch.float32


def _halves(planes: Tensor, reach: int) -> Tensor:
    """One image as two, cut along x, each with the `reach` further planes that its convolution reads."""
    outputs = planes.shape[2] - reach
    half = (outputs + 1) // 2
    parts = [planes.narrow(2, 0, half + reach), planes.narrow(2, outputs - half, half + reach)]
    return torch.cat(parts)


class SpatialKernel:
    """A convolution along (x, z, y) or (x, y)."""

    def __init__(self, layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype) -> None:
        self._layer, self._dims = layer, 3 if arrangement.volumetric else 2
        weight = layer.weight.detach()
        order = (0, 1, 4, 2, 3) if arrangement.volumetric else (0, 1, 3, 2)
        self._order = order
        weight = (weight[:, :, 0] if arrangement.volumetric else weight[:, :, 0, 0]).permute(order)
        format_ = torch.channels_last_3d if arrangement.volumetric else torch.channels_last
        self._weight = weight.to(dtype).contiguous(memory_format=format_)
        self._bias = layer.bias.detach().to(dtype)
        flipped = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
        self._flipped = flipped.to(dtype).contiguous(memory_format=format_)
        # Half sizes along the axes of a plane, and how an axis of a plane continues.
        self._halo = [size // 2 for size in weight.shape[3:]]
        self._reach = weight.shape[2] - 1
        self._native = layer.padding == "zeros"
        self._sum = [torch.zeros(s.shape, dtype=_wide(dtype), device=weight.device) for s in (weight, self._bias)]

    def _run(self, planes: Tensor, weight: Tensor, bias: Tensor | None, halo: list[int]) -> Tensor:
        ones, zeros = [1] * self._dims, [0] * self._dims
        outputs = planes.shape[2] - self._reach
        if outputs > 1 and _is_slow(planes):
            two = _convolution(_halves(planes, self._reach), weight, bias, ones, [0, *halo], ones, False, zeros, 1)
            second = outputs - two.shape[2]
            return torch.cat([two[:1], two[1:].narrow(2, two.shape[2] - second, second)], dim=2)
        return _convolution(planes, weight, bias, ones, [0, *halo], ones, False, zeros, 1)

    def _padded(self, planes: Tensor) -> Tensor:
        for dim, halo in enumerate(self._halo, start=3):
            if halo:
                planes = gather(planes, dim, continued(self._layer.padding, planes.shape[dim], halo, halo))
        return planes

    def forward(self, planes: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        if self._native:
            return self._run(planes, self._weight, self._bias, self._halo)
        return self._run(self._padded(planes), self._weight, self._bias, [0] * len(self._halo))

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See `Kernel.input_gradient`."""
        if self._native:
            return self._run(gradient, self._flipped, None, self._halo)
        result = self._run(gradient, self._flipped, None, [2 * halo for halo in self._halo])
        for dim, halo in enumerate(self._halo, start=3):
            if halo:
                size = result.shape[dim] - 2 * halo
                inner = gather(result, dim, range(halo, halo + size))
                index = continued(self._layer.padding, size, halo, halo)
                fold(inner, result.narrow(dim, 0, halo), dim, index[:halo])
                fold(inner, result.narrow(dim, halo + size, halo), dim, index[halo + size :])
                result = inner
        return result

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """See `Kernel.add_weight_gradient`."""
        halo = self._halo
        if not self._native:
            planes, halo = self._padded(planes), [0] * len(halo)
        ones, zeros = [1] * self._dims, [0] * self._dims
        sizes, outputs = [gradient.shape[1]], gradient.shape[2]
        if outputs > 1 and _is_slow(planes):
            planes, gradient = _halves(planes, self._reach), _halves(gradient, 0)
            if outputs % 2:
                gradient[1:].select(2, 0).zero_()  # the plane in the middle is in both halves, and counts once
        _, weight, bias = _convolution_backward(
            gradient, planes, self._weight, sizes, ones, [0, *halo], ones, False, zeros, 1, [False, True, True]
        )
        self._sum[0] += weight
        self._sum[1] += bias

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        weight, bias = self._sum
        back = weight.permute([self._order.index(axis) for axis in range(weight.ndim)])
        return back.reshape(self._layer.weight.shape), bias


class TemporalKernel:
    """A convolution over time: for each tap a matrix product over the channels."""

    def __init__(self, layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype) -> None:
        self._layer = layer
        self._split = (arrangement.batch, arrangement.time, 1 if arrangement.volumetric else arrangement.z)
        self._weight = layer.weight.detach()[..., 0, 0, 0].to(dtype)
        self._bias = layer.bias.detach().to(dtype)
        taps, time = layer.kernel[0], arrangement.time
        index = continued(layer.padding, time, taps // 2, taps // 2)
        self._frames = [index[tap : tap + time] for tap in range(taps)]
        wide = _wide(dtype)
        self._sum = [torch.zeros(s.shape, dtype=wide, device=s.device) for s in (self._weight, self._bias)]

    def _rows(self, planes: Tensor) -> Tensor:
        """(batch, time, ..., channel): the products run over the last axis."""
        return planes.unflatten(0, self._split).movedim(3, -1)

    @staticmethod
    def _planes(rows: Tensor) -> Tensor:
        return rows.movedim(-1, 3).flatten(0, 2)

    def forward(self, planes: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        rows = self._rows(planes)
        result = self._bias.expand(*rows.shape[:-1], -1).contiguous()
        for tap, frames in enumerate(self._frames):
            weight = self._weight[:, :, tap].T
            for position, first, length in runs(frames):
                result.narrow(1, position, length).add_(rows.narrow(1, first, length) @ weight)
        return self._planes(result)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See `Kernel.input_gradient`."""
        rows = self._rows(gradient)
        result = rows.new_zeros((*rows.shape[:-1], self._weight.shape[1]))
        for tap, frames in enumerate(self._frames):
            for position, first, length in runs(frames):
                product = rows.narrow(1, position, length) @ self._weight[:, :, tap]
                result.narrow(1, first, length).add_(product)
        return self._planes(result)

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """See `Kernel.add_weight_gradient`."""
        rows, inputs = self._rows(gradient), self._rows(planes)
        for tap, frames in enumerate(self._frames):
            for position, first, length in runs(frames):
                outputs = rows.narrow(1, position, length).reshape(-1, rows.shape[-1])
                matrix = outputs.T @ inputs.narrow(1, first, length).reshape(-1, inputs.shape[-1])
                self._sum[0][:, :, tap] += matrix
        self._sum[1] += rows.sum(tuple(range(rows.ndim - 1)), dtype=self._sum[1].dtype)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        return self._sum[0].reshape(self._layer.weight.shape), self._sum[1]
