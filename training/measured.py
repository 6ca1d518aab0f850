"""Measured, fully sampled k-space as a source: planes and volumes with their own coils and noise."""

import numpy as np
import torch
from torch import Tensor

from melcore.errors import DataError
from melcore.physics.fourier import ifft
from training.anatomies import Entry, Folder
from training.config import DataSettings


def draw_measured(
    folder: Folder, entry: Entry, settings: DataSettings, frames: int, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Draw whitened, fully sampled k-space, and its SNR.

    Of a volume, 2D examples are planes across the readout (two phase-encoding directions). A matrix larger than the
    configured one is cut to the middle of its k-space; frames are taken in succession from anywhere.

    Returns
    -------
    k_space : Tensor
        Complex ``(1, coil, time, z, y, x)``, its noise of variance 2.
    signal : float
        Mean of the root sum of squares of the coil images where it is above a tenth of its maximum.
    """
    index = int(rng.integers(entry.shape[0]))
    data = folder.read(entry, "k_space", index)
    coils, time, z = data.shape[:3]
    if settings.dimensions != "2d+t":
        start = int(rng.integers(time))
        data = data[:, start : start + 1]
    elif time > frames:
        start = int(rng.integers(time))
        data = data[:, (torch.arange(frames) + start) % time]
    if settings.dimensions != "3d" and z > 1:
        hybrid = ifft(data, (-1,))
        energy = hybrid.abs().square().sum((0, 1, 2, 3))
        bright = torch.nonzero(energy > 0.2 * energy.max()).flatten()
        position = int(bright[int(rng.integers(len(bright)))])
        data = hybrid[..., position].unsqueeze(2)  # (coil, time, 1, z, y): y is the readout's place now
    for axis, most in ((-3, settings.z[1]), (-2, settings.y[1]), (-1, settings.x[1])):
        size = data.shape[axis]
        if size > most > 1 or (size > most and settings.dimensions == "3d"):
            data = data.narrow(axis, size // 2 - most // 2, most)
    magnitude = ifft(data, (-3, -2, -1)).abs().square().sum(0).sqrt()
    # Noise adds to sums of squares: it is taken off.
    magnitude = (magnitude.square() - 2 * coils).clamp(min=0).sqrt()
    signal = magnitude[magnitude > 0.1 * magnitude.max()]
    if signal.numel() == 0:
        raise DataError(f"slice {index} of {folder.path / entry.file} holds no signal above its noise.")
    return data.unsqueeze(0).contiguous(), float(signal.mean())
