"""Every operator obeys the laws of `laws`."""

import pytest
import torch

from melcore.errors import ShapeError
from melcore.physics import Sense, conjugate_gradient, fft, ifft
from tests.cases import shared
from tests.laws import OPERATORS, Case, inner, random, relative, sense

every_operator = pytest.mark.parametrize("case", OPERATORS, ids=str)
DOUBLE = torch.complex128
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@every_operator
def test_adjoint_is_the_adjoint(case: Case) -> None:
    operator = case.make(DOUBLE)
    x, y = random(operator.domain), random(operator.codomain, seed=3)
    forward, adjoint = inner(y, operator(x)), inner(operator.adjoint(y), x)
    assert abs(forward - adjoint) < 1e-12 * x.norm() * y.norm()


@every_operator
def test_operator_is_linear(case: Case) -> None:
    operator = case.make(DOUBLE)
    a, b, factor = random(operator.domain), random(operator.domain, seed=4), 0.3 - 1.7j
    assert relative(operator(factor * a + b), factor * operator(a) + operator(b)) < 1e-12


@every_operator
def test_normal_is_adjoint_of_forward(case: Case) -> None:
    operator = case.make(DOUBLE)
    x = random(operator.domain)
    assert relative(operator.normal(x), operator.adjoint(operator(x))) < case.normal_tolerance


@every_operator
@pytest.mark.parametrize("method", ["forward", "adjoint", "normal"])
def test_gradient_is_the_adjoint(case: Case, method: str) -> None:
    """Against automatic differentiation through the arithmetic itself, to the second order."""
    operator = case.make(DOUBLE)
    x = random(operator.codomain if method == "adjoint" else operator.domain).requires_grad_()
    ours, arithmetic = getattr(operator, method), getattr(operator, f"_{method}")
    y = random(tuple(ours(x).shape), seed=5)
    (gradient,) = torch.autograd.grad(ours(x).abs().pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(arithmetic(x).abs().pow(3).sum(), x, create_graph=True)
    assert relative(gradient, expected) < 1e-12
    direction = random(tuple(x.shape), seed=6)
    (second,) = torch.autograd.grad(inner(direction, gradient).real, x)
    (expected_second,) = torch.autograd.grad(inner(direction, expected).real, x)
    assert relative(second, expected_second) < 1e-11
    (linear,) = torch.autograd.grad(ours(x), x, y)
    transposed = {"forward": operator.adjoint, "adjoint": operator, "normal": operator.normal}[method]
    assert relative(linear, transposed(y)) < 1e-12


@every_operator
def test_single_precision_is_kept_and_close(case: Case) -> None:
    double, single = case.make(DOUBLE), case.make(torch.complex64)
    x = random(double.domain)
    result = single(x.to(torch.complex64))
    assert result.dtype == torch.complex64
    assert relative(result.to(DOUBLE), double(x)) < case.single_tolerance


@every_operator
def test_arguments_are_left_as_they_were(case: Case) -> None:
    operator = case.make(DOUBLE)
    x, y = random(operator.domain), random(operator.codomain, seed=3)
    before_x, before_y = x.clone(), y.clone()
    operator(x), operator.normal(x), operator.adjoint(y)
    assert torch.equal(x, before_x)
    assert torch.equal(y, before_y)


@every_operator
def test_wrong_shapes_are_named(case: Case) -> None:
    operator = case.make(DOUBLE)
    for method, expected in (("forward", operator.domain), ("adjoint", operator.codomain), ("normal", operator.domain)):
        wrong = (*expected[:-1], expected[-1] + 1)
        call = operator if method == "forward" else getattr(operator, method)
        with pytest.raises(ShapeError, match=r"\[.* <- .*\]") as error:
            call(random(wrong))
        assert str(expected) in str(error.value)
        assert str(wrong) in str(error.value)


@every_operator
@pytest.mark.parametrize("device", DEVICES)
def test_moves_to_every_device(case: Case, device: str) -> None:
    if device != "cpu" and case.cuda_package is not None:
        pytest.importorskip(case.cuda_package)
    operator = case.make(DOUBLE)
    x, y = random(operator.domain), random(operator.codomain, seed=3)
    forward, adjoint = operator(x), operator.adjoint(y)
    operator = operator.to(device)
    tolerance = 1e-12 if device == "cpu" else case.normal_tolerance
    assert relative(operator(x.to(device)).cpu(), forward) < tolerance
    assert relative(operator.adjoint(y.to(device)).cpu(), adjoint) < tolerance


@pytest.mark.parametrize("matrix", [(1, 7, 10), (3, 4, 5)])
@pytest.mark.parametrize("time", [1, 3])
def test_batch_elements_are_independent(matrix: tuple[int, int, int], time: int) -> None:
    maps, mask = random((3, 2, 4, 1, *matrix)), random((3, 1, time, *matrix[:2], 1)).real > 0
    x = random((3, 2, time, *matrix))
    together = Sense(maps, mask, time=time).normal(x)
    for index in range(3):
        one = slice(index, index + 1)
        assert relative(Sense(maps[one], mask[one], time=time).normal(x[one]), together[one]) < 1e-12


@pytest.mark.parametrize("coil_batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", ["forward", "adjoint", "normal"])
def test_coil_groups_change_nothing(coil_batch: int, method: str) -> None:
    whole = sense((3, 4, 5), batch=2, sets=2, coils=5, time=2)(DOUBLE)
    parts = sense((3, 4, 5), batch=2, sets=2, coils=5, time=2, coil_batch=coil_batch)(DOUBLE)
    x = random(whole.codomain if method == "adjoint" else whole.domain)
    a, b = (op(x) if method == "forward" else getattr(op, method)(x) for op in (parts, whole))
    assert relative(a, b) < 1e-13


@pytest.mark.parametrize("time_batch", [1, 2, 4])
@pytest.mark.parametrize("coil_batch", [2, None])
@pytest.mark.parametrize("method", ["forward", "adjoint", "normal"])
def test_frame_groups_change_nothing(time_batch: int, coil_batch: int | None, method: str) -> None:
    """Where the readout decouples, where it does not, and with maps for each frame."""
    for maps_time, readout in ((1, 1), (1, 5), (5, 5)):
        maps, mask = random((2, 2, 3, maps_time, 1, 4, 5)), random((2, 1, 5, 1, 4, readout), seed=1).real > 0
        whole, parts = Sense(maps, mask), Sense(maps, mask, coil_batch=coil_batch, time_batch=time_batch)
        x = random(whole.codomain if method == "adjoint" else whole.domain)
        a, b = (op(x) if method == "forward" else getattr(op, method)(x) for op in (parts, whole))
        assert relative(a, b) < 1e-13


@pytest.mark.parametrize("shape", [(5, 4, 7), (1, 6, 9), (1, 1, 8), (2, 3, 1)])
def test_fourier_is_centred_and_unitary(shape: tuple[int, int, int]) -> None:
    x = random((2, *shape))
    axes = (-3, -2, -1)
    expected = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, axes), dim=axes, norm="ortho"), axes)
    assert relative(fft(x), expected) < 1e-14
    assert relative(ifft(fft(x)), x) < 1e-14
    assert abs(fft(x).norm() / x.norm() - 1) < 1e-14


def test_fourier_keeps_precision_on_long_axes() -> None:
    x = random((4099,), torch.complex64)
    assert relative(fft(x, (0,)).to(DOUBLE), fft(x.to(DOUBLE), (0,))) < 5e-7


def test_point_in_the_centre_becomes_constant() -> None:
    """The one fact that fixes the convention: index n // 2 is the centre on both sides."""
    x = torch.zeros(1, 6, 7, dtype=DOUBLE)
    x[0, 3, 3] = 1
    assert torch.allclose(fft(x), torch.full_like(x, 42**-0.5))


def test_sense_is_maps_then_fourier_then_mask() -> None:
    operator = sense((3, 4, 5), batch=2, sets=2, coils=3, time=2)(DOUBLE)
    maps, mask = random((2, 2, 3, 1, 3, 4, 5), seed=2), random((2, 1, 2, 3, 4, 1), seed=1).real > -0.3
    x = random(operator.domain)
    expected = mask * fft((maps * x[:, :, None]).sum(1))
    assert relative(operator(x), expected) < 1e-13


def test_maps_and_mask_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 1, 1, 3, 9, 1\).*\(1, 1, 4, 1, 3, 8, 5\)"):
        Sense(random((1, 1, 4, 1, 3, 8, 5)), torch.ones(1, 1, 1, 3, 9, 1))
    with pytest.raises(ShapeError, match="7 axes"):
        Sense(random((4, 3, 8, 5)), torch.ones(1, 1, 1, 3, 8, 1))


@pytest.mark.parametrize("name", ["FSE", "FLAIR", "GRE"])
def test_measured_low_field(name: str) -> None:
    """A head at 0.055 T, one coil, every line: it lies in the middle, unwrapped, and the adjoint is the solution."""
    io = pytest.importorskip("scipy.io")
    measured = io.loadmat(shared(f"data/lowfield/fig6A_{name}_kspace.mat"))["kspace"]
    k_space = torch.from_numpy(measured.transpose(2, 0, 1).copy()).to(torch.complex64)[:, None, None, None]
    matrix = k_space.shape[3:]
    operator = Sense(torch.ones(4, 1, 1, 1, *matrix, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1, 1))
    image = operator.adjoint(k_space)
    solution = conjugate_gradient(operator.normal, image, relative_tolerance=1e-5)
    assert solution.converged
    assert relative(solution.value, image) < 1e-5
    magnitude = image.abs().mean((0, 1, 2, 3))
    y, x = (n // 8 for n in matrix[1:])
    outside = torch.cat([magnitude[:y].flatten(), magnitude[-y:].flatten(), magnitude[:, :x].flatten()]).mean()
    assert magnitude[2 * y : -2 * y, 3 * x : -3 * x].mean() > 4 * outside
