"""Draws simulated scans: anatomy, coils, noise and sampling mask, from the ranges of a configuration."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from melcore.data import KSpace, Noise
from melcore.physics.fourier import fft
from melcore.preprocess import masks
from melcore.preprocess.whitening import NoiseCovariance, whitening_matrix
from melcore.simulate.acquisition import simulate_k_space
from melcore.simulate.coils import coil_maps
from melcore.simulate.heart import random_cine
from melcore.simulate.noise import random_noise_covariance
from melcore.simulate.phantom import random_anatomy
from training.config import DataSettings, MaskSettings


@dataclass(frozen=True)
class Scan:
    """A simulated scan, whitened.

    Attributes
    ----------
    k_space
        Undersampled, with noise.
    noiseless
        Fully sampled data of the same coils without noise, ``(batch, coil, time, z, y, x)``.
    """

    k_space: KSpace
    noiseless: Tensor


def simulate(settings: DataSettings, rng: np.random.Generator) -> Scan:
    """Draw one scan.

    Parameters
    ----------
    settings
        Ranges to draw from.
    rng
        Source of all randomness.
    """
    # Multiples of 4 have fast Fourier transforms, and matrices of scanners are even.
    matrix = (_size(rng, settings.z), _size(rng, settings.y), _size(rng, settings.x))
    frames, coils = _whole(rng, settings.frames), _whole(rng, settings.coils)
    # On a small matrix, a window of a larger field of view shows finer structure than the whole head would.
    zoom = rng.uniform(*settings.zoom)
    whole = tuple(size if size == 1 else round(size * zoom) for size in matrix)
    image = _anatomy(whole, frames, rng)
    # The coils surround the window: those of the whole head would hardly encode so small a field of view.
    maps = coil_maps(matrix, coils, seed=_seed(rng))
    image = image[:, *(_window(rng, large, small) for large, small in zip(whole, matrix, strict=True))]

    if settings.phase > 0:
        image = add_phase(image, settings.phase, rng)
    mask = draw_mask(settings.masks, matrix, frames, rng)
    covariance = random_noise_covariance(coils, rng.uniform(0, settings.correlation), seed=_seed(rng))
    snr = math.exp(rng.uniform(*np.log(settings.snr)))
    measured, truth = simulate_k_space(image, maps, mask, snr=snr, covariance=covariance, seed=_seed(rng))
    # Whitened by the covariance itself: what little an estimate would differ by, no network can see.
    whitening = math.sqrt(2) * whitening_matrix(NoiseCovariance(2 * covariance, 0.0, 0), 0.0)
    noiseless = torch.einsum("vc,bctzyx->bvtzyx", whitening, fft(maps[None, :, None] * truth.data))
    data = torch.einsum("vc,bctzyx->bvtzyx", whitening, measured.data)
    return Scan(replace(measured, data=data, noise=Noise(whitened=True, source="simulated")), noiseless)


def add_phase(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Add what measured phase has beyond a smooth ramp, to images ``(time, z, y, x)``.

    The brightest tissue, mostly fat, is turned by any angle as by its chemical shift (without this, networks take the
    scalp of measured heads for an artefact), and the field is disturbed locally, by about `strength` in rad.
    """
    turn = rng.uniform(-math.pi, math.pi) * float(rng.random() < 0.7)
    bright = torch.sigmoid((image.abs() - rng.uniform(0.7, 1.1)) / 0.05)
    coarse = [1 if size == 1 else int(rng.integers(4, 15)) for size in image.shape[1:]]
    knots = torch.from_numpy(rng.standard_normal((1, 1, *coarse)).astype(np.float32))
    field = functional.interpolate(knots, image.shape[1:], mode="trilinear", align_corners=True)[0]
    return image * torch.polar(torch.ones(()), turn * bright + strength * rng.uniform(0, 1) * field)


def draw_mask(kinds: list[MaskSettings], matrix: tuple[int, int, int], frames: int, rng: np.random.Generator) -> Tensor:
    """Draw a kind by its weight, an acceleration and a calibration size, and the mask itself: six axes, boolean."""
    weights = np.array([kind.weight for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    acceleration, calibration = rng.uniform(*kind.acceleration), _whole(rng, kind.calibration)
    z, y, x = matrix
    if kind.kind == "poisson":
        plane, axes = ((z, y), ("z", "y")) if z > 1 else ((y, x), ("y", "x"))
        # On a small matrix the centre must leave something to sample elsewhere.
        calibration = min(calibration, int(math.sqrt(0.6 * plane[0] * plane[1] / acceleration)), *plane)
        centre = (calibration, calibration)
        mask = masks.poisson_disc(
            plane, acceleration, calibration=centre, seed=_seed(rng), variable_density=rng.uniform(0, 2)
        )
        return masks.k_space_mask(mask, axes)
    if kind.kind == "grid":
        plane, axes = ((z, y), ("z", "y")) if z > 1 else ((y, x), ("y", "x"))
        least, most = kind.acceleration
        steps = [(a, b) for a in range(1, 5) for b in range(1, 5) if least <= a * b <= most]
        first, second = steps[rng.integers(len(steps))]
        return masks.k_space_mask(_grid(plane, (first, second), calibration, rng), axes)
    if kind.kind == "uniform lines":
        return masks.k_space_mask(masks.uniform_lines(y, round(acceleration), calibration), ("y",))
    calibration = min(calibration, int(0.95 * y / acceleration))
    if kind.kind == "random lines":
        return masks.k_space_mask(masks.random_lines(y, acceleration, calibration, seed=_seed(rng)), ("y",))
    lines = masks.variable_density_kt(frames, y, acceleration, calibration, seed=_seed(rng), decay=rng.uniform(0.5, 4))
    return masks.k_space_mask(lines, ("time", "y"))


def _grid(plane: tuple[int, int], steps: tuple[int, int], calibration: int, rng: np.random.Generator) -> Tensor:
    """Every n-th sample along both axes, with a random offset, and a square centre."""
    mask = torch.zeros(plane, dtype=torch.bool)
    first, second = (int(rng.integers(step)) for step in steps)
    mask[first :: steps[0], second :: steps[1]] = True
    sizes = [min(calibration, n) for n in plane]
    centre = [slice(n // 2 - size // 2, n // 2 - size // 2 + size) for n, size in zip(plane, sizes, strict=True)]
    mask[centre[0], centre[1]] = True
    return mask


def _anatomy(shape: tuple[int, ...], frames: int, rng: np.random.Generator) -> Tensor:
    """Complex ``(time, z, y, x)``."""
    z, y, x = shape
    if frames > 1:
        return random_cine((frames, z, y, x), seed=_seed(rng))
    return random_anatomy((z, y, x), seed=_seed(rng))[None]


def _whole(rng: np.random.Generator, span: tuple[int, int]) -> int:
    return int(rng.integers(span[0], span[1] + 1))


def _size(rng: np.random.Generator, span: tuple[int, int]) -> int:
    size = _whole(rng, span)
    return size if size < 4 else size // 4 * 4


def _window(rng: np.random.Generator, whole: int, kept: int) -> slice:
    start = int(rng.integers(whole - kept + 1))
    return slice(start, start + kept)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
