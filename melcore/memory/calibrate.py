"""A short probe of a device: what its operations cost beside each other, and how it convolves fastest."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F

from melcore.memory.plan import Way
from melcore.memory.streaming.convolution import convolve, weight_gradients

# The way in which planes are stored stays the choice unless another is faster by more than a busy machine's noise.
_CLEARLY = 0.8


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found out about a device.

    Attributes
    ----------
    fourier_cost
        Time of one operation of a Fourier transform, in operations of a convolution.
    convolution
        How the device convolves streamed planes fastest; see `melcore.memory.IterationPlan`.
    seconds
        Of a convolution of such planes and of the gradient of its weights, by way.
    """

    fourier_cost: float
    convolution: Way
    seconds: dict[Way, float]


def calibrate(
    device: torch.device | str = "cpu",
    *,
    size: int = 32,
    channels: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Time a few operations on `device`, for `melcore.unrolled.plan`.

    Parameters
    ----------
    size, channels
        Edge of the volume, and channels of the convolutions, that are timed; the default takes a second or two on a
        CPU.
    dtype
        In which networks will compute, for example bfloat16 under autocast.
    """
    features = torch.randn(1, channels, size, size, size, device=device)
    weight = torch.randn(channels, channels, 3, 3, 3, device=device)
    image = torch.randn(4, size, size, size, dtype=torch.complex64, device=device)
    convolution = 2 * 27 * channels * features.numel()
    fourier = 5 * image.numel() * (size**3).bit_length()
    seconds = [
        _time(lambda: F.conv3d(features, weight, padding=1), features.device),
        _time(lambda: torch.fft.fftn(image, dim=(1, 2, 3)), features.device),
    ]
    ways = _ways(features[:, :, : min(size, 10)].to(dtype), weight.to(dtype))
    fastest = min(ways, key=lambda way: ways[way])
    chosen = fastest if ways[fastest] < _CLEARLY * ways["channels_last"] else "channels_last"
    return Calibration((seconds[1] / fourier) / (seconds[0] / convolution), chosen, ways)


def _ways(planes: torch.Tensor, weight: torch.Tensor) -> dict[Way, float]:
    """Seconds of a convolution of planes and of the gradient of its weights, each way."""
    stored = torch.channels_last_3d
    planes, weight = planes.contiguous(memory_format=stored), weight.contiguous(memory_format=stored)
    halo = [0, 1, 1]
    upstream = convolve(planes, weight, None, halo, "channels_last").contiguous(memory_format=stored)

    def both(way: Way) -> None:
        # What comes out is stored as what went in, as a sweep would.
        convolve(planes, weight, None, halo, way).contiguous(memory_format=stored)
        weight_gradients(upstream, planes, weight, halo, way)

    return {way: _time(partial(both, way), planes.device) for way in get_args(Way)}


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """The fastest of five runs, after one to warm up."""
    best = float("inf")
    for repeat in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best
