"""Runs the iterations of a model as a memory plan says. See `melcore.memory.plan` for what the executors do."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from melcore.memory.plan import MemoryPlan

State = tuple[Tensor, ...]


def run(iterations: Sequence[Any], state: State, encoding: Any, plan: MemoryPlan | None = None) -> State:
    """Run `iterations` one after the other from `state`; None is plain automatic differentiation."""
    for iteration in iterations:
        state = iteration(state, encoding)
    return state
