"""A bare convolution and the gradient of its weights, computed the way that suits a device.

Images are ``(n, channel, ...)``, stored with the channels last. A library's speed differs by up to an order of
magnitude between ways that give the same numbers: `melcore.memory.calibrate` finds the fastest by trying them.
"""

from typing import Any

import torch
from torch import Tensor

from melcore.memory.plan import Way
from melcore.memory.streaming.faces import continued, gather

_convolution: Any = torch.ops.aten.convolution.default
_convolution_backward: Any = torch.ops.aten.convolution_backward.default


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, halo: list[int], way: Way) -> Tensor:
    """Convolution with zeros beyond the faces, as many as `halo` says along each axis.

    Parameters
    ----------
    images, weight, bias
        As for `torch.nn.functional.conv3d` or ``conv2d``.
    halo
        Padding along each axis.
    way
        See `melcore.memory.IterationPlan`.
    """
    if way == "contiguous":
        return _run(images.contiguous(), weight.contiguous(), bias, halo)
    if way == "sliced" and weight.ndim == 5:
        wider, rest = _wider(images, halo)
        outputs, total = wider.shape[2] - weight.shape[2] + 1, None
        for tap in range(weight.shape[2]):
            part = _run(_slices(wider, tap, outputs), weight[:, :, tap], bias if tap == 0 else None, rest[1:])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.unflatten(0, (len(images), outputs)).transpose(1, 2)
    outputs = images.shape[2] + 2 * halo[0] - weight.shape[2] + 1
    if outputs > 1 and _is_slow(images):
        images, halo = _wider(images, halo)
        two = _run(_halves(images, weight.shape[2] - 1), weight, bias, halo)
        second = outputs - two.shape[2]
        return torch.cat([two[:1], two[1:].narrow(2, two.shape[2] - second, second)], dim=2)
    return _run(images, weight, bias, halo)


def weight_gradients(
    upstream: Tensor, images: Tensor, weight: Tensor, halo: list[int], way: Way
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `convolve`, from the gradient of its output."""
    if way == "contiguous":
        return _weights(upstream.contiguous(), images.contiguous(), weight.contiguous(), halo)
    if way == "sliced" and weight.ndim == 5:
        wider, rest = _wider(images, halo)
        outputs = upstream.shape[2]
        gradient = _slices(upstream, 0, outputs)
        found = [
            _weights(gradient, _slices(wider, tap, outputs), weight[:, :, tap], rest[1:])
            for tap in range(weight.shape[2])
        ]
        return torch.stack([part for part, _ in found], dim=2), found[0][1]
    outputs = upstream.shape[2]
    if outputs > 1 and _is_slow(images):
        images, halo = _wider(images, halo)
        images, upstream = _halves(images, weight.shape[2] - 1), _halves(upstream, 0)
        if outputs % 2:
            upstream[1:].select(2, 0).zero_()  # the plane in the middle is in both halves, and counts once
    return _weights(upstream, images, weight, halo)


def _run(images: Tensor, weight: Tensor, bias: Tensor | None, halo: list[int]) -> Tensor:
    ones, zeros = [1] * len(halo), [0] * len(halo)
    return _convolution(images, weight, bias, ones, halo, ones, False, zeros, 1)


def _weights(upstream: Tensor, images: Tensor, weight: Tensor, halo: list[int]) -> tuple[Tensor, Tensor]:
    ones, zeros, wanted = [1] * len(halo), [0] * len(halo), [False, True, True]
    sizes = [upstream.shape[1]]
    _, found, bias = _convolution_backward(upstream, images, weight, sizes, ones, halo, ones, False, zeros, 1, wanted)
    return found, bias


def _slices(images: Tensor, start: int, count: int) -> Tensor:
    """Some of the planes along the first axis, each as an image; a view of one image that is stored channels last."""
    return images.narrow(2, start, count).transpose(1, 2).flatten(0, 1)


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


def _wider(images: Tensor, halo: list[int]) -> tuple[Tensor, list[int]]:
    """Images that need no further padding along their first axis, where they are to be cut."""
    size = images.shape[2]
    wider = gather(images, 2, continued("zeros", size, halo[0], halo[0])) if halo[0] else images
    return wider, [0, *halo[1:]]
