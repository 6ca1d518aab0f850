"""Real anatomy with a known truth: measured k-space sampled again, and images measured by simulated coils."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.data import KSpace, ScanInfo
from melcore.io.cfl import read_cfl
from melcore.physics.fourier import fft, ifft
from melcore.preprocess import masks
from melcore.preprocess.noise_level import estimate_noise, noise_deviation
from training.cases import Case, Exam, make_case
from training.exams import simulated_exam

# SNR of what is simulated in the named rows.
_HEART_SNR, _HEAD_SNR = 40, 30


def measured_brains(data: Path) -> Iterator[Case]:
    """Two slices with two phase-encoding directions, 8 coils: nothing is simulated, nothing is known of the noise.

    The references are the fully sampled scans themselves, and have their noise.
    """
    folder = data / "2d_multicoil"
    first = _exam("brain", _plane(_first(read_cfl(folder / "full"))))
    second = _exam("brain b", _plane(np.load(folder / "brain_ksp_a.npy")))
    grid = (_plane(_first(read_cfl(folder / "und2x2"))) != 0).any(1, keepdim=True)
    sparse = (_plane(np.load(folder / "cartesian_ksp.npy")) != 0).any(1, keepdim=True)
    poisson = masks.k_space_mask(masks.poisson_disc((230, 180), 4, calibration=(24, 24), seed=4), ("y", "x"))
    for exam, mask, label in (
        (first, grid, "2x2 grid"),
        (first, poisson, "Poisson"),
        (second, sparse, "Poisson 12.4 %"),
    ):
        yield make_case(exam, mask=mask, label=label, noise_known=False)


def hearts(
    data: Path, accelerations: tuple[float, ...] = (4, 8, 12), *, slices: tuple[int, ...] = (8,)
) -> Iterator[Case]:
    """Cines of a pig's heart, 128 x 128 x 20, 8 simulated coils, lines that change from frame to frame."""
    for index in slices:
        for acceleration in accelerations:
            lines = masks.variable_density_kt(20, 128, acceleration, 8, seed=int(acceleration))
            mask = masks.k_space_mask(lines, ("time", "y"))
            yield make_case(heart(data, index), mask=mask, label="time-lines", snr=_HEART_SNR, seed=8)


def heads(data: Path, rows: tuple[tuple[str, float], ...]) -> Iterator[Case]:
    """Heads of 2.5 mm in 3D, 8 simulated coils, Poisson-disc sampling; names with accelerations."""
    for name, acceleration in rows:
        exam = head(data, name)
        plane = (exam.complete.shape[3], exam.complete.shape[4])
        mask = masks.poisson_disc(plane, acceleration, calibration=(16, 16), seed=int(acceleration))
        yield make_case(exam, mask=masks.k_space_mask(mask, ("z", "y")), label="poisson", snr=_HEAD_SNR, seed=8)


def heart(data: Path, index: int = 8, frames: int = 20, size: int = 128) -> Exam:
    """A slice of the pig's heart without noise; every so many frames that the beat stays whole."""
    with np.load(data / "2dt" / "pig_cine_sax_20slices_20phases.npz") as file:
        images = file["images"]
    # 20 slices x 20 phases x 256 x 256; made smaller by cropping k-space, which keeps the anatomy whole.
    chosen = np.arange(frames) * len(images[index]) // frames
    image = torch.from_numpy(np.asarray(images[index][chosen], np.complex64))[:, None]
    exam = simulated_exam(f"pig heart slice {index}", _with_phase(smaller(image, (1, size, size))), coils=8, seed=8)
    return _of("pig", exam)


def head(data: Path, name: str = "chris_t1", voxel: float = 2.5) -> Exam:
    """A head in 3D without noise; `voxel` in mm."""
    image = _with_phase(_volume(data, name, voxel))
    return _of(_HEADS.get(name, name), simulated_exam(name, image, coils=8, seed=8))


def slice_of_head(data: Path, name: str, fraction: float = 0.6, voxel: float = 1.5) -> Exam:
    """One axial slice of a head, at a fraction of its height."""
    volume = _volume(data, name, voxel)
    image = _with_phase(volume[:, int(fraction * volume.shape[1])].unsqueeze(1))
    return _of(_HEADS.get(name, name), simulated_exam(f"{name} slice", image, coils=8, seed=8))


def brain_of_32_coils(data: Path) -> Exam:
    """A measured complex image seen by 32 measured-looking coils."""
    from scipy.io import loadmat

    file = loadmat(data / "2d_multicoil" / "xGT.mat")
    image = torch.from_numpy(np.ascontiguousarray(file["xGT"], np.complex64))
    maps = torch.from_numpy(np.ascontiguousarray(file["S"][:, :, 0].transpose(2, 0, 1), np.complex64))
    y, x = image.shape
    return Exam("brain, 32 coils", "xGT", fft((maps * image)[None, :, None, None]), 0.0, ScanInfo((1, y, x), (1, y, x)))


def measured_brain(data: Path) -> Exam:
    """The first measured brain, to which noise is added."""
    return _exam("brain", _plane(_first(read_cfl(data / "2d_multicoil" / "full"))))


# Probably the same head: see the note beside the data.
_HEADS = {"chris_t1": "chris", "chris_PD": "chris"}


def smaller(image: Tensor, matrix: tuple[int, ...]) -> Tensor:
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


def _of(subject: str, exam: Exam) -> Exam:
    return Exam(exam.name, subject, exam.complete, exam.noise, exam.info, exam.taken, exam.origin)


def _exam(name: str, complete: Tensor) -> Exam:
    """Measured data as they are: not white, and not brought near 1."""
    grid = (complete.shape[-3], complete.shape[-2], complete.shape[-1])
    covariance = estimate_noise(KSpace(complete, torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool), ScanInfo(grid, grid)))
    if covariance is None:
        raise SystemExit(f"the noise of {name} cannot be estimated")
    return Exam(name, name, complete, noise_deviation(covariance), ScanInfo(grid, grid), origin="measured")


def _first(array: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """BART's (1, y, x, coil, ...) to (coil, y, x)."""
    return np.asarray(array).reshape(array.shape[1:4]).transpose(2, 0, 1)


def _plane(array: npt.NDArray[np.complex64]) -> Tensor:
    """``(coil, y, x)`` to k-space of one plane."""
    return torch.from_numpy(np.ascontiguousarray(array, np.complex64))[None, :, None, None]


def _with_phase(magnitude: Tensor) -> Tensor:
    """A smooth phase for magnitudes ``(time, z, y, x)``."""
    z, y, x = (torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in magnitude.shape[1:])
    z, y, x = torch.meshgrid(z, y, x, indexing="ij")
    return magnitude.abs() * torch.polar(torch.ones(()), 0.8 * y - 0.5 * x + 0.4 * z + 0.6 * (x * y - z * z))


def _volume(data: Path, name: str, voxel: float) -> Tensor:
    """Magnitude ``(1, z, y, x)``."""
    volume, spacing = _read_nifti(data / "3d" / f"{name}.nii.gz")
    matrix = tuple(round(size * step / voxel / 2) * 2 for size, step in zip(volume.shape, spacing, strict=True))
    return smaller(torch.from_numpy(volume.astype(np.complex64))[None], matrix)


def _read_nifti(path: Path) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """Volume of 8-bit values, reversed to ``(z, y, x)``, and its voxel sizes in mm; only what these files need."""
    with gzip.open(path) as file:
        content = file.read()
    sizes = np.frombuffer(content, "<i2", 3, 42)
    spacing = np.frombuffer(content, "<f4", 3, 80)
    offset = int(np.frombuffer(content, "<f4", 1, 108)[0])
    volume = np.frombuffer(content, np.uint8, int(np.prod(sizes, dtype=int)), offset).reshape(sizes, order="F")
    return volume.transpose(2, 1, 0), tuple(float(step) for step in spacing[::-1])
