"""Real anatomy with a known truth: measured k-space sampled again, and images measured by simulated coils."""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from melcore.data import KSpace, ScanInfo
from melcore.io.cfl import read_cfl
from melcore.physics import Sense
from melcore.physics.fourier import fft, ifft
from melcore.preprocess import masks
from melcore.preprocess.preparation import Preparation, prepare
from melcore.simulate.acquisition import simulate_k_space
from melcore.simulate.coils import coil_maps
from training.data import Example


@dataclass(frozen=True)
class RealScan:
    """Undersampled data, and the fully sampled data (noise-free where they are simulated) that they come from."""

    name: str
    k_space: KSpace
    complete: Tensor

    def example(self, settings: Preparation) -> Example:
        """Prepare the data, with all coils; the truth is the complete data combined with the estimated maps."""
        prepared = prepare(self.k_space, settings=replace(settings, coils=None))
        everywhere = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
        combine = Sense(prepared.coil_maps.data, everywhere, time=self.complete.shape[2])
        return Example(prepared, combine.adjoint(self.complete) / prepared.scale.view(-1, 1, 1, 1, 1, 1))


def measured_brains(data: Path) -> list[RealScan]:
    """Two slices with two phase-encoding directions, 8 coils: regular and Poisson-disc sampling."""
    folder = data / "2d_multicoil"
    full = _plane(read_cfl(folder / "full")[0, ..., 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].transpose(2, 0, 1))
    grid = _plane(read_cfl(folder / "und2x2")[0, ..., 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].transpose(2, 0, 1))
    other = _plane(np.load(folder / "brain_ksp_a.npy"))
    poisson = _plane(np.load(folder / "cartesian_ksp.npy"))
    regular = masks.k_space_mask(masks.poisson_disc((230, 180), 4, calibration=(24, 24), seed=4), ("y", "x"))
    return [
        _sampled("brain, 2x2 grid", full, (grid != 0).any(1, keepdim=True)),
        _sampled("brain, Poisson R=4", full, regular),
        _sampled("brain b, Poisson 12.4 %", other, (poisson != 0).any(1, keepdim=True)),
        _sampled("brain b, Poisson R=4", other, regular),
    ]


def beating_heart(data: Path, acceleration: float, frames: int = 20) -> RealScan:
    """Cine of a pig's heart, 128 x 128, measured by 8 simulated coils with lines that change from frame to frame."""
    with np.load(data / "2dt" / "pig_cine_sax_20slices_20phases.npz") as file:
        images = file["images"]
    # 20 slices x 20 phases x 256 x 256; halved by cropping k-space, which keeps the anatomy whole.
    image = torch.from_numpy(np.asarray(images[8], np.complex64))[:frames, None]
    image = _smaller(image, (1, 128, 128))
    lines = masks.variable_density_kt(frames, 128, acceleration, 8, seed=int(acceleration))
    mask = masks.k_space_mask(lines, ("time", "y"))
    return _simulated(f"pig heart, R={acceleration:g}", image, mask, snr=40)


def head(data: Path, acceleration: float, name: str = "chris_t1", voxel: float = 2.5) -> RealScan:
    """A head measured by 8 simulated coils with Poisson-disc sampling; `voxel` in mm."""
    volume, spacing = _read_nifti(data / "3d" / f"{name}.nii.gz")
    matrix = tuple(round(size * step / voxel / 2) * 2 for size, step in zip(volume.shape, spacing, strict=True))
    image = _smaller(torch.from_numpy(volume.astype(np.complex64))[None], matrix)
    plane = (image.shape[1], image.shape[2])
    mask = masks.poisson_disc(plane, acceleration, calibration=(16, 16), seed=int(acceleration))
    return _simulated(f"{name}, R={acceleration:g}", image, masks.k_space_mask(mask, ("z", "y")), snr=30)


def _plane(array: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    """``(coil, y, x)`` to k-space of one plane, whose values are brought near 1."""
    data = torch.from_numpy(np.ascontiguousarray(array, np.complex64))
    return data[None, :, None, None]


def _sampled(name: str, complete: Tensor, mask: Tensor) -> RealScan:
    grid = (complete.shape[-3], complete.shape[-2], complete.shape[-1])
    return RealScan(name, KSpace(complete * mask, mask, ScanInfo(grid, grid)), complete)


def _simulated(name: str, magnitude: Tensor, mask: Tensor, snr: float) -> RealScan:
    """Add a smooth phase, coils and noise to magnitudes ``(time, z, y, x)``."""
    z, y, x = (torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in magnitude.shape[1:])
    z, y, x = torch.meshgrid(z, y, x, indexing="ij")
    image = magnitude.abs() * torch.polar(torch.ones(()), 0.8 * y - 0.5 * x + 0.4 * z + 0.6 * (x * y - z * z))
    maps = coil_maps((magnitude.shape[1], magnitude.shape[2], magnitude.shape[3]), 8, seed=8)
    measured, truth = simulate_k_space(image.to(torch.complex64), maps, mask, snr=snr, seed=8)
    return RealScan(name, measured, fft(maps[None, :, None] * truth.data))


def _smaller(image: Tensor, matrix: tuple[int, ...]) -> Tensor:
    """Lower the resolution of ``(time, z, y, x)`` by cropping k-space, with a taper against ringing."""
    spectrum = fft(image)
    for axis, size in zip((1, 2, 3), matrix, strict=True):
        if size == image.shape[axis]:
            continue
        spectrum = spectrum.narrow(axis, image.shape[axis] // 2 - size // 2, size)
        taper = torch.hann_window(2 * size + 1, periodic=False)[size // 2 : size // 2 + size]
        shape = [1] * 4
        shape[axis] = size
        spectrum = spectrum * (taper / taper.max()).clamp(min=0.0).reshape(shape).sqrt()
    return ifft(spectrum).abs()


def _read_nifti(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:  # type: ignore[type-arg]
    """Volume of 8-bit values, reversed to ``(z, y, x)``, and its voxel sizes in mm; only what these files need."""
    with gzip.open(path) as file:
        content = file.read()
    sizes = np.frombuffer(content, "<i2", 3, 42)
    spacing = np.frombuffer(content, "<f4", 3, 80)
    offset = int(np.frombuffer(content, "<f4", 1, 108)[0])
    volume = np.frombuffer(content, np.uint8, int(np.prod(sizes, dtype=int)), offset).reshape(sizes, order="F")
    return volume.transpose(2, 1, 0), tuple(float(step) for step in spacing[::-1])
