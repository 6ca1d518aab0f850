"""Measurements that are not what a scanner measures are doubted; sound ones are not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import shared
from torch import Tensor

from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.defects import defects, residuals
from melcore.io.cfl import read_cfl
from melcore.io.load import load_k_space
from melcore.physics import fft, ifft
from melcore.preprocess import masks
from melcore.preprocess.preparation import prepare
from melcore.quality import departures
from melcore.reconstruct import Reconstructor
from melcore.simulate.acquisition import simulate_k_space
from melcore.simulate.coils import coil_maps
from melcore.simulate.heart import random_cine
from melcore.simulate.phantom import random_anatomy

SHAPES = {"2d": (1, 80, 68), "3d": (20, 40, 36)}


@cache
def sound(dimensions: str, snr: float = 60, acceleration: float = 3) -> KSpace:
    shape = SHAPES[dimensions]
    if dimensions == "2d":
        mask = masks.k_space_mask(masks.uniform_lines(shape[1], round(acceleration), 20), ("y",))
    else:
        plane = masks.poisson_disc(shape[:2], acceleration, calibration=(12, 12), seed=1)
        mask = masks.k_space_mask(plane, ("z", "y"))
    image = random_anatomy(shape, seed=5)[None]
    return simulate_k_space(image, coil_maps(shape, 6, seed=3), mask, snr=snr, seed=4).k_space


def found_in(k_space: KSpace, maps: CoilMaps | None = None) -> list[str]:
    prepared = prepare(k_space, coil_maps=maps)
    return defects(prepared, residuals(prepared.initial, prepared))


def noise(data: Tensor, seed: int) -> Tensor:
    return torch.randn(data.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def lines_of(k_space: KSpace) -> Tensor:
    """(time, z, y) of each readout that was taken, from the centre outwards."""
    taken = k_space.mask[0, 0].expand(k_space.data.shape[2:]).any(-1).nonzero()
    centre = torch.tensor([n // 2 for n in k_space.data.shape[3:5]])
    return taken[(taken[:, 1:] - centre).square().sum(1).argsort(stable=True)]


def taken(k_space: KSpace) -> Tensor:
    return k_space.mask.expand_as(k_space.data)


def noisy_coil(k_space: KSpace) -> Tensor:
    data, level = k_space.data.clone(), 1e3 * 2**0.5
    if not k_space.noise.whitened:
        level = 1e3 * float(data[taken(k_space)].abs().median())
    data[:, 2] += level * noise(data[:, 2], 1) * taken(k_space)[:, 2]
    return data


def pure_noise(k_space: KSpace) -> Tensor:
    return 2**0.5 * noise(k_space.data, 1) * taken(k_space)


def spike(k_space: KSpace) -> Tensor:
    data = k_space.data.clone()
    t, z, y = lines_of(k_space)[-3].tolist()
    inside = taken(k_space)[0, 0, t, z, y].nonzero()
    x = int(inside[len(inside) // 3])
    data[0, :, t, z, y, x] += 0.3 * data.abs().max() * noise(data[0, :, 0, 0, 0, 0], 2)
    return data


def spiked_readout(k_space: KSpace) -> Tensor:
    data = k_space.data.clone()
    t, z, y = lines_of(k_space)[-5].tolist()
    data[0, :, t, z, y] += 0.05 * data.abs().max() * noise(data[0, :, t, z, y], 2) * taken(k_space)[0, :, t, z, y]
    return data


def clipped(k_space: KSpace) -> Tensor:
    most = 0.1 * float(k_space.data.abs().max())
    return torch.complex(k_space.data.real.clamp(-most, most), k_space.data.imag.clamp(-most, most))


def jumping_phase(k_space: KSpace) -> Tensor:
    data = k_space.data.clone()
    for t, z, y in lines_of(k_space)[::2].tolist():
        data[0, :, t, z, y] *= -1
    return data


def drifting_phase(k_space: KSpace) -> Tensor:
    data, lines = k_space.data.clone(), lines_of(k_space).tolist()
    for (t, z, y), angle in zip(lines, torch.rand(len(lines), generator=torch.Generator().manual_seed(1)), strict=True):
        data[0, :, t, z, y] *= torch.exp(2j * (angle - 0.5))
    return data


def swapped_lines(k_space: KSpace) -> Tensor:
    """Neighbours. Not one side of the centre for the other: that would be the exam of a mirrored patient."""
    data, lines = k_space.data.clone(), lines_of(k_space)
    chosen = sorted(lines[: len(lines) // 4 * 2].tolist())
    for (t, z, y), (u, a, b) in zip(chosen[::2], chosen[1::2], strict=True):
        data[0, :, t, z, y], data[0, :, u, a, b] = k_space.data[0, :, u, a, b], k_space.data[0, :, t, z, y]
    return data


DEFECTS: dict[Callable[[KSpace], Tensor], str] = {
    noisy_coil: "noise of a coil|so noisy",
    pure_noise: "nothing but noise",
    spike: "sample|readout",
    spiked_readout: "readout",
    clipped: "contradict",
    jumping_phase: "contradict",
    drifting_phase: "contradict",
    swapped_lines: "contradict",
}


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_what_no_scanner_measures_is_doubted(dimensions: str, defect: Callable[[KSpace], Tensor]) -> None:
    k_space = sound(dimensions)
    found = found_in(replace(k_space, data=defect(k_space)))
    assert any(word in words for words in found for word in DEFECTS[defect].split("|")), found


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("snr", [5, 60, 500])
@pytest.mark.parametrize("acceleration", [1.5, 5])
def test_sound_exams_are_not_doubted(dimensions: str, snr: float, acceleration: float) -> None:
    k_space = sound(dimensions, snr, acceleration)
    assert found_in(k_space) == []
    assert found_in(replace(k_space, noise=Noise())) == []


def test_a_noisy_coil_is_found_without_a_noise_scan_too() -> None:
    k_space = replace(sound("2d"), noise=Noise())
    assert found_in(replace(k_space, data=noisy_coil(k_space))) == ["coil 2 is so noisy that it hardly counts"]


def test_the_slice_is_named() -> None:
    k_space = sound("2d")
    data = torch.cat([k_space.data, clipped(k_space)])
    found = found_in(replace(k_space, data=data))
    assert found
    assert all(words.endswith("(slice 1)") for words in found)


def test_a_beating_heart_is_not_doubted() -> None:
    shape = (1, 72, 64)
    image = random_cine((8, *shape), seed=2)
    mask = masks.k_space_mask(masks.variable_density_kt(8, 72, 4, 10, seed=1), ("time", "y"))
    k_space = simulate_k_space(image, coil_maps(shape, 6, seed=1), mask, snr=60, seed=1).k_space
    assert found_in(k_space) == []
    assert found_in(replace(k_space, data=swapped_lines(k_space)))


def test_conventional_images_of_defective_data_are_doubted_with_a_warning() -> None:
    k_space = sound("2d")
    broken = replace(k_space, data=swapped_lines(k_space))
    warned = Reconstructor("none")(broken)
    assert warned.path_taken == "cg-sense"
    assert "contradict" in warned.doubts[0]
    assert warned.remarks == warned.doubts
    assert Reconstructor("none", on_doubt="record")(broken).remarks == ()
    assert Reconstructor("none")(k_space).doubts == ()


def test_an_image_that_misses_a_readout_is_doubted() -> None:
    """Only one: it hardly changes how the image fits the whole."""
    prepared = prepare(sound("2d", 500))
    _, _, y = lines_of(prepared.k_space)[6].tolist()
    k_space = fft(prepared.initial, (-2, -1))
    k_space[..., y, :] *= 0.5
    left = residuals(prepared.initial, prepared)
    assert departures(residuals(ifft(k_space, (-2, -1)), prepared), left)
    assert departures(left, left) == []


# --- measured exams ---------------------------------------------------------------------------------------------------


def brain(name: str) -> KSpace:
    folder = shared("data/2d_multicoil")
    if (folder / f"{name}.npy").exists():
        values = np.load(folder / f"{name}.npy")
    else:
        values = np.moveaxis(np.squeeze(read_cfl(folder / name)), -1, 0)
    data = torch.from_numpy(np.ascontiguousarray(values, np.complex64))[None, :, None, None]
    mask = (data != 0).any(1, keepdim=True)
    matrix = (1, data.shape[-2], data.shape[-1])
    return KSpace(data, mask[..., :1] if bool(mask.all()) else mask, ScanInfo(matrix, matrix))


BRAINS = ("full", "und2x2", "brain_ksp_a", "cartesian_ksp", "bartworkshop_ksp")


@pytest.mark.parametrize("name", BRAINS)
def test_measured_brains_are_not_doubted(name: str) -> None:
    assert found_in(brain(name)) == []


def phantoms() -> Iterator[Path]:
    yield from sorted(shared("data/ismrmrd").glob("*.h5"))


def test_measured_phantoms_are_not_doubted() -> None:
    for path in phantoms():
        k_space, calibration = load_k_space(path)
        prepared = prepare(k_space, calibration=calibration)
        assert defects(prepared, residuals(prepared.initial, prepared)) == [], path.name


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_measured_brain_with_a_defect_is_doubted(defect: Callable[[KSpace], Tensor]) -> None:
    k_space = brain("full")
    mask = masks.k_space_mask(masks.uniform_lines(k_space.data.shape[-2], 3, 24), ("y",))
    k_space = replace(k_space, data=k_space.data * mask, mask=mask)
    assert found_in(k_space) == []
    found = found_in(replace(k_space, data=defect(k_space)))
    assert any(word in words for words in found for word in DEFECTS[defect].split("|")), found
