"""Non-Cartesian imaging: the transform is what it says, and measured and simulated data come back from it.

The laws of its operators are tested in `test_operators`, for the cases in `laws`.
"""

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from melcore.errors import DataError, MissingDependencyError, ShapeError
from melcore.io.toolbox import run
from melcore.physics import (
    NonUniformFourier,
    NonUniformSense,
    Sense,
    conjugate_gradient,
    data_consistency,
    fft,
    ifft,
    nonuniform,
    power_method,
)
from melcore.preprocess.density import density_compensation
from melcore.simulate.coils import coil_maps
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.trajectories import kooshball, radial, spiral, stack
from tests.cases import shared
from tests.laws import random, relative

DOUBLE = torch.complex128
Matrix = tuple[int, int, int]


def cartesian(matrix: Matrix, axes: int) -> Tensor:
    """Every point of the grid, lines as readouts: (1, z y, x, 3), or (1, y, x, 2)."""
    z, y, x = (torch.arange(size, dtype=torch.float64) - size // 2 for size in matrix)
    if axes == 2:
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
    else:
        grid = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)
    return grid[None]


def scattered(matrix: Matrix, axes: int, *, time: int = 1, readouts: int = 4, samples: int = 9) -> Tensor:
    """Random points of the whole k-space."""
    places = random((time, readouts, samples, axes), seed=9).real.frac()
    return places * torch.tensor(matrix[::-1][:axes]) / 2


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("matrix", [(1, 7, 10), (3, 6, 5), (4, 5, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-11), (torch.complex64, 5e-6)])
def test_transform_is_the_sum_of_its_definition(
    axes: int, matrix: Matrix, dtype: torch.dtype, tolerance: float
) -> None:
    trajectory = scattered(matrix, axes, time=2)
    operator = NonUniformFourier((2, 3, 2, *matrix), trajectory)
    x = random(operator.domain)
    where = [(torch.arange(size, dtype=torch.float64) - size // 2) / size for size in matrix]
    kx, ky, *kz = trajectory.unbind(-1)
    phase = kx[..., None, None] * where[2] + ky[..., None, None] * where[1][:, None]
    if kz:
        phase = phase[..., None, :, :] + kz[0][..., None, None, None] * where[0][:, None, None]
        expected = torch.einsum("trszyx,bctzyx->bctrs", torch.exp(-2j * torch.pi * phase), x)[:, :, :, None]
    else:
        expected = torch.einsum("trsyx,bctzyx->bctzrs", torch.exp(-2j * torch.pi * phase), x)
    expected /= math.prod(matrix[3 - axes :]) ** 0.5
    assert relative(operator(x.to(dtype)).to(DOUBLE), expected) < tolerance


@pytest.mark.parametrize(("matrix", "axes"), [((1, 7, 10), 2), ((3, 8, 5), 2), ((1, 6, 9), 3), ((4, 5, 6), 3)])
def test_a_cartesian_trajectory_gives_the_fourier_transform_of_the_house(matrix: Matrix, axes: int) -> None:
    """Centre, sign, order of the components, and scale."""
    operator = NonUniformFourier((2, 1, 3, *matrix), cartesian(matrix, axes))
    x = random(operator.domain)
    expected = fft(x, (-3, -2, -1)[3 - axes :])
    assert relative(operator(x).reshape(x.shape), expected) < 1e-11
    assert relative(operator.adjoint(operator(x)), x) < 1e-11


@pytest.mark.parametrize("toeplitz", [True, False])
def test_on_the_grid_it_is_sense(toeplitz: bool) -> None:
    matrix = (3, 6, 5)
    maps, weights = random((2, 2, 4, 1, *matrix), seed=2), random((1, 18, 5), seed=1).real.abs().clamp(max=1)
    grid = Sense(maps, weights.view(1, 1, 1, *matrix))
    ours = NonUniformSense(maps, cartesian(matrix, 3), weights=weights, coil_batch=3, toeplitz=toeplitz)
    x, y = random(grid.domain), random(grid.codomain, seed=3)
    assert relative(ours(x).reshape(y.shape), grid(x)) < 1e-11
    assert relative(ours.adjoint(y.reshape(ours.codomain)), grid.adjoint(y)) < 1e-11
    assert relative(ours.normal(x), grid.normal(x)) < 1e-11


def test_agrees_with_bart() -> None:
    """Units, sign and centre of a trajectory are BART's."""
    matrix, trajectory = (1, 20, 24), radial(20, 9, samples=21)
    x = random_anatomy(matrix, seed=2).to(torch.complex64)
    points = torch.cat([trajectory[0], torch.zeros(9, 21, 1)], dim=-1).numpy().transpose(2, 1, 0)
    (theirs,) = run(["nufft"], [points.astype(np.complex64), x.numpy().transpose(2, 1, 0)])
    ours = NonUniformFourier((1, 1, 1, *matrix), trajectory)(x[None, None, None])
    expected = torch.from_numpy(theirs.reshape(21, 9).T.copy())
    scale = expected.norm() / ours.norm()
    assert relative(scale * ours[0, 0, 0, 0], expected) < 5e-3


@pytest.mark.parametrize("method", ["forward", "adjoint", "normal"])
@pytest.mark.parametrize("coil_batch", [1, 3, None])
def test_groups_change_nothing(method: str, coil_batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, weights = random((2, 2, 5, 1, 3, 6, 5)), random((1, 4, 11), seed=1).real.abs()
    trajectory = radial(5, 4, time=2, samples=11)
    whole = NonUniformSense(maps, trajectory, weights=weights)
    x = random(whole.codomain if method == "adjoint" else whole.domain)
    expected = whole(x) if method == "forward" else getattr(whole, method)(x)
    monkeypatch.setattr(nonuniform, "_PADDED", 1)  # the normal operator takes one coil at a time
    parts = NonUniformSense(maps, trajectory, weights=weights, coil_batch=coil_batch)
    assert relative(parts(x) if method == "forward" else getattr(parts, method)(x), expected) < 1e-13


def test_frames_have_their_own_trajectories_weights_and_maps() -> None:
    maps, trajectory = random((1, 2, 3, 4, 1, 7, 6)), radial(6, 5, time=4)
    weights = random((4, 5, 12), seed=1).real.abs()
    together = NonUniformSense(maps, trajectory, weights=weights)
    x = random(together.domain)
    y, normal = together(x), together.normal(x)
    for frame in range(4):
        one = slice(frame, frame + 1)
        alone = NonUniformSense(maps[:, :, :, one], trajectory[one], weights=weights[one])
        assert relative(alone(x[:, :, one]), y[:, :, one]) < 1e-13
        assert relative(alone.normal(x[:, :, one]), normal[:, :, one]) < 1e-13


def test_gradients_pass_through_data_consistency() -> None:
    """As in an unrolled network: against finite differences, with respect to the data, the image and the weight."""
    operator = NonUniformSense(random((1, 1, 3, 1, 1, 6, 5)), spiral(5, 2, samples=20))
    z, y = random(operator.domain, seed=7).requires_grad_(), random(operator.codomain, seed=8).requires_grad_()
    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def solve(y: Tensor, z: Tensor, mu: Tensor) -> Tensor:
        return data_consistency(operator.normal, operator.adjoint(y), z, mu, max_iterations=3)

    assert torch.autograd.gradcheck(solve, (y, z, mu), fast_mode=True)


def test_copies_and_pickles_without_the_libraries_plans() -> None:
    operator = NonUniformSense(random((1, 1, 3, 1, 1, 6, 5)), radial(5, 4))
    x = random(operator.domain)
    y, normal = operator(x), operator.normal(x)
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x), y)
        assert torch.equal(other.normal(x), normal)


@pytest.mark.parametrize(
    ("trajectory", "matrix"),
    [
        (radial(16, 25), (1, 16, 16)),
        (spiral(16, 6, samples=80), (1, 16, 16)),
        (stack(radial(12, 19), 6), (6, 12, 12)),
        (kooshball(10, 160), (10, 10, 10)),
    ],
    ids=["radial", "spiral", "stack-of-stars", "kooshball"],
)
def test_every_trajectory_gives_the_image_back(trajectory: Tensor, matrix: Matrix) -> None:
    """Half of k-space's readouts, four coils, no noise: conjugate gradients with density weights find the image."""
    trajectory = trajectory[:, ::2]
    density = density_compensation(trajectory, matrix)
    assert density.deviation < 0.03
    maps = coil_maps(matrix, 4, seed=3).to(DOUBLE)[None, None, :, None]
    operator = NonUniformSense(maps, trajectory, weights=density.weights.sqrt())
    # Smooth, so that what lies in the corners of k-space, which no trajectory here reaches, is next to nothing.
    truth = ifft(fft(random_anatomy(matrix, seed=1).to(DOUBLE)[None, None, None]) * corners(matrix))
    rhs = operator.adjoint(operator(truth))
    solution = conjugate_gradient(operator.normal, rhs, relative_tolerance=1e-5, max_iterations=300)
    gridded = relative(rhs * torch.vdot(rhs.flatten(), truth.flatten()) / rhs.norm().square(), truth)
    assert relative(solution.value, truth) < 0.1 * gridded
    assert relative(solution.value, truth) < 0.02


def corners(matrix: Matrix) -> Tensor:
    """A window that is 1 in the centre of k-space and falls to 0 towards a sphere in it."""
    axes = [(torch.arange(n) - n // 2) / max(n / 2, 1) for n in matrix]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    return torch.cos(radius.clamp(max=1) * torch.pi / 2)


def test_density_is_the_area_that_a_sample_stands_for() -> None:
    matrix = (1, 24, 24)
    grid = density_compensation(cartesian(matrix, 2), matrix)
    assert grid.converged
    assert torch.allclose(grid.weights, torch.ones(1, 24, 24), atol=1e-3)
    # Evenly spaced spokes at the Nyquist rate: rings of width 1 / 2, shared by the spokes.
    angles = math.pi * torch.arange(38, dtype=torch.float64)[:, None] / 38
    radius = (torch.arange(48, dtype=torch.float64) - 24) / 2
    spokes = torch.stack([radius * angles.cos(), radius * angles.sin()], dim=-1)[None]
    found = density_compensation(spokes, matrix, tolerance=0.005).weights
    ring = math.pi * radius.abs() * 0.5 / 38
    inner = (radius.abs() > 2) & (radius.abs() < 10)
    assert torch.allclose(found[0, :, inner], ring[inner].float().expand(38, -1), rtol=0.08)


@pytest.mark.parametrize("time", [1, 2])
def test_gridding_with_density_needs_no_scale(time: int) -> None:
    matrix, trajectory = (1, 32, 32), radial(32, 52, time=time)
    density = density_compensation(trajectory, matrix).weights
    operator = NonUniformSense(torch.ones(1, 1, 1, 1, *matrix, dtype=torch.complex64), trajectory)
    truth = (random_anatomy(matrix, seed=1).to(torch.complex64) * torch.ones(time, 1, 1, 1))[None, None]
    truth = ifft(fft(truth) * corners(matrix))
    y = operator(truth)
    assert relative(operator.adjoint(density[:, None] * y), truth) < 0.04
    assert relative(operator.adjoint(y), truth) > 10


def test_density_says_when_it_did_not_converge() -> None:
    density = density_compensation(radial(16, 10), (1, 16, 16), max_iterations=1)
    assert not density.converged
    assert density.iterations == 1
    assert density.deviation > 0.01


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        (torch.zeros(1, 4, 2), "4 axes"),
        (torch.zeros(1, 4, 8, 4), "4 axes"),
        (radial(8, 4) * 2, r"reaches 8 along x.*8 voxels"),
        (radial(8, 4) / 16, "multiply its components"),
        (radial(8, 4) * float("nan"), "finite"),
        (radial(8, 4).to(DOUBLE), "real"),
        (radial(8, 4, time=3), r"3 frames.*2"),
    ],
)
def test_wrong_trajectories_are_named(trajectory: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        NonUniformFourier((1, 2, 2, 1, 8, 8), trajectory)


def test_weights_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeError, match=r"weights \(3, 4, 16\).*\(1 or 2, 4, 16\)"):
        NonUniformSense(random((1, 1, 2, 1, 1, 8, 8)), radial(8, 4, time=2), weights=torch.ones(3, 4, 16), time=2)


def test_other_precisions_are_refused() -> None:
    operator = NonUniformFourier((1, 1, 1, 1, 8, 8), radial(8, 4))
    with pytest.raises(DataError, match="complex64 or complex128"):
        operator(torch.zeros(operator.domain))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finufft", None)
    operator = NonUniformFourier((1, 1, 1, 1, 8, 8), radial(8, 4))
    with pytest.raises(MissingDependencyError, match=r"finufft.*melcore\[nonuniform\]"):
        operator(random(operator.domain))


def smooth_maps(coil_images: Tensor, width: int) -> Tensor:
    """Coil maps (batch, 1, coil, 1, z, y, x) from the centre of the coils' k-space; not cut at the object's rim."""
    n = coil_images.shape[-1]
    window = torch.zeros(n)
    window[n // 2 - width : n // 2 + width] = torch.hann_window(2 * width)
    low = ifft(fft(coil_images) * window * window[:, None])
    return (low / low.abs().square().sum(1, keepdim=True).sqrt())[:, None]


def rim(image: Tensor, width: int) -> float:
    """Mean magnitude along the edges of the field of view, relative to that of the whole."""
    inside = image[..., width:-width, width:-width].abs().sum()
    count = image[..., 0, 0].numel() * (image.shape[-1] ** 2 - (image.shape[-1] - 2 * width) ** 2)
    return float((image.abs().sum() - inside) / count / image.abs().mean())


def test_measured_spiral() -> None:
    """Eight coils, 60 spirals: the phantom fits the field of view, and a third of the spirals suffices for SENSE."""
    io = pytest.importorskip("scipy.io")
    file = io.loadmat(shared("data/2d_multicoil/spiral.mat"))
    # The inner half of k-space: the same field of view at half the resolution.
    n, inner = 200, abs(file["k"]).max(1) < 0.25
    k, theirs = (torch.from_numpy(file[name][inner].T.copy()) for name in ("k", "w"))
    samples = torch.from_numpy(file["data"][inner].transpose(2, 1, 0).copy()).to(torch.complex64)[None, :, None, None]
    trajectory = 2 * n * torch.view_as_real(k)[None]
    density = density_compensation(trajectory, (1, n, n))
    assert density.converged
    weights, gridding = density.weights, NonUniformFourier((1, 8, 1, 1, n, n), trajectory)
    coil_images = gridding.adjoint(weights[:, None] * samples)
    by_theirs = gridding.adjoint(theirs[None].float()[:, None] * samples)
    ratio = torch.vdot(by_theirs.flatten(), coil_images.flatten()) / by_theirs.norm().square()
    assert relative(ratio * by_theirs, coil_images) < 0.2
    assert rim(coil_images, 6) < 0.5
    maps = smooth_maps(coil_images, 10)
    full = (maps.conj()[:, :, :, 0] * coil_images[:, None, :, 0]).sum(2)[:, :, None]
    operator = NonUniformSense(maps, trajectory[:, ::3], weights=weights[:, ::3].sqrt())
    rhs = operator.adjoint(weights[:, None, ::3].sqrt() * samples[..., ::3, :])
    largest = power_method(operator.normal, rhs, relative_tolerance=0.05)
    assert largest.converged
    solution = conjugate_gradient(
        lambda v: operator.normal(v) + 3e-3 * largest.value * v, rhs, relative_tolerance=1e-2, max_iterations=30
    )
    assert solution.converged
    assert relative(solution.value, full) < 0.7 * relative(3 * rhs, full)
    assert relative(solution.value, full) < 0.2


def test_measured_dynamic_radial() -> None:
    """Perfusion of a heart, 30 rays a frame: the field of view is right, and SENSE removes streaks."""
    k_space, places = (np.load(shared(f"data/2dt/scgrog_{name}.npy")) for name in ("kspace", "traj"))
    # The inner half of each ray: the whole field of view, readout oversampling included, at half the resolution.
    n, inner = 144, slice(72, 216)
    samples = torch.from_numpy(k_space[inner].transpose(3, 2, 1, 0).copy()).to(torch.complex64)[None, :, :, None]
    trajectory = 2 * n * torch.view_as_real(torch.from_numpy(places[inner].transpose(2, 1, 0).copy()))
    density = density_compensation(trajectory, (1, n, n)).weights
    coil_images = NonUniformFourier((1, 3, 7, 1, n, n), trajectory).adjoint(density[:, None] * samples)
    average = coil_images.mean(2, keepdim=True)
    assert rim(average, 6) < 0.5
    maps = smooth_maps(average, 10)
    operator = NonUniformSense(maps, trajectory, weights=density.sqrt())
    rhs = operator.adjoint(density[:, None].sqrt() * samples)
    solution = conjugate_gradient(lambda v: operator.normal(v) + 0.02 * v, rhs, relative_tolerance=0.02)
    assert solution.converged
    assert operator.normal(rhs).shape == (1, 1, 7, 1, n, n)
    measured = density[:, None].sqrt() * samples
    assert relative(operator(solution.value), measured) < 0.65 * relative(operator(rhs), measured)
    # Contrast agent arrives between the first and the last frame.
    first, last = solution.value[0, 0, 0].abs(), solution.value[0, 0, 6].abs()
    assert float((last - first).norm() / first.norm()) > 0.3
