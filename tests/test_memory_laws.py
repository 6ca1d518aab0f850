"""Every way to execute a model gives the gradients of plain automatic differentiation."""

from typing import Any

import pytest
import torch
from memory_cases import NETWORKS, SCHEMES, Network, distance, encoding, gradients, model
from torch import nn

from melcore.errors import ConfigError, DataError, MelError
from melcore.memory import IterationPlan, MemoryPlan
from melcore.networks import Regulariser, ResidualCNN

EXECUTORS: list[tuple[str, dict[str, Any]]] = [
    ("checkpoint", {}),
    ("store", {}),
    ("store", {"keep_input": True}),
    ("stream", {"chunk": 1}),
    ("stream", {"chunk": 3, "hold_physics": False}),
    ("stream", {"chunk": 64, "keep_input": True}),
    ("stream", {"chunk": 4, "states": "slots"}),
    ("stream", {"chunk": 2, "axis": "time"}),
    ("stream", {"chunk": 3, "convolution": "sliced"}),
    ("stream", {"chunk": 4, "convolution": "contiguous"}),
    ("store", {"keep_input": True, "states": "host"}),
    ("keep", {"chunk": 3}),
    ("keep", {"chunk": 7, "kept_layers": 1, "states": "host", "keep_input": True}),
    ("keep", {"chunk": 2, "axis": "time"}),
    ("nested", {}),
    ("tile", {"chunk": 2}),
    ("tile", {"chunk": 5, "keep_input": True}),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in EXECUTORS]


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_network_has_the_gradients_of_autograd(network: Network, executor: Any, options: dict[str, Any]) -> None:
    made, problem = model(network.make), encoding(network.matrix, batch=2)
    expected = gradients(made, problem, None)
    found = gradients(made, problem, MemoryPlan.uniform(executor, 3, **options))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_the_gradients_of_autograd(
    scheme: str, shared: bool, executor: Any, options: dict[str, Any]
) -> None:
    network = NETWORKS[1]
    made, problem = model(network.make, scheme=scheme, shared=shared), encoding(network.matrix)
    expected = gradients(made, problem, None)
    found = gradients(made, problem, MemoryPlan.uniform(executor, 3, **options))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
def test_single_precision_is_no_further_off_than_autograd_itself(executor: Any, options: dict[str, Any]) -> None:
    network = NETWORKS[1]
    exact = gradients(model(network.make), encoding(network.matrix), None)
    made = model(network.make, dtype=torch.float32)
    problem = encoding(network.matrix, dtype=torch.complex64)
    plain = distance(gradients(made, problem, None), exact)
    found = distance(gradients(made, problem, MemoryPlan.uniform(executor, 3, **options)), exact)
    assert 0 < found <= 1.5 * plain


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
def test_reruns_are_identical_to_the_bit(executor: Any, options: dict[str, Any]) -> None:
    network = NETWORKS[2]
    made, problem = model(network.make, dtype=torch.float32), encoding(network.matrix, dtype=torch.complex64)
    plan = MemoryPlan.uniform(executor, 3, **options)
    first, second = (gradients(made, problem, plan) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_plans_may_differ_from_iteration_to_iteration() -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, count=4, shared=False), encoding(network.matrix)
    expected = gradients(made, problem, None)
    names = ("store", "plain", "checkpoint", "plain")
    found = gradients(made, problem, MemoryPlan(tuple(IterationPlan(name) for name in names)))  # type: ignore[arg-type]
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_reach_the_data(scheme: str, executor: Any, options: dict[str, Any]) -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, scheme=scheme), encoding(network.matrix)
    results = []
    for plan in (None, MemoryPlan.uniform(executor, 3, **options)):
        k_space = problem.operator(problem.adjoint_data).detach().requires_grad_()
        made(k_space, problem.operator, sigma=problem.sigma, memory=plan).abs().square().sum().backward()
        results.append({"k-space": k_space.grad})
    assert distance(results[1], results[0]) < 1e-12


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
def test_gradients_accumulate_and_frozen_parameters_stay(executor: Any, options: dict[str, Any]) -> None:
    network = NETWORKS[0]
    made, problem = model(network.make), encoding(network.matrix)
    next(made.parameters()).requires_grad_(False)
    results = []
    for plan in (None, MemoryPlan.uniform(executor, 3, **options)):
        made.zero_grad()
        for _ in range(2):
            made.refine(problem, problem.adjoint_data, memory=plan).abs().sum().backward()
        results.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
    assert len(results[0]) == len(list(made.parameters())) - 1
    assert distance(results[1], results[0]) < 1e-12


@pytest.mark.parametrize(("executor", "options"), EXECUTORS, ids=IDS)
def test_inference_equals_training(executor: Any, options: dict[str, Any]) -> None:
    network = NETWORKS[1]
    made, problem = model(network.make), encoding(network.matrix)
    expected = gradients(made, problem, None)["image"]
    plan = MemoryPlan.uniform(executor, 3, **options)
    with torch.no_grad():
        image = made.refine(problem, problem.adjoint_data, memory=plan)
    torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)
    assert not image.requires_grad


class Noisy(Regulariser):
    """An opaque regulariser with dropout, and an in-place operation."""

    dimensions, sets = "2d", 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.view_as_real(x[:, 0, 0, 0]).permute(0, 3, 1, 2)
        features = self.second(self.dropout(self.first(features)).relu_()).float()
        return x + torch.view_as_complex(features.permute(0, 2, 3, 1).contiguous())[:, None, None, None]


@pytest.mark.parametrize("executor", ["checkpoint", "store"])
def test_dropout_and_autocast_are_the_same_in_the_recomputation(executor: Any) -> None:
    made, problem = model(Noisy, dtype=torch.float32), encoding(NETWORKS[0].matrix, batch=2, dtype=torch.complex64)
    results = []
    for plan in (None, MemoryPlan.uniform(executor, 3)):
        torch.manual_seed(3)
        # The cache would add up the gradients of shared weights in bfloat16; the engine adds them up in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            made.zero_grad()
            image = made.refine(problem, problem.adjoint_data, memory=plan)
        image.abs().square().sum().backward()
        results.append({"image": image.detach()} | {name: p.grad.clone() for name, p in made.named_parameters()})
        results[-1]["next random number"] = torch.rand(1)
    assert distance(results[1], results[0]) < 1e-6


def test_a_half_plain_model_under_autocast_keeps_its_gradients() -> None:
    """A weight that was cast while nothing was differentiated must not stay in autocast's cache."""
    network = NETWORKS[0]
    made = model(network.make, dtype=torch.float32)
    problem = encoding(network.matrix, dtype=torch.complex64)
    results = []
    for names in (("plain", "plain", "plain"), ("store", "plain", "plain")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(gradients(made, problem, MemoryPlan(tuple(IterationPlan(n) for n in names))))  # type: ignore[arg-type]
    assert distance(results[1], results[0]) < 0.02


def test_the_second_derivative_is_refused() -> None:
    network = NETWORKS[0]
    made, problem = model(network.make), encoding(network.matrix)
    plan = MemoryPlan.uniform("store", 3)
    loss = made.refine(problem, problem.adjoint_data, memory=plan).abs().sum()
    with pytest.raises(MelError, match="first derivatives only"):
        torch.autograd.grad(loss, list(made.parameters()), create_graph=True)


def test_a_plan_for_another_model_is_refused() -> None:
    network = NETWORKS[0]
    made, problem = model(network.make), encoding(network.matrix)
    plan = MemoryPlan.uniform("store", 2)
    with pytest.raises(ConfigError, match="made for 2 iterations, but the model has 3"):
        made.refine(problem, problem.adjoint_data, memory=plan)


@pytest.mark.parametrize("executor", ["plain", "checkpoint", "store"])
def test_the_iteration_that_is_not_finite_is_named(executor: Any) -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, shared=False), encoding(network.matrix)
    plan = MemoryPlan.uniform(executor, 3)
    with torch.no_grad():
        next(made.distinct[1].regulariser.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match=r"regulariser of iteration 2 \(of 3\)"):
        made.refine(problem, problem.adjoint_data, memory=plan)
    with pytest.raises(DataError, match="initial image"):
        made.refine(problem, problem.adjoint_data * float("nan"), memory=plan)
    with torch.no_grad():
        next(made.distinct[1].regulariser.parameters()).fill_(0.1)
        made.distinct[2].mu.values.fill_(float("nan"))
    with pytest.raises(DataError, match=r"last step of iteration 3"):
        made.refine(problem, problem.adjoint_data, memory=plan)
    with pytest.raises(DataError, match="iteration 3"):
        made.refine(problem, problem.adjoint_data)


def test_unknown_executors_are_refused() -> None:
    with pytest.raises(ConfigError, match="no executor 'streem'"):
        IterationPlan("streem")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1 plane"):
        IterationPlan("stream", chunk=0)


def test_a_plan_prints_and_serialises() -> None:
    plan = MemoryPlan((IterationPlan("stream", chunk=8, states="host"),) * 3 + (IterationPlan("keep"),))
    plan = plan.with_prediction(3 << 30, 1.335, ["made for this test"])
    text = str(plan)
    assert "1-3" in text
    assert "stream 8" in text
    assert "3.00 GiB" in text
    assert "1.33 x" in text or "1.34 x" in text
    rows = plan.to_dict()["iterations"]
    assert [row["executor"] for row in rows] == ["stream"] * 3 + ["keep"]
    assert rows[0]["where"] == "host"


def test_parameters_of_one_network_reach_the_hooks_once() -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, count=4), encoding(network.matrix)
    plan = MemoryPlan.uniform("store", 4)
    calls: dict[str, int] = {}
    for name, parameter in made.named_parameters():

        def count(_: torch.Tensor, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        parameter.register_hook(count)
    made.refine(problem, problem.adjoint_data, memory=plan).abs().sum().backward()
    assert calls == {name: 1 for name, _ in made.named_parameters()}
    assert isinstance(made.iterations[0].regulariser, ResidualCNN)
