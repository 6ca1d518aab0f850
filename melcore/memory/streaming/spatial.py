"""A layer over space on streamed planes; see `melcore.memory.streaming.kernels.Kernel`."""

from typing import Any

import torch
from torch import Tensor

from melcore.memory.protocols import LayerLike
from melcore.memory.streaming.arrangement import Arrangement
from melcore.memory.streaming.faces import continued, fold, gather

_convolution: Any = torch.ops.aten.convolution.default
_convolution_backward: Any = torch.ops.aten.convolution_backward.default


def wide(dtype: torch.dtype) -> torch.dtype:
    """Precision in which gradients of weights are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_slow(images: Tensor) -> bool:
    """Whether torch would run a single small image through its plain CPU kernel, 5 to 10 times slower than oneDNN's.

    ATen's `use_mkldnn` sends float32 images to oneDNN only if there are two of them, or if the first four sizes
    multiply to more than 20480.
    """
    small = images.shape[0] == 1 and images.shape[:4].numel() <= 20480
    return small and images.device.type == "cpu" and images.dtype == torch.float32


def _halves(images: Tensor, reach: int) -> Tensor:
    """One image as two, cut along its first axis, each with the `reach` further samples that its convolution reads."""
    outputs = images.shape[2] - reach
    half = (outputs + 1) // 2
    parts = [images.narrow(2, 0, half + reach), images.narrow(2, outputs - half, half + reach)]
    return torch.cat(parts)


class SpatialKernel:
    """A convolution over (x, z, y) or (x, y) of planes along the readout, over (z, y, x) or (y, x) of frames."""

    def __init__(self, layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype) -> None:
        self._layer, self._arrangement = layer, arrangement
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
        self._reach = weight.shape[2] - 1
        self._native = layer.padding == "zeros"
        self._sum = [torch.zeros(s.shape, dtype=wide(dtype), device=weight.device) for s in (weight, self._bias)]

    def _run(self, images: Tensor, weight: Tensor, bias: Tensor | None, halo: list[int]) -> Tensor:
        ones, zeros = [1] * self._dims, [0] * self._dims
        outputs = images.shape[2] + 2 * halo[0] - self._reach
        if outputs > 1 and _is_slow(images):
            images, halo = _wider(images, halo)
            two = _convolution(_halves(images, self._reach), weight, bias, ones, halo, ones, False, zeros, 1)
            second = outputs - two.shape[2]
            return torch.cat([two[:1], two[1:].narrow(2, two.shape[2] - second, second)], dim=2)
        return _convolution(images, weight, bias, ones, halo, ones, False, zeros, 1)

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
        return self._arrangement.of_images(self._run(images, self._weight, self._bias, halo), planes)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See `Kernel.input_gradient`."""
        images = self._arrangement.images(gradient)
        result = self._run(images, self._flipped, None, self._halo if self._native else [2 * h for h in self._halo])
        for dim, halo in enumerate(self._halo, start=2):
            if halo and not self._native:
                size = result.shape[dim] - 2 * halo
                inner = gather(result, dim, range(halo, halo + size))
                index = continued(self._layer.padding, size, halo, halo)
                fold(inner, result.narrow(dim, 0, halo), dim, index[:halo])
                fold(inner, result.narrow(dim, halo + size, halo), dim, index[halo + size :])
                result = inner
        return self._arrangement.of_images(result, gradient)

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """See `Kernel.add_weight_gradient`."""
        images, upstream, halo = self._arrangement.images(planes), self._arrangement.images(gradient), self._halo
        if not self._native:
            images, halo = self._padded(images), [0] * self._dims
        ones, zeros = [1] * self._dims, [0] * self._dims
        sizes, outputs = [upstream.shape[1]], upstream.shape[2]
        if outputs > 1 and _is_slow(images):
            images, halo = _wider(images, halo)
            images, upstream = _halves(images, self._reach), _halves(upstream, 0)
            if outputs % 2:
                upstream[1:].select(2, 0).zero_()  # the plane in the middle is in both halves, and counts once
        _, weight, bias = _convolution_backward(
            upstream, images, self._weight, sizes, ones, halo, ones, False, zeros, 1, [False, True, True]
        )
        self._sum[0] += weight
        self._sum[1] += bias

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See `Kernel.gradients`."""
        weight, bias = self._sum
        back = weight.permute([self._order.index(axis) for axis in range(weight.ndim)])
        return back.reshape(self._layer.weight.shape), bias


def _wider(images: Tensor, halo: list[int]) -> tuple[Tensor, list[int]]:
    """Images that need no further padding along their first axis, where they are to be cut."""
    size = images.shape[2]
    wider = gather(images, 2, continued("zeros", size, halo[0], halo[0])) if halo[0] else images
    return wider, [0, *halo[1:]]
