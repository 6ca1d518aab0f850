"""The schemes, and the data consistency inside them."""

import warnings
from typing import Any

import pytest
import torch
from laws import random
from memory_cases import NETWORKS, SCHEMES, encoding, gradients, model
from torch import Tensor

from melcore.errors import ConfigError, MelError, ShapeError
from melcore.memory import MemoryPlan
from melcore.networks import Regulariser
from melcore.physics import ConvergenceWarning, conjugate_gradient, data_consistency
from melcore.unrolled import ADMM, Encoding, MoDL, ProximalGradient, Unrolled, VarNet

MATRIX = (2, 3, 4, 5)


class Identity(Regulariser):
    """Leaves images as they are: schemes then solve the least-squares problem alone."""

    dimensions, sets = "3d", 1

    def forward(self, x: Tensor) -> Tensor:
        return x


def _reference(problem: Encoding, z: Tensor, mu: Tensor, tolerance: float, iterations: int) -> Tensor:
    return conjugate_gradient(
        lambda v: problem.operator.normal(v) + mu * v,
        problem.adjoint_data + mu * z,
        initial=z,
        relative_tolerance=tolerance,
        max_iterations=iterations,
    ).value


def _gradients(solve: Any, problem: Encoding, mu: float) -> list[Tensor]:
    data = problem.adjoint_data.detach().requires_grad_()
    z = random(tuple(data.shape), seed=11).requires_grad_()
    weight = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    x = solve(Encoding(problem.operator, data, problem.sigma), z, weight)
    return [
        x.detach(),
        *torch.autograd.grad((x * random(tuple(x.shape), seed=4)).abs().square().sum(), [data, z, weight]),
    ]


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("mu", [1e-3, 0.05, 2.0])
def test_exact_gradients_are_those_of_the_iterations(mu: float, iterations: int) -> None:
    problem = encoding(MATRIX, batch=2)
    expected = _gradients(lambda e, z, w: _reference(e, z, w, 0.0, iterations), problem, mu) if iterations else None
    if expected is None:
        return
    found = _gradients(
        lambda e, z, w: data_consistency(e.operator.normal, e.adjoint_data, z, w, max_iterations=iterations),
        problem,
        mu,
    )
    assert _distance(found, expected) < 1e-12


@pytest.mark.parametrize(("gradient", "tolerance"), [("exact", 0.0), ("exact", 1e-2), ("implicit", 1e-13)])
def test_a_unit_is_only_a_scale_of_what_the_image_is_drawn_to(gradient: Any, tolerance: float) -> None:
    problem = encoding(MATRIX, batch=2)
    unit = random((2, 1, 1, 1, 1, 1), seed=4)
    options = {"max_iterations": 6 if gradient == "exact" else 200, "relative_tolerance": tolerance}

    def solve(e: Encoding, z: Tensor, w: Tensor, *, scaled: bool) -> Tensor:
        given = {"z": z, "unit": unit} if scaled else {"z": z * unit}
        return data_consistency(e.operator.normal, e.adjoint_data, mu=w, gradient=gradient, **given, **options)  # type: ignore[arg-type]

    found, expected = (
        _gradients(lambda e, z, w, scaled=scaled: solve(e, z, w, scaled=scaled), problem, 0.1)
        for scaled in (True, False)
    )
    assert _distance(found, expected) < 1e-12


@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_elements_that_stop_early_keep_their_gradients(tolerance: float) -> None:
    """The two elements of the batch stop after different numbers of iterations."""
    problem = encoding(MATRIX, batch=2)
    data = problem.adjoint_data * torch.tensor([1.0, 1e-3]).view(2, 1, 1, 1, 1, 1)
    problem = Encoding(problem.operator, data, problem.sigma)
    expected = _gradients(lambda e, z, w: _reference(e, z, w, tolerance, 30), problem, 0.1)
    found = _gradients(
        lambda e, z, w: data_consistency(
            e.operator.normal, e.adjoint_data, z, w, max_iterations=30, relative_tolerance=tolerance
        ),
        problem,
        0.1,
    )
    assert _distance(found, expected) < 1e-11


def test_single_precision_is_no_further_off_than_autograd_itself() -> None:
    exact = _gradients(lambda e, z, w: _reference(e, z, w, 0.0, 8), encoding(MATRIX), 0.05)
    single = encoding(MATRIX, dtype=torch.complex64)

    def error(solve: Any) -> float:
        found = _gradients(lambda e, z, w: solve(e, z.to(torch.complex64), w.float()), single, 0.05)
        return _distance(found, exact)

    plain = error(lambda e, z, w: _reference(e, z, w, 0.0, 8))
    ours = error(lambda e, z, w: data_consistency(e.operator.normal, e.adjoint_data, z, w, max_iterations=8))
    assert 0 < ours <= 1.5 * plain


def test_what_is_kept_for_the_backward_is_one_image_for_each_iteration() -> None:
    problem = encoding(MATRIX)
    z, mu = problem.adjoint_data.detach().requires_grad_(), torch.tensor(0.1, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        data_consistency(problem.operator.normal, problem.adjoint_data, z, mu, max_iterations=10)
    assert sum(size == z.numel() for size in saved) == 10 + 1  # the directions and the last residual


def test_implicit_gradients_are_exact_where_both_solves_converge() -> None:
    problem = encoding(MATRIX)

    def implicit(e: Encoding, z: Tensor, w: Tensor) -> Tensor:
        return data_consistency(
            e.operator.normal, e.adjoint_data, z, w, max_iterations=300, relative_tolerance=1e-13, gradient="implicit"
        )

    expected = _gradients(lambda e, z, w: _reference(e, z, w, 1e-14, 300), problem, 0.1)
    assert _distance(_gradients(implicit, problem, 0.1), expected) < 1e-9


def test_implicit_gradients_that_did_not_converge_warn_with_their_residual() -> None:
    problem = encoding(MATRIX)

    def implicit(e: Encoding, z: Tensor, w: Tensor) -> Tensor:
        return data_consistency(
            e.operator.normal, e.adjoint_data, z, w, max_iterations=3, relative_tolerance=1e-6, gradient="implicit"
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _gradients(implicit, problem, 0.001)
    texts = [str(entry.message) for entry in caught if entry.category is ConvergenceWarning]
    assert any("forward solve" in text for text in texts)
    assert any("backward solve" in text and "relative residual of" in text for text in texts)


def test_the_second_derivative_is_refused() -> None:
    problem = encoding(MATRIX)
    z, mu = problem.adjoint_data.detach().requires_grad_(), torch.tensor(0.1, dtype=torch.float64)
    x = data_consistency(problem.operator.normal, problem.adjoint_data, z, mu, max_iterations=3)
    with pytest.raises(MelError, match="first derivatives"):
        torch.autograd.grad(x.abs().sum(), z, create_graph=True)


def test_options_that_make_no_sense_are_refused() -> None:
    network = NETWORKS[0].make()
    with pytest.raises(ConfigError, match="mu > 0"):
        MoDL(network, mu=0)
    with pytest.raises(ConfigError, match="rho > 0"):
        ADMM(network, rho=-1)
    with pytest.raises(ConfigError, match="step > 0"):
        VarNet(network, step=0)
    with pytest.raises(ConfigError, match="step > 0"):
        ProximalGradient(network, step=0)
    with pytest.raises(ConfigError, match="exact or implicit"):
        MoDL(network, gradient="implict")  # type: ignore[arg-type]
    problem = encoding(MATRIX)
    with pytest.raises(ConfigError, match="relative_tolerance > 0"):
        MoDL(network, gradient="implicit").after(problem.adjoint_data, (), problem)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_a_learned_part_every_scheme_approaches_least_squares(scheme: str) -> None:
    problem = encoding((1, 1, 4, 6))
    operator = problem.operator
    truth = operator.adjoint(random(operator.codomain, seed=9))
    problem = Encoding(operator, operator.normal(truth), problem.sigma)
    made = Unrolled.repeat(lambda: SCHEMES[scheme](Identity()), 60).double()
    with torch.no_grad():
        start = torch.zeros_like(truth)
        image = made.refine(problem, start)
    residual = operator.normal(image) - problem.adjoint_data
    assert float(residual.norm()) < 0.05 * float(problem.adjoint_data.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_restores_a_model_under_any_plan(scheme: str) -> None:
    network = NETWORKS[0]
    first, second = (model(network.make, scheme=scheme, shared=False) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    second.load_state_dict(first.state_dict())
    problem = encoding(network.matrix)
    left, right = gradients(first, problem, None), gradients(second, problem, MemoryPlan.uniform("stream", 3))
    assert _distance(list(right.values()), list(left.values())) < 1e-12


def test_an_initial_image_of_another_shape_is_refused() -> None:
    problem = encoding(MATRIX)
    with pytest.raises(ShapeError, match="differ in shape"):
        model(NETWORKS[1].make).refine(problem, problem.adjoint_data[..., 1:])
