"""A short probe of a device: what a Fourier transform costs beside a convolution."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def calibrate(device: torch.device | str = "cpu", *, size: int = 32, channels: int = 32) -> float:
    """Time of one operation of a Fourier transform relative to one of a convolution, on `device`.

    Parameters
    ----------
    size, channels
        Edge of the volume, and channels of the convolution, that are timed; the default takes under a second on a CPU.
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
    return (seconds[1] / fourier) / (seconds[0] / convolution)


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
