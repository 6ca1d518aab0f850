"""The learned primal-dual scheme, whose state is a stack of real channels, runs exactly under every plan."""

import warnings
from typing import Any

import pytest
import torch
from memory_cases import PRIMAL_DUAL, PrimalDualCase, distance, encoding, gradients
from test_memory_planner import COILS, measured_peak

from melcore.memory import IterationPlan, MemoryPlan, verify
from melcore.memory.executors import why_not
from melcore.memory.meter import fake_tensors
from melcore.networks import shrinkages
from melcore.unrolled import Encoding, PrimalDual, Unrolled, build, plan
from melcore.unrolled.planning import costs, plan_inference

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("checkpoint", {}),
    ("checkpoint", {"states": "slots"}),
    ("store", {}),
    ("store", {"hold_physics": False}),
    ("store", {"keep_input": True}),
    ("store", {"states": "host"}),
    ("store", {"states": "slots", "hold_physics": False}),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in WAYS]


@pytest.mark.parametrize(("executor", "options"), WAYS, ids=IDS)
@pytest.mark.parametrize("case", PRIMAL_DUAL, ids=str)
def test_gradients_are_those_of_autograd(case: PrimalDualCase, executor: Any, options: dict[str, Any]) -> None:
    made, problem = case.make(), encoding(case.matrix, batch=2, sets=case.sets)
    expected = gradients(made, problem, None)
    # The last extrapolation leads nowhere; everything else is learned.
    assert len(expected) == 2 + len(list(made.parameters())) - 1
    assert min(float(value.norm()) for value in expected.values()) > 0
    memory = MemoryPlan.uniform(executor, 4, **options)
    assert distance(gradients(made, problem, memory), expected) < 1e-12
    with torch.no_grad():
        image = made.refine(problem, problem.adjoint_data, memory=memory)
    torch.testing.assert_close(image, expected["image"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PRIMAL_DUAL, ids=str)
def test_elements_of_a_batch_are_independent(case: PrimalDualCase) -> None:
    made, problem = case.make(), encoding(case.matrix, batch=2, sets=case.sets)
    data, sigma = problem.adjoint_data, problem.sigma
    assert sigma[0] != sigma[1]
    with torch.no_grad():
        both = made.refine(problem, data)
        swapped = made.refine(Encoding(problem.operator, data, sigma.flip(0)), data)
        same = made.refine(Encoding(problem.operator, data, sigma[:1].expand(2)), data)
        one = made.refine(Encoding(problem.operator, data, sigma[:1]), data)
    torch.testing.assert_close(same, one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same[:1], both[:1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same[1:], swapped[1:], rtol=1e-12, atol=1e-12)
    assert float((both - swapped).abs().max()) > 1e-3


def test_mixed_plans_and_gradients_of_the_data() -> None:
    case = PRIMAL_DUAL[2]
    made, problem = case.make(), encoding(case.matrix, batch=2)
    entries = (
        IterationPlan("store", states="slots"),
        IterationPlan("checkpoint", states="host"),
        IterationPlan("plain"),
        IterationPlan("store", keep_input=True),
    )
    results = []
    for memory in (None, MemoryPlan(entries)):
        k_space = problem.operator(problem.adjoint_data).detach().requires_grad_()
        made(k_space, problem.operator, sigma=problem.sigma, memory=memory).abs().square().sum().backward()
        results.append({"k-space": k_space.grad})
    assert distance(results[1], results[0]) < 1e-12


def test_hooks_of_shared_filters_are_called_once() -> None:
    case = PRIMAL_DUAL[0]
    made, problem = case.make(), encoding(case.matrix)
    calls: list[str] = []
    named = {name: parameter for name, parameter in made.named_parameters() if name != "distinct.3.relaxation"}
    for name, parameter in named.items():
        parameter.register_hook(lambda _, name=name: calls.append(name))
    made.refine(problem, problem.adjoint_data, memory=MemoryPlan.uniform("store", 4)).abs().sum().backward()
    assert sorted(calls) == sorted(named)


@pytest.mark.parametrize("executor", ["stream", "tile", "nested", "keep", "reverse"])
def test_executors_that_cannot_cut_it_fall_back_and_say_so_once(executor: Any) -> None:
    case = PRIMAL_DUAL[1]
    made, problem = case.make(), encoding(case.matrix)
    expected = gradients(made, problem, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            assert distance(gradients(made, problem, MemoryPlan.uniform(executor, 4)), expected) < 1e-12
    assert [str(one.message).rsplit("; ", 1)[1] for one in caught] == ["store it is."]
    assert f"cannot be executed as {executor}: Shrinkage " in str(caught[0].message)


@pytest.mark.parametrize("case", PRIMAL_DUAL, ids=str)
def test_the_self_check_knows_its_input(case: PrimalDualCase) -> None:
    for iteration in case.make().iterations:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verify(iteration.regulariser, MemoryPlan((IterationPlan("store"), IterationPlan("stream"))))


def volume(count: int = 5) -> Unrolled:
    torch.manual_seed(0)
    network = {"name": "shrinkage", "dimensions": 3, "filters": 8, "maps": 4, "channels": 8}
    return build({"scheme": "primal_dual", "iterations": count, "regulariser": network})


@pytest.mark.parametrize(("executor", "options"), WAYS, ids=IDS)
def test_the_predicted_peak_is_the_measured_one_within_a_tenth(executor: Any, options: dict[str, Any]) -> None:
    """Some steps look at places, and cost more than the others."""
    made, matrix, memory = volume(), (12, 14, 16), MemoryPlan.uniform(executor, 5, **options)
    with fake_tensors():
        predicted = costs(made, matrix, COILS).peak(memory)
    if options.get("states") != "host":  # on a CPU the host's memory is the device's
        assert predicted == pytest.approx(measured_peak(made, memory, matrix=matrix), rel=0.1)


def test_the_prediction_holds_for_series_and_two_sets() -> None:
    torch.manual_seed(0)
    steps = shrinkages(4, dimensions=2, series=True, filters=6, maps=2, channels=8)
    made, matrix = Unrolled([PrimalDual(step) for step in steps]), (1, 20, 24)
    for executor in ("plain", "store"):
        memory = MemoryPlan.uniform(executor, 4)  # type: ignore[arg-type]
        with fake_tensors():
            predicted = costs(made, matrix, COILS, time=6).peak(memory)
        assert predicted == pytest.approx(measured_peak(made, memory, time=6, matrix=matrix), rel=0.1)


def test_plans_keep_to_their_budget_and_propose_only_what_runs() -> None:
    made, matrix = volume(), (12, 14, 16)
    regulariser = made.iterations[2].regulariser
    with fake_tensors():
        plain = costs(made, matrix, COILS).peak(MemoryPlan.uniform("plain", 5))
    for part in (2.0, 0.8, 0.55):
        found = plan(made, matrix, COILS, int(part * plain), host=False)
        assert all(why_not(entry.executor, regulariser, entry.axis) is None for entry in found.iterations)
        assert measured_peak(made, found, matrix=matrix) <= part * plain
    chosen = plan_inference(made, matrix, COILS, 1 << 30)
    assert {entry.executor for entry in chosen.iterations} == {"plain"}
    assert chosen.predicted_peak_bytes is not None
    assert 0 < chosen.predicted_peak_bytes < 0.6 * plain
