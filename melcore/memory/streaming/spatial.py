"""A layer over space on streamed planes; see `melcore.memory.streaming.kernels.Kernel`."""

import torch
from torch import Tensor

from melcore.memory.plan import Way
from melcore.memory.protocols import LayerLike
from melcore.memory.streaming.arrangement import Arrangement
from melcore.memory.streaming.convolution import convolve, weight_gradients
from melcore.memory.streaming.faces import continued, fold, gather


def wide(dtype: torch.dtype) -> torch.dtype:
    """Precision in which gradients of weights are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SpatialKernel:
    """A convolution over (x, z, y) or (x, y) of planes along the readout, over (z, y, x) or (y, x) of frames."""

    def __init__(
        self, layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype, way: Way = "channels_last"
    ) -> None:
        self._layer, self._arrangement, self._way = layer, arrangement, way
        axes = arrangement.convolved
        self._dims = len(axes)
        weight = layer.weight.detach()[:, :, 0] if "z" in axes else layer.weight.detach()[:, :, 0, 0]
        own = "zyx" if "z" in axes else "yx"
        self._order = [0, 1, *(2 + own.index(axis) for axis in axes)]
        weight = weight.permute(self._order)
        format_ = torch.channels_last_3d if self._dims == 3 else torch.channels_last
        self._weight = weight.to(dtype).contiguous(memory_format=format_)
        self._bias = layer.bias.detach().to(dtype)
        flipped = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
        self._flipped = flipped.to(dtype).contiguous(memory_format=format_)
        # Half sizes along the axes that are continued here, and how they are; the streamed axis arrives continued.
        self._halo = [
            0 if axis == arrangement.streamed else size // 2 for axis, size in zip(axes, weight.shape[2:], strict=True)
        ]
        self._native = layer.padding == "zeros"
        self._sum = [torch.zeros(s.shape, dtype=wide(dtype), device=weight.device) for s in (weight, self._bias)]

    def _padded(self, images: Tensor) -> Tensor:
        for dim, halo in enumerate(self._halo, start=2):
            if halo:
                images = gather(images, dim, continued(self._layer.padding, images.shape[dim], halo, halo))
        return images

    def forward(self, planes: Tensor) -> Tensor:
        """See `Kernel.forward`."""
        images, halo = self._arrangement.images(planes), self._halo
        if not self._native:
            images, halo = self._padded(images), [0] * self._dims
        result = convolve(images, self._weight, self._bias, halo, self._way)
        return self._arrangement.of_images(result, planes)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See `Kernel.input_gradient`."""
        images = self._arrangement.images(gradient)
        halo = self._halo if self._native else [2 * size for size in self._halo]
        result = convolve(images, self._flipped, None, halo, self._way)
        for dim, width in enumerate(self._halo, start=2):
            if width and not self._native:
                size = result.shape[dim] - 2 * width
                inner = gather(result, dim, range(width, width + size))
                index = continued(self._layer.padding, size, width, width)
                fold(inner, result.narrow(dim, 0, width), dim, index[:width])
                fold(inner, result.narrow(dim, width + size, width), dim, index[width + size :])
                result = inner
        return self._arrangement.of_images(result, gradient)

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """See `Kernel.add_weight_gradient`."""
        images, upstream, halo = self._arrangement.images(planes), self._arrangement.images(gradient), self._halo
        if not self._native:
            images, halo = self._padded(images), [0] * self._dims
        weight, bias = weight_gradients(upstream, images, self._weight, halo, self._way)
        self._sum[0] += weight
        self._sum[1] += bias

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        weight, bias = self._sum
        back = weight.permute([self._order.index(axis) for axis in range(weight.ndim)])
        return back.reshape(self._layer.weight.shape), bias
