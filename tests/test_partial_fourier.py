"""Partial Fourier methods bring back what one side of k-space lacks, and what they did is recorded."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from melcore.bundle import Bundle
from melcore.cli import main
from melcore.data import KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError
from melcore.io.cfl import read_cfl
from melcore.io.images import read_images
from melcore.io.load import load_k_space
from melcore.io.mrd import write_raw
from melcore.layout import k_space_from_bart
from melcore.physics import PartialFourierWarning, fft, find_partial_fourier, homodyne, ifft, pocs
from melcore.preprocess.partial_fourier import treat_partial_fourier
from melcore.preprocess.preparation import Preparation
from melcore.reconstruct import Reconstructor
from melcore.simulate.phantom import random_anatomy
from melcore.unrolled import build
from tests.cases import centred_fft, coil_images, header_xml, readout, shared
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


# --- from file to image

WHOLE, PARTIAL = "whole.h5", "partial.h5"


def write_partial(folder: Path, axis: int, fraction: float, *, step: int = 1) -> None:
    """A plane seen by four coils, whole, and with its first lines (or the first samples of its readouts) missing."""
    matrix = (1, 48, 40)
    k_space = centred_fft(coil_images(4, matrix), (-3, -2, -1))[:, 0]
    rows = [y for y in range(48) if y % step == 0 or abs(y - 24) < 8]
    xml = header_xml(matrix, 4, oversampling=1)
    write_raw(folder / WHOLE, xml, [readout(k_space[:, y], kspace_encode_step_1=y) for y in rows])
    missing = round((1 - fraction) * matrix[axis])
    if axis == -1:
        lines = [readout(k_space[:, y, missing:], centre=20 - missing, kspace_encode_step_1=y) for y in rows]
    else:
        # Counters start at the first line that is acquired; the header says which of them is the centre.
        xml = header_xml(matrix, 4, oversampling=1, centre=(0, 24 - missing))
        lines = [readout(k_space[:, y], kspace_encode_step_1=y - missing) for y in rows if y >= missing]
    write_raw(folder / PARTIAL, xml, lines)


def recon(folder: Path, name: str, *options: str) -> tuple[np.ndarray, str]:  # type: ignore[type-arg]
    pipeline = ["--pipeline", "mel_cartesian_2d", "--model", "none"]
    assert main(["recon", str(folder / name), "-o", str(folder / "images.h5"), *pipeline, *options]) == 0
    (series,) = read_images(folder / "images.h5")
    return series.data[0, 0, 0], series.metas[0]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("axis", [-2, -1])
def test_from_file_to_image(axis: int, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero-filled with a warning unless told otherwise; of the right matrix and in the right place in any case."""
    write_partial(tmp_path, axis, 0.65, step=step)
    truth, meta = recon(tmp_path, WHOLE)
    assert "partial_fourier" not in meta
    assert "warning" not in capsys.readouterr().out
    zeros, meta = recon(tmp_path, PARTIAL)
    assert re.search(r"warning: k-space holds 6[25]% of", capsys.readouterr().out)
    assert "MEL_provenance_partial_fourier" in meta
    assert "zero-filled" in meta
    assert zeros.shape == truth.shape
    # The place: nowhere do the images agree as well as where they are.
    shifted = {
        (dy, dx): float(np.vdot(np.roll(zeros, (dy, dx), (0, 1)), truth)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }
    assert max(shifted, key=lambda place: shifted[place]) == (0, 0)

    def error(image: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.linalg.norm(image - truth) / np.linalg.norm(truth))

    # With every second line along the axis that is cut, CG-SENSE fills some of the gap itself, by what it expects of
    # the image at low resolution: less is left to gain.
    enough = 0.85 if (axis, step) == (-2, 2) else 0.75
    for method in ("homodyne", "pocs"):
        filled, meta = recon(tmp_path, PARTIAL, "--partial-fourier", method)
        assert error(filled) < enough * error(zeros), method
        assert f"filled by {'homodyne' if method == 'homodyne' else ''}" in meta
        assert "warning" not in capsys.readouterr().out


def test_a_network_is_left_to_fill_it(tmp_path: Path) -> None:
    write_partial(tmp_path, -2, 0.65)
    k_space, _ = load_k_space(tmp_path / PARTIAL)
    architecture = {"iterations": 1, "regulariser": {"name": "resnet", "dimensions": 2, "channels": 2, "layers": 2}}
    bundle = Bundle(build(architecture), architecture, Preparation(), name="untrained", digest="0")
    result = Reconstructor(bundle, partial_fourier="pocs")(k_space)
    assert result.path_taken == "learned"
    assert result.image.info.provenance["partial_fourier"].endswith("left to the network")
    assert result.remarks == ()


def test_what_cannot_be_filled_from_a_file_is_named(tmp_path: Path) -> None:
    write_partial(tmp_path, -2, 0.65)
    raw, images = str(tmp_path / PARTIAL), str(tmp_path / "images.h5")
    assert main(["recon", raw, "-o", images, "--model", "none", "--partial-fourier", "margosian"]) == 2
    with pytest.raises(ConfigError, match="did you mean 'pocs'"):
        Reconstructor("none", partial_fourier="pocks")  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [32, 40, 47])
def test_regular_undersampling_is_not_taken_for_partial_fourier(size: int, step: int) -> None:
    for first in range(step):
        mask = torch.zeros(1, 1, 1, 1, size, 1, dtype=torch.bool)
        mask[..., first::step, :] = True
        mask[..., size // 2 - 4 : size // 2 + 4, :] = True
        assert find_partial_fourier(mask) == ()
