"""Measured k-space as a source: planes and volumes with their own coils and noise."""

import numpy as np
import torch
from torch import Tensor

from melcore.data import KSpace, Noise, ScanInfo
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
        data = hybrid[..., _bright(hybrid, rng)].unsqueeze(2)  # (coil, time, 1, z, y): y is the readout's place now
    for axis, most in ((-3, settings.z[1]), (-2, settings.y[1]), (-1, settings.x[1])):
        size = data.shape[axis]
        if size > most > 1 or (size > most and settings.dimensions == "3d"):
            data = data.narrow(axis, size // 2 - most // 2, most)
    data = _turned(data, settings.dimensions, rng)
    magnitude = ifft(data, (-3, -2, -1)).abs().square().sum(0).sqrt()
    # Noise adds to sums of squares: it is taken off.
    magnitude = (magnitude.square() - 2 * coils).clamp(min=0).sqrt()
    signal = magnitude[magnitude > 0.1 * magnitude.max()]
    if signal.numel() == 0:
        raise DataError(f"slice {index} of {folder.path / entry.file} holds no signal above its noise.")
    return data.unsqueeze(0).contiguous(), float(signal.mean())


def draw_undersampled(
    folder: Folder, entry: Entry, settings: DataSettings, rng: np.random.Generator
) -> tuple[KSpace, KSpace | None]:
    """Draw an undersampled scan as it is, whitened, and its calibration lines if they are separate.

    Of a volume with a fully sampled readout, 2D examples are planes across it.

    Raises
    ------
    DataError
        If a plane of a volume is wanted whose readout is undersampled.
    """
    index = int(rng.integers(entry.shape[0]))
    names = ("k_space", "mask", "calibration", "calibration_mask")
    held = {name: folder.read(entry, name, index).unsqueeze(0) for name in names if folder.holds(entry, name)}
    if settings.dimensions == "2d":
        frame = int(rng.integers(entry.shape[2]))
        held = {name: tensor[:, :, frame : frame + 1] for name, tensor in held.items()}
        if entry.shape[3] > 1:
            held = _plane(held, rng, f"slice {index} of {folder.path / entry.file}")
    scans = []
    for data, mask in (names[:2], names[2:]):
        if data in held:
            z, y, x = held[data].shape[-3:]
            white = Noise(whitened=True, source="file")
            scans.append(KSpace(held[data], held[mask], ScanInfo((z, y, x), (z, y, x)), white))
    return scans[0], scans[1] if len(scans) > 1 else None


def _plane(held: dict[str, Tensor], rng: np.random.Generator, name: str) -> dict[str, Tensor]:
    """One position along the readout, whose place the first phase-encoding direction takes."""
    if any(held[mask].shape[-1] > 1 for mask in ("mask", "calibration_mask") if mask in held):
        raise DataError(f"{name} is no plane, and its readout is not sampled entirely.")
    hybrids = {key: tensor if tensor.dtype == torch.bool else ifft(tensor, (-1,)) for key, tensor in held.items()}
    position = _bright(hybrids["k_space"], rng)
    return {
        key: tensor[..., 0 if tensor.dtype == torch.bool else position].unsqueeze(3) for key, tensor in hybrids.items()
    }


def _bright(hybrid: Tensor, rng: np.random.Generator) -> int:
    """A position along the last axis at which there is something."""
    energy = hybrid.abs().square().flatten(0, -2).sum(0)
    bright = torch.nonzero(energy > 0.2 * energy.max()).flatten()
    return int(bright[int(rng.integers(len(bright)))])


def _turned(data: Tensor, dimensions: str, rng: np.random.Generator) -> Tensor:
    """The same object mirrored, and in planes with y and x exchanged: all is sampled, and noise is white."""
    if dimensions == "2d" and rng.random() < 0.5:
        data = data.transpose(-2, -1)
    for axis in (-3, -2, -1):
        if data.shape[axis] > 1 and rng.random() < 0.5:
            # k to -k; of an even axis the first sample has no counterpart, and stays.
            data = data.flip(axis).roll(1 - data.shape[axis] % 2, axis)
    return data
