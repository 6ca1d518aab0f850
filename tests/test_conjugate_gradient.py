"""Conjugate gradients solve what they are given, and say when they did not."""

import pytest
import torch

from melcore.errors import DataError, ShapeError
from melcore.physics import conjugate_gradient, power_method
from tests.laws import random, relative, sense

DOUBLE = torch.complex128


def system(size: int = 12, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Well-conditioned Hermitian systems of different condition numbers, and right-hand sides."""
    a = random((batch, size, size), seed=seed)
    weight = torch.tensor([3.0, 0.3, 30.0])[:batch, None, None]
    return a @ a.mH / size + weight * torch.eye(size), random((batch, size), seed=seed + 1)


def test_solves_to_the_tolerance_it_is_given() -> None:
    matrix, rhs = system()
    for tolerance in (1e-3, 1e-8, 1e-13):
        solution = conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, relative_tolerance=tolerance)
        true = (rhs - (matrix @ solution.value[..., None])[..., 0]).norm(dim=1) / rhs.norm(dim=1)
        assert solution.converged
        assert bool((true <= 1.1 * tolerance + 1e-14).all())
        assert torch.allclose(true, solution.residual, rtol=0.1, atol=1e-13)


def test_says_when_it_did_not_converge() -> None:
    matrix, rhs = system()
    solution = conjugate_gradient(
        lambda v: (matrix @ v[..., None])[..., 0], rhs, relative_tolerance=1e-12, max_iterations=3
    )
    assert not solution.converged
    assert solution.iterations == 3
    assert float(solution.residual.max()) > 1e-12


def test_batch_elements_do_not_know_each_other() -> None:
    """Each element gets the steps it would get alone, though they need different numbers of them."""
    matrix, rhs = system()
    together = conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, relative_tolerance=1e-6)
    for index in range(3):
        one = matrix[index : index + 1]
        alone = conjugate_gradient(
            lambda v, one=one: (one @ v[..., None])[..., 0], rhs[index : index + 1], relative_tolerance=1e-6
        )
        assert relative(together.value[index], alone.value[0]) < 1e-13


def test_real_systems_and_zero_right_hand_sides() -> None:
    matrix = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    rhs = torch.stack([torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    solution = conjugate_gradient(lambda v: v @ matrix, rhs, relative_tolerance=1e-12)
    assert solution.converged
    assert torch.allclose(solution.value[0], 1 / torch.arange(1.0, 6.0, dtype=torch.float64))
    assert torch.equal(solution.value[1], rhs[1])


def test_an_exact_start_needs_no_iteration() -> None:
    matrix, x = system()
    rhs = (matrix @ x[..., None])[..., 0]
    solution = conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, initial=x, relative_tolerance=1e-10)
    assert solution.iterations == 0
    assert torch.equal(solution.value, x)


def test_gradient_is_that_of_the_executed_iterations() -> None:
    """Against finite differences, for a number of iterations that is far from converged, and for a weight."""
    operator = sense((1, 5, 6), time=2)(DOUBLE)
    z, y = random(operator.domain, seed=7), random(operator.domain, seed=8)

    def solve(z: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
        solution = conjugate_gradient(
            lambda v: operator.normal(v) + mu * v, y + mu * z, initial=z, relative_tolerance=0, max_iterations=4
        )
        return solution.value

    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (z.requires_grad_(), mu), fast_mode=True)


def test_nan_reaches_the_result() -> None:
    matrix, rhs = system()
    rhs[1, 3] = float("nan")
    solution = conjugate_gradient(
        lambda v: (matrix @ v[..., None])[..., 0], rhs, initial=torch.zeros_like(rhs), max_iterations=50
    )
    assert not solution.converged
    assert bool(torch.isnan(solution.value[1]).any())
    assert bool(torch.isfinite(solution.value[[0, 2]]).all())


def test_callback_sees_every_iteration() -> None:
    matrix, rhs = system()
    seen: list[tuple[int, float]] = []
    solution = conjugate_gradient(
        lambda v: (matrix @ v[..., None])[..., 0],
        rhs,
        max_iterations=5,
        callback=lambda iteration, _, residual: seen.append((iteration, float(residual.max()))),
    )
    assert [iteration for iteration, _ in seen] == list(range(1, solution.iterations + 1))
    assert seen[-1][1] == float(solution.residual.max())


def test_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(2, 4\)"):
        conjugate_gradient(lambda v: v, random((2, 4)), initial=random((2, 3)))


def badly_scaled(size: int = 40, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Systems whose diagonal spans four decades and says nearly all; right-hand sides; the inverse diagonal."""
    a = random((batch, size, size), seed=3)
    diagonal = torch.logspace(-2, 2, size, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2])[:batch, None]
    scale = diagonal.sqrt()
    matrix = scale[:, :, None] * (torch.eye(size) + 0.02 * (a + a.mH) / 2) * scale[:, None, :]
    return matrix, random((batch, size), seed=4), 1 / diagonal


def test_a_preconditioner_saves_iterations_and_changes_nothing_else() -> None:
    matrix, rhs, inverse = badly_scaled()

    def normal(v: torch.Tensor) -> torch.Tensor:
        return (matrix @ v[..., None])[..., 0]

    plain = conjugate_gradient(normal, rhs, relative_tolerance=1e-9, max_iterations=500)
    better = conjugate_gradient(normal, rhs, relative_tolerance=1e-9, preconditioner=lambda r: inverse * r)
    assert plain.converged
    assert better.converged
    assert better.iterations < plain.iterations / 4
    true = (rhs - normal(better.value)).norm(dim=1) / rhs.norm(dim=1)
    assert bool((true <= 1.1e-9).all())
    assert relative(better.value, torch.linalg.solve(matrix, rhs)) < 1e-6


def test_a_preconditioner_leaves_batch_elements_apart() -> None:
    matrix, rhs, inverse = badly_scaled()
    together = conjugate_gradient(
        lambda v: (matrix @ v[..., None])[..., 0], rhs, max_iterations=5, preconditioner=lambda r: inverse * r
    )
    for index in range(3):
        one = slice(index, index + 1)
        alone = conjugate_gradient(
            lambda v, one=one: (matrix[one] @ v[..., None])[..., 0],
            rhs[one],
            max_iterations=5,
            preconditioner=lambda r, one=one: inverse[one] * r,
        )
        assert relative(together.value[index], alone.value[0]) < 1e-13


def test_a_preconditioner_that_is_the_identity_is_none() -> None:
    matrix, rhs = system()
    plain, same = (
        conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, max_iterations=6, preconditioner=given)
        for given in (None, lambda r: r)
    )
    assert torch.equal(plain.value, same.value)
    assert torch.equal(plain.residual, same.residual)


def test_gradient_passes_through_a_preconditioner() -> None:
    matrix, rhs, inverse = badly_scaled(size=5)

    def solve(rhs: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return conjugate_gradient(
            lambda v: (matrix @ v[..., None])[..., 0],
            rhs,
            relative_tolerance=0,
            max_iterations=3,
            preconditioner=lambda r: inverse * r,
        ).value

    assert torch.autograd.gradcheck(solve, (rhs.requires_grad_(), inverse.requires_grad_()), fast_mode=True)


def test_a_wrong_preconditioner_is_refused() -> None:
    matrix, rhs = system()
    with pytest.raises(DataError, match="not positive definite"):
        conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, preconditioner=lambda r: -r)
    with pytest.raises(ShapeError, match=r"\(3, 11\) of \(3, 12\)"):
        conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], rhs, preconditioner=lambda r: r[:, 1:])


def test_power_method_finds_the_largest_eigenvalue_of_each_element() -> None:
    matrix, rhs = system()
    largest = torch.linalg.eigvalsh(matrix)[:, -1]
    found = power_method(lambda v: (matrix @ v[..., None])[..., 0], rhs, iterations=2000, relative_tolerance=1e-5)
    assert found.converged
    assert torch.allclose(found.value, largest, rtol=1e-8)
    assert bool((found.value <= largest * (1 + 1e-12)).all())
    alone = power_method(lambda v: (matrix[1:2] @ v[..., None])[..., 0], rhs[1:2], iterations=found.iterations)
    assert relative(alone.value, largest[1:2]) < 1e-2


def test_power_method_gives_the_norm_of_an_operator() -> None:
    operator = sense((1, 4, 5), coils=2)(DOUBLE)
    columns = [operator(unit.view(operator.domain)).flatten() for unit in torch.eye(20, dtype=DOUBLE)]
    norm = torch.linalg.matrix_norm(torch.stack(columns), 2)
    found = power_method(operator.normal, torch.empty(operator.domain, dtype=DOUBLE), iterations=500)
    assert found.converged
    assert abs(float(found.value) ** 0.5 / float(norm) - 1) < 1e-3


def test_power_method_says_when_it_did_not_converge() -> None:
    matrix, rhs = system()
    found = power_method(lambda v: (matrix @ v[..., None])[..., 0], rhs, iterations=2, relative_tolerance=1e-6)
    assert not found.converged
    assert found.iterations == 2
    assert float(found.residual.max()) > 1e-6


def test_power_method_of_zero_is_zero_and_of_nan_unconverged() -> None:
    like = torch.empty(2, 5, dtype=torch.float64)
    zero = power_method(lambda v: 0 * v, like)
    assert zero.converged
    assert torch.equal(zero.value, torch.zeros(2, dtype=torch.float64))
    assert not power_method(lambda v: v * float("nan"), like, iterations=3).converged
