"""Noise level and phase: what scales or turns image and noise together scales or turns the result."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import random
from memory_cases import NETWORKS, PRIMAL_DUAL, SCHEMES, encoding, gradients, model
from torch import Tensor

from melcore.bundle import Bundle
from melcore.errors import ConfigError, ShapeError
from melcore.networks import FilterBank, shrinkages
from melcore.networks.noise_curve import NoiseCurve
from melcore.physics import Sense
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import Encoding, PrimalDual, Unrolled, build

BUNDLED: dict[str, Any] = {
    "scheme": "primal_dual",
    "iterations": 4,
    "regulariser": {"name": "shrinkage", "dimensions": 2, "series": True, "filters": 6, "maps": 2, "channels": 4},
}


def schemes() -> dict[str, tuple[Unrolled, Encoding]]:
    """A model of every scheme, with a problem for it."""
    network = NETWORKS[1]
    made = {name: (model(network.make, scheme=name), encoding(network.matrix, batch=2)) for name in SCHEMES}
    for case in PRIMAL_DUAL:
        made[f"primal-dual-{case}"] = case.make(), encoding(case.matrix, batch=2, sets=case.sets)
    return made


MODELS = schemes()


@pytest.mark.parametrize("name", MODELS)
def test_a_global_phase_of_the_data_turns_the_image(name: str) -> None:
    made, problem = MODELS[name]
    data = problem.adjoint_data
    turn = torch.polar(torch.ones(2, dtype=torch.float64), torch.tensor([2.1, -0.7], dtype=torch.float64))
    turn = turn.view(2, 1, 1, 1, 1, 1)
    with torch.no_grad():
        image = made.refine(problem, data)
        turned = made.refine(Encoding(problem.operator, turn * data, problem.sigma), turn * data)
    assert float((turned - turn * image).norm()) < 1e-11 * float(image.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scaling_image_and_noise_together_scales_the_learned_step(scheme: str) -> None:
    made, problem = model(NETWORKS[1].make, scheme=scheme), encoding(NETWORKS[1].matrix, batch=2)
    iteration = made.iterations[0]
    data, factor = problem.adjoint_data, 37.0
    scaled = Encoding(problem.operator, factor * data, factor * problem.sigma)

    def step(problem: Encoding, image: Tensor) -> Tensor:
        x, _ = iteration.before(iteration.start(image, problem), problem)
        return problem.network_unit * iteration.regulariser(x)

    with torch.no_grad():
        found, expected = step(scaled, factor * data), step(problem, data)
        plain = iteration.regulariser(data)
    torch.testing.assert_close(found, factor * expected, rtol=1e-11, atol=1e-11)
    assert float((plain - expected).abs().max()) > 1e-3  # the noise does matter


def test_the_phase_is_that_of_the_bright_and_vanishes_where_nothing_is() -> None:
    problem = encoding((1, 1, 4, 5), batch=3)
    data = torch.zeros(3, 1, 1, 1, 4, 5, dtype=torch.complex128)
    data[0] = 0.01j
    data[0, ..., 2, 2] = -3
    data[2] = 1j
    operator = Sense(torch.ones(3, 1, 1, 1, 1, 4, 5, dtype=torch.complex128), torch.ones(1, 1, 1, 1, 4, 1))
    made = Encoding(operator, data, torch.full((3,), 0.1, dtype=torch.float64))
    assert made.phase is not None
    assert abs(made.phase[0].item() + 1) < 1e-3
    assert made.phase[1].item() == 1
    assert abs(made.phase[2].item() - 1j) < 1e-12
    torch.testing.assert_close(made.phase.abs(), torch.ones_like(made.phase.real))
    with pytest.raises(ShapeError, match="one number for each element of the batch"):
        Encoding(problem.operator, problem.adjoint_data, torch.ones(2))


# -- curves of the noise level


def law(sigma: float) -> float:
    return 0.3 * sigma / (1 + 40 * sigma)


def test_a_curve_begins_as_its_law_at_the_knots_and_goes_on_beyond() -> None:
    curve = NoiseCurve(3, law).double()
    knots = curve.knots
    with torch.no_grad():
        found = curve(knots)
        assert found.shape == (len(knots), 3)
        for knot, values in zip(knots.tolist(), found.tolist(), strict=True):
            assert values == pytest.approx([math.log(law(math.exp(knot)))] * 3, rel=1e-6)
        # Linear between neighbours, and with the outer slopes beyond, three decades on either side.
        between = curve((knots[:-1] + knots[1:]) / 2)
        torch.testing.assert_close(between, (found[:-1] + found[1:]) / 2)
        for (inner, outer), end in zip(((1, 0), (-2, -1)), (0, -1), strict=True):
            slope = (found[outer] - found[inner]) / (knots[outer] - knots[inner])
            far = knots[end] + math.copysign(math.log(1e3), float(knots[outer] - knots[inner]))
            torch.testing.assert_close(curve(far[None])[0], found[outer] + slope * (far - knots[outer]))
            assert bool((curve(far[None]).exp() > 0).all())


def test_a_curve_is_continuous_and_every_value_learns() -> None:
    curve = NoiseCurve(2, law).double()
    with torch.no_grad():
        curve.values.add_(random((2, 6)).real)
        steps = torch.linspace(-12, 3, 20001, dtype=torch.float64)
        assert float(curve(steps).diff(dim=0).abs().max()) < 5e-3 * float(curve.values.detach().abs().max())
    curve(torch.linspace(-8, 0, 30, dtype=torch.float64)).sum().backward()
    assert curve.values.grad is not None
    assert float(curve.values.grad.abs().min()) > 0


# -- filters

KERNELS = [(1, 1, 3, 3), (1, 3, 3, 3), (3, 1, 3, 5), (3, 3, 3, 3), (5, 1, 1, 1), (1, 1, 7, 1)]
SHAPES = [(2, 7, 5, 6, 4), (1, 1, 1, 3, 9), (3, 2, 3, 2, 2)]


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_filters_have_an_exact_adjoint(kernel: tuple[int, int, int, int], scales: int, circular: bool) -> None:
    bank = FilterBank(6, kernel, scales=scales, circular=circular).double()
    with torch.no_grad():
        bank.weight.copy_(random(tuple(bank.weight.shape)).real)
        for row, time, z, y, x in SHAPES:
            image = random((row, time, z, 1, y, x), seed=1).real
            features = random((row, time, z, 6, y, x), seed=2).real
            found = bank(image)
            assert found.shape == features.shape
            left, right = (found * features).sum(), (image * bank.adjoint(features)).sum()
            assert float((left - right).abs()) < 1e-12 * float(found.norm() * features.norm())


@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_untrained_filters_amplify_nothing_and_ignore_constants(kernel: tuple[int, int, int, int], scales: int) -> None:
    for filters in (6, 24):
        bank = FilterBank(filters, kernel, scales=scales).double()
        image = random((1, 6, 5, 1, 12, 11)).real
        with torch.no_grad():
            for _ in range(60):
                image = bank.adjoint(bank(image / image.norm()))
            assert 0.1 < float(image.norm()) <= 1 + 1e-6
            time, z, y, x = (1 + 2 ** (scales - 1) * (size - 1) for size in kernel)
            constant = bank(torch.ones(1, time, z, 1, y, x, dtype=torch.float64))
            assert float(constant[:, time // 2, z // 2, :, y // 2, x // 2].abs().max()) < 1e-6


def test_filters_that_cannot_be_are_refused() -> None:
    for options in ({"kernel": (1, 1, 2, 3)}, {"scales": 4}, {"filters": 1, "scales": 2}):
        with pytest.raises(ConfigError, match="a filter bank needs odd kernel sizes"):
            FilterBank(**({"filters": 6, "kernel": (1, 1, 3, 3)} | options))  # type: ignore[arg-type]


# -- the untrained scheme is a classical method

CLASSICAL = {
    "2d": ({"dimensions": 2, "filters": 8}, (1, 1, 7, 9)),
    "3d-two-scales": ({"dimensions": 3, "filters": 12, "scales": 2}, (1, 4, 5, 6)),
    "series": ({"dimensions": 2, "series": True, "filters": 10}, (5, 1, 4, 6)),
}


@pytest.mark.parametrize("name", CLASSICAL)
def test_untrained_it_finds_the_minimiser_of_its_functional(name: str) -> None:
    """Its optimality conditions, with the dual variable that it ends with, prove the minimum."""
    options, matrix = CLASSICAL[name]
    problem = encoding(matrix, batch=2)
    maps = problem.operator.coil_maps
    maps = maps / maps.abs().square().sum(2, keepdim=True).sqrt()
    operator = Sense(maps, problem.operator.mask, time=matrix[0])
    data = operator.adjoint(random(operator.codomain, seed=3))
    problem = Encoding(operator, data, torch.tensor([0.05, 0.2], dtype=torch.float64))
    (step,) = shrinkages(1, maps=0, **options)  # type: ignore[arg-type]
    iteration = PrimalDual(step).double()
    with torch.no_grad():
        state = iteration.start(data, problem)
        for _ in range(2500):
            state = iteration(state, problem)
        x, stack, _ = state
        filters = step.bank.filters
        rate = torch.full((2,), math.log(operator.acceleration), dtype=torch.float64)
        thresholds = step.thresholds(problem.sigma.log(), rate).exp()[:, None, None, :, None, None]

        def complex_of(rows: Tensor) -> Tensor:
            return torch.view_as_complex(rows.unflatten(0, (2, 2)).movedim(1, -1).contiguous())

        def parts(image: Tensor) -> Tensor:
            return torch.view_as_real(image[:, 0]).movedim(-1, 1).flatten(0, 1)[:, :, :, None]

        def objective(image: Tensor) -> Tensor:
            quadratic = 0.5 * (image.conj() * operator.normal(image)).real - (image.conj() * data).real
            found = complex_of(step.bank(parts(image)))
            return quadratic.flatten(1).sum(1) + (thresholds * found.abs()).flatten(1).sum(1)

        dual, found = complex_of(stack[:, :, :, 1 : 1 + filters]), complex_of(step.bank(parts(x)))
        # Feasible, stationary, and complementary: no other image has a smaller objective.
        assert bool((dual.abs() <= thresholds * (1 + 1e-12)).all())
        gradient = operator.normal(x)[:, 0] - data[:, 0]
        gradient = gradient + complex_of(step.bank.adjoint(stack[:, :, :, 1 : 1 + filters]))[:, :, :, 0]
        assert float(gradient.abs().max()) < 1e-6 * float(data.abs().max())
        gap = (thresholds * found.abs() - (dual.conj() * found).real).flatten(1).sum(1)
        assert bool((gap.abs() < 1e-6 * objective(x).abs()).all())
        for seed in range(5):
            for size in (1e-3, 1e-1):
                assert bool((objective(x + size * random(tuple(x.shape), seed=seed)) > objective(x)).all())
        assert float((x - data).norm()) > 0.05 * float(data.norm())


# -- weights on disk


def test_shared_weights_stand_once_and_come_back_from_a_bundle(tmp_path: Path) -> None:
    made = build(BUNDLED)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state = made.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert set(state) == {name for name, _ in made.named_parameters()}
    other = build(BUNDLED)
    other.load_state_dict(state)
    assert other.distinct[0].regulariser.bank is other.distinct[3].regulariser.bank
    problem = encoding((4, 1, 5, 8), dtype=torch.complex64)
    expected = gradients(made, problem, None)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(other, problem, None).items())
    for change in ("missing", "unexpected"):
        wrong = dict(state)
        if change == "missing":
            del wrong["distinct.0.regulariser.bank.weight"]
        else:
            wrong["distinct.3.regulariser.bank.weights"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match=change.capitalize()):
            other.load_state_dict(wrong)
    bundle = Bundle(made, BUNDLED, Preparation())
    loaded = Bundle.load(bundle.save(tmp_path / "shared.safetensors"))
    assert loaded.dimensions == "2d+t"
    found = gradients(loaded.model, problem, None)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_scheme_goes_with_its_regulariser_alone() -> None:
    network = {"name": "resnet", "dimensions": 2}
    for architecture in ({**BUNDLED, "regulariser": network}, {**BUNDLED, "scheme": "modl"}):
        with pytest.raises(ConfigError, match="belong together"):
            build(architecture)
    with pytest.raises(ConfigError, match="'scale': did you mean 'scales'"):
        build({**BUNDLED, "regulariser": {**BUNDLED["regulariser"], "scale": 2}})
    with pytest.raises(ConfigError, match="shrinkage needs dimensions 2 or 3"):
        build({**BUNDLED, "regulariser": {**BUNDLED["regulariser"], "place_at": [1.5]}})
