"""States that are not kept are computed again: exactly, and as seldom as Revolve promises."""

from math import comb

import pytest
import torch
from memory_cases import NETWORKS, distance, encoding, gradients, model
from torch import Tensor

from melcore.errors import ConfigError
from melcore.memory import IterationPlan, MemoryPlan
from melcore.memory.states import Shelf, placements, recomputed


@pytest.mark.parametrize("slots", [0, 1, 2, 3, 8])
def test_few_slots_give_the_same_gradients(slots: int) -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, count=7, shared=False), encoding(network.matrix)
    expected = gradients(made, problem, None)
    plan = MemoryPlan((IterationPlan("stream", states="slots"),) * 7, slots=slots)
    assert distance(gradients(made, problem, plan), expected) < 1e-12
    mixed = MemoryPlan((IterationPlan("store", states="slots"),) * 5 + (IterationPlan("plain"),) * 2, slots=slots)
    assert distance(gradients(made, problem, mixed), expected) < 1e-12


@pytest.mark.parametrize(("length", "slots"), [(1, 0), (5, 1), (9, 2), (10, 3), (24, 4), (7, 30)])
def test_slots_hold_what_they_promise_and_units_repeat_as_seldom_as_they_can(length: int, slots: int) -> None:
    shelf = Shelf(length, slots)
    calls = 0

    def advance(state: list[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return [state[0] + 1]

    for index in range(length):
        shelf.remember(index, [torch.tensor(index)], advance)  # type: ignore[arg-type]
    most = 0
    for index in range(length - 1, -1, -1):
        assert int(shelf.recall(index)[0]) == index
        most = max(most, sum(number > 0 for number in shelf._kept))
    assert most <= slots
    assert calls == recomputed(length, slots)
    # Griewank: with s slots, the first included, a chain of C(s + r, s) steps advances each step at most r times.
    times = next(r for r in range(100) if comb(slots + 1 + r, r) >= length)
    assert calls <= times * length


def test_every_state_has_a_slot_where_there_are_enough() -> None:
    assert placements(6, 5) == [1, 2, 3, 4, 5]
    assert recomputed(6, 5) == 0


def test_plans_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="must come before"):
        MemoryPlan((IterationPlan("store"), IterationPlan("store", states="slots")))
    with pytest.raises(ConfigError, match="keep more than a state"):
        IterationPlan("store", keep_input=True, states="slots")
    with pytest.raises(ConfigError, match="negative"):
        MemoryPlan((IterationPlan("store"),), slots=-1)


def test_a_second_backward_through_a_retained_graph_is_the_same() -> None:
    network = NETWORKS[0]
    made, problem = model(network.make, count=5), encoding(network.matrix)
    plan = MemoryPlan((IterationPlan("stream", states="slots"),) * 5, slots=2)
    loss = made.refine(problem, problem.adjoint_data, memory=plan).abs().sum()
    first = torch.autograd.grad(loss, list(made.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(made.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
