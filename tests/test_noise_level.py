"""The noise of exams without a noise scan: found from their own samples, and what is done with it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import shared

from melcore.data import KSpace, Noise, ScanInfo
from melcore.io.cfl import read_cfl
from melcore.io.load import load_k_space
from melcore.physics import fft, ifft
from melcore.preprocess import masks
from melcore.preprocess.noise_level import AirBeside, estimate_noise, noise_deviation, whitened_by_estimate
from melcore.preprocess.preparation import prepare
from melcore.simulate.acquisition import simulate_k_space
from melcore.simulate.coils import coil_maps
from melcore.simulate.exam import write_exam
from melcore.simulate.noise import random_noise_covariance
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.protocol import Protocol

SLICE, VOLUME = (1, 96, 84), (24, 40, 48)


def sampling(kind: str, shape: tuple[int, int, int]) -> torch.Tensor:
    z, y, x = shape
    if kind == "lines":
        return masks.k_space_mask(masks.uniform_lines(y, 3, 20), ("y",))
    if kind == "readout too":
        return masks.k_space_mask(masks.poisson_disc((y, x), 4, calibration=(20, 20), seed=1), ("y", "x"))
    return masks.k_space_mask(masks.poisson_disc((z, y), 4, calibration=(12, 12), seed=1), ("z", "y"))


def measured(
    shape: tuple[int, int, int], kind: str, snr: float, *, coils: int = 6, window: float = 1.0
) -> tuple[KSpace, torch.Tensor]:
    """An anatomy with correlated noise, and the covariance of that; a part of the field of view as a field is full."""
    whole = tuple(n if n == 1 else round(n / window) for n in shape)
    image = random_anatomy((whole[0], whole[1], whole[2]), seed=5)
    starts = [(w - n) // 2 for w, n in zip(whole, shape, strict=True)]
    image = image[tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))]
    covariance = random_noise_covariance(coils, 0.4, seed=2)
    scan = simulate_k_space(
        image[None], coil_maps(shape, coils, seed=3), sampling(kind, shape), snr=snr, covariance=covariance, seed=4
    )
    return scan.k_space, 2 * covariance


def deviation(covariance: torch.Tensor) -> float:
    return float(covariance.diagonal().real.log().mean().div(2).exp())


@pytest.mark.parametrize("snr", [5, 40, 300])
@pytest.mark.parametrize(("shape", "kind"), [(SLICE, "lines"), (VOLUME, "planes")])
def test_where_there_is_air_the_level_is_right_within_a_tenth(shape, kind, snr):
    k_space, covariance = measured(shape, kind, snr)
    found = estimate_noise(k_space)
    assert noise_deviation(found) == pytest.approx(deviation(covariance), rel=0.1)


@pytest.mark.parametrize("snr", [5, 40])
def test_an_undersampled_readout_leaves_the_edge_of_k_space(snr):
    """Where the phantom has more signal than anatomies: an upper bound."""
    k_space, covariance = measured(SLICE, "readout too", snr)
    assert 0.9 < noise_deviation(estimate_noise(k_space)) / deviation(covariance) < 1.7


@pytest.mark.parametrize("snr", [5, 40])
def test_where_the_object_fills_the_field_the_level_is_too_high_but_not_by_much(snr):
    k_space, covariance = measured(SLICE, "lines", snr, window=0.5)
    ratio = noise_deviation(estimate_noise(k_space)) / deviation(covariance)
    assert 0.9 < ratio < 2


def test_whitening_by_the_estimate_makes_the_noise_white_in_the_units_of_the_data():
    k_space, covariance = measured(SLICE, "lines", 100)
    white, _, mixing = whitened_by_estimate(replace(k_space, noise=Noise()))
    assert (white.noise.whitened, white.noise.source) == (True, "estimated")
    assert white.noise.level[0] == pytest.approx(deviation(covariance), rel=0.1)
    assert "estimated from the data" in white.info.provenance["noise"]
    matrix = mixing[0].to(torch.complex128)
    left = matrix @ covariance @ matrix.mH / white.noise.level[0] ** 2
    assert torch.linalg.cond(left) < 1.7 < torch.linalg.cond(covariance) / 2
    again, *_ = whitened_by_estimate(white)
    assert again is white


def test_sigma_is_the_noise_in_units_of_the_image_whatever_the_units_of_the_data():
    k_space, _ = measured(SLICE, "lines", 60)
    prepared = [prepare(replace(k_space, data=k_space.data * factor, noise=Noise())) for factor in (1.0, 3e7)]
    assert [one.sigma_source for one in prepared] == ["estimated", "estimated"]
    assert torch.allclose(prepared[0].sigma, prepared[1].sigma, rtol=1e-3)
    # Noise of variance 2, against an image of a mean of 60 whose bright part is up to twice that.
    assert math.sqrt(2) / 60 / 2 < float(prepared[0].sigma) < math.sqrt(2) / 60
    known = prepare(measured(SLICE, "lines", 60)[0])
    assert known.sigma_source == "estimated"
    told = prepare(replace(k_space, noise=Noise(whitened=True, source="scan")))
    assert told.sigma_source == "scan"
    assert torch.allclose(told.sigma * told.scale, torch.tensor(2.0).sqrt())


def test_elements_of_a_batch_have_noise_of_their_own():
    one, _ = measured(SLICE, "lines", 20)
    other, _ = measured(SLICE, "lines", 200)
    both = replace(one, data=torch.cat([one.data, 7 * other.data]))
    levels = whitened_by_estimate(replace(both, noise=Noise()))[0].noise.level
    for level, alone, factor in zip(levels, (one, other), (1, 7), strict=True):
        assert level == pytest.approx(factor * noise_deviation(estimate_noise(alone)), rel=1e-3)


def test_dead_coils_and_data_without_noise_do_no_harm():
    k_space, _ = measured(SLICE, "lines", 40)
    k_space.data[:, 2] = 0
    prepared = prepare(replace(k_space, noise=Noise()))
    assert torch.isfinite(prepared.initial.abs()).all()
    clean = random_anatomy(SLICE, seed=1) * coil_maps(SLICE, 4, seed=1)
    mask = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    quiet = prepare(KSpace(fft(clean)[None, :, None], mask, ScanInfo(SLICE, SLICE)))
    assert 0 < float(quiet.sigma) < 0.01
    assert torch.isfinite(quiet.initial.abs()).all()


@pytest.mark.parametrize("shape", [(2, 64, 48), (16, 40, 32)])
def test_oversampled_readouts_show_the_air_beside_the_field(tmp_path, shape):
    """Even of an object without air around it; the level is that of the file's receivers, in raw units."""
    protocol = Protocol(
        shape, slices=shape[0] == 2, coils=4, acceleration=2.0, calibration=(8, 16), noise_scan=False, seed=3
    )
    path = tmp_path / "exam.h5"
    write_exam(path, protocol)
    k_space, _ = load_k_space(path)
    assert k_space.air is not None
    assert k_space.air.shape[1:] == (4, 2, shape[2] * protocol.oversampling // 16)
    white, *_ = whitened_by_estimate(k_space)
    covariance = 1e-12 * random_noise_covariance(4, seed=3 + 3) * (2.5 / 4 / 0.793)
    for level in white.noise.level:
        assert level == pytest.approx(deviation(covariance), rel=0.1)


def test_of_long_scans_some_lines_are_kept():
    air, generator = AirBeside(), torch.Generator().manual_seed(0)
    for _ in range(50):
        air.add(torch.randn(100, 3, 64, dtype=torch.complex64, generator=generator), 32)
    assert 400 < len(air.samples) <= 1024
    assert float(air.samples.abs().square().mean()) == pytest.approx(1, rel=0.05)
    none = AirBeside()
    none.add(torch.randn(5, 3, 64, dtype=torch.complex64), 64)
    assert none.samples is None


def test_measured_brains_have_the_noise_of_their_corners():
    """The corners of the fully sampled images are air; half of them is enough for the estimate of one sampled 2x2."""
    folder = shared("data/2d_multicoil")
    full = np.moveaxis(np.squeeze(read_cfl(folder / "full")), -1, 0)[None, :, None, None]
    grid = np.moveaxis(np.squeeze(read_cfl(folder / "und2x2")), -1, 0)[None, :, None, None]
    images = ifft(torch.from_numpy(np.ascontiguousarray(full)), (-2, -1))[0, :, 0, 0]
    corners = torch.stack(
        [images[:, a, b] for a in (slice(12), slice(-12, None)) for b in (slice(12), slice(-12, None))]
    )
    truth = float(corners.abs().square().mean((2, 3)).min(0).values.log().mean().div(2).exp())
    for values, tolerance in ((full, 0.06), (grid, 0.12)):
        data = torch.from_numpy(np.ascontiguousarray(values)).to(torch.complex64)
        mask = (data != 0).any(1, keepdim=True)
        mask = mask[..., :1] if bool(mask.all()) else mask
        matrix = (1, data.shape[-2], data.shape[-1])
        found = estimate_noise(KSpace(data, mask, ScanInfo(matrix, matrix)))
        assert noise_deviation(found) == pytest.approx(truth, rel=tolerance)
