"""Partial Fourier methods bring back what one side of k-space lacks, and what they did is recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from melcore.data import KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError
from melcore.io.cfl import read_cfl
from melcore.layout import k_space_from_bart
from melcore.physics import PartialFourierWarning, fft, find_partial_fourier, homodyne, ifft, pocs
from melcore.preprocess.partial_fourier import treat_partial_fourier
from melcore.simulate.phantom import random_anatomy
from tests.cases import shared
from tests.laws import relative

ONE_AXIS = [(axis, last, fraction) for axis in (-3, -2, -1) for last in (False, True) for fraction in (0.6, 0.75)]


def phantom(matrix: tuple[int, int, int]) -> Tensor:
    """Anatomy with a phase that is smooth but neither constant nor linear, for two coils and two frames."""
    places = [(torch.arange(n, dtype=torch.float64) - n // 2) / max(n / 2, 1) for n in matrix]
    z, y, x = torch.meshgrid(*places, indexing="ij")
    phases = [1 + 1.5 * x - y + 0.8 * x * y + 0.7 * z + c * (0.6 * y * y + 0.4 * z * x) for c in range(2)]
    image = torch.stack([torch.polar(random_anatomy(matrix, seed=4).abs().double(), phase) for phase in phases])
    return torch.stack([image, 0.8 * image], dim=1)[None]


def one_sided(matrix: tuple[int, int, int], axis: int, last: bool, fraction: float) -> Tensor:
    """The last or the first samples along an axis."""
    size = matrix[axis]
    index, kept = torch.arange(size), round(size * fraction)
    sampled = index >= size - kept if last else index < kept
    shape = [1] * 6
    shape[axis] = size
    return sampled.view(shape).expand(1, 1, 1, *matrix)


@pytest.mark.parametrize(("axis", "last", "fraction"), ONE_AXIS)
def test_fills_better_than_zeros(axis: int, last: bool, fraction: float) -> None:
    """POCS at least 3 times as well, homodyne twice; along z, y and the readout, from either side."""
    matrix = (40, 41, 22) if axis == -3 else (5, 64, 61)
    truth = phantom(matrix)
    mask = one_sided(matrix, axis, last, fraction)
    k_space = fft(truth) * mask
    zeros = relative(ifft(k_space), truth)
    filled = pocs(k_space, mask)
    assert filled.converged
    assert relative(filled.image, truth) < zeros / 3
    assert relative(homodyne(k_space, mask), truth) < zeros / 2


def test_pocs_fills_two_axes_and_keeps_the_samples() -> None:
    matrix = (24, 40, 15)
    truth = phantom(matrix)
    mask = one_sided(matrix, -3, True, 0.75) & one_sided(matrix, -2, False, 0.7)
    k_space = fft(truth) * mask
    filled = pocs(k_space, mask)
    assert relative(fft(filled.image) * mask, k_space) < 1e-12
    assert relative(filled.image, truth) < relative(ifft(k_space), truth) / 1.3
    with pytest.raises(DataError, match=r"of z .* and .* of y .*: use pocs"):
        homodyne(k_space, mask)


def test_a_real_image_comes_back_whole() -> None:
    """Without phase errors the missing half is known exactly."""
    matrix = (1, 32, 27)
    truth = random_anatomy(matrix, seed=4).abs().double()[None, None, None] + 0j
    mask = one_sided(matrix, -1, True, 0.6)
    k_space = fft(truth) * mask
    assert relative(homodyne(k_space, mask), truth) < 0.02
    assert relative(pocs(k_space, mask, relative_tolerance=1e-8).image, truth) < 0.02


def test_pocs_says_when_it_did_not_converge() -> None:
    matrix = (1, 32, 27)
    mask = one_sided(matrix, -1, True, 0.6)
    filled = pocs(fft(phantom(matrix)) * mask, mask, max_iterations=2, relative_tolerance=1e-9)
    assert not filled.converged
    assert filled.iterations == 2
    assert filled.change > 1e-9


@pytest.mark.parametrize("size", [31, 32])
@pytest.mark.parametrize(("start", "stop"), [(0, 32), (10, 32), (0, 20), (3, 30)])
def test_finds_which_part_is_sampled(size: int, start: int, stop: int) -> None:
    mask = torch.zeros(1, 1, 2, 4, size, 1, dtype=torch.bool)
    mask[:, :, :, ::2, start:stop] = True
    parts = find_partial_fourier(mask)
    if (start, stop) in ((0, 32), (3, 30)):
        assert parts == ()
    else:
        (part,) = parts
        stop = min(stop, size)
        assert (part.axis, part.start, part.stop, part.size) == (-2, start, stop, size)
        assert part.overlap == min(size // 2 - start, stop - 1 - size // 2)
        assert str(part) == f"{(stop - start) / size:.0%} of y ({start} to {stop - 1} of {size})"


@pytest.mark.parametrize("method", [homodyne, pocs])
def test_what_cannot_be_filled_is_named(method: object) -> None:
    assert callable(method)
    matrix = (1, 32, 10)
    k_space = fft(phantom(matrix))
    with pytest.raises(DataError, match="no axis of k-space is one-sided"):
        method(k_space, torch.ones(1, 1, 1, *matrix, dtype=torch.bool))
    with pytest.raises(DataError, match=r"beyond the centre \(16\).*50% of y \(16 to 31 of 32\)"):
        method(k_space, one_sided(matrix, -2, True, 0.5))
    with pytest.raises(ShapeError, match="does not broadcast"):
        method(k_space, torch.ones(1, 1, 1, 1, 31, 1, dtype=torch.bool))


def exam(fraction: float = 0.65) -> tuple[KSpace, Tensor]:
    matrix = (1, 48, 33)
    truth = phantom(matrix).to(torch.complex64)
    mask = one_sided(matrix, -2, True, fraction)
    return KSpace(fft(truth) * mask, mask, ScanInfo(matrix, matrix, provenance={"read": "here"})), truth


def test_zero_filling_is_reported_and_recorded() -> None:
    k_space, _ = exam()
    with pytest.warns(PartialFourierWarning, match="65% of y.*zero-filled"):
        result = treat_partial_fourier(k_space, "zero")
    assert torch.equal(result.data, k_space.data)
    assert torch.equal(result.mask, k_space.mask)
    assert "zero-filled" in result.info.provenance["partial_fourier"]
    assert result.info.provenance["read"] == "here"


@pytest.mark.parametrize("method", ["homodyne", "pocs"])
def test_filling_is_recorded_and_keeps_the_samples(method: str) -> None:
    k_space, truth = exam()
    result = treat_partial_fourier(k_space, method)  # type: ignore[arg-type]
    assert bool(result.mask.all())
    assert torch.equal(result.data * k_space.mask, k_space.data)
    assert relative(ifft(result.data), truth) < relative(ifft(k_space.data), truth) / 1.3
    assert method in result.info.provenance["partial_fourier"].lower()


def test_symmetric_k_space_stays_as_it_is() -> None:
    k_space, _ = exam()
    whole = replace(k_space, mask=torch.ones_like(k_space.mask))
    assert treat_partial_fourier(whole, "zero") is whole


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'homodyne'"):
        treat_partial_fourier(exam()[0], "homodine")  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [-3, -2])
def test_measured_brain(axis: int) -> None:
    """55 % of a fully sampled slice, coil by coil: magnitudes a quarter closer to the truth than zero-filled ones."""
    array = read_cfl(shared("data/2d_multicoil/full.cfl").with_suffix(""))
    k_space = torch.from_numpy(np.ascontiguousarray(k_space_from_bart(array)))
    mask = one_sided(tuple(k_space.shape[-3:]), axis, True, 0.55)
    truth = ifft(k_space).abs().square().sum(1).sqrt()
    filled = pocs(k_space * mask, mask)
    zeros = ifft(k_space * mask).abs().square().sum(1).sqrt()
    assert filled.converged
    assert relative(filled.image.abs().square().sum(1).sqrt(), truth) < 0.75 * relative(zeros, truth)
