"""Ways to compute a regulariser and its gradients; one module for each."""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from melcore.memory.executors import nested, reverse, stream, tile
from melcore.memory.executors.nested import Nested
from melcore.memory.executors.reverse import Reverse
from melcore.memory.executors.stream import Keep, Stream
from melcore.memory.executors.tile import Tile
from melcore.memory.executors.whole import Whole
from melcore.memory.plan import Axis, IterationPlan
from melcore.memory.protocols import ExecutorLike

__all__ = ["make", "why_not"]

_REASONS = {"nested": nested.why_not, "reverse": reverse.why_not, "tile": tile.why_not}


def why_not(executor: str, regulariser: nn.Module, axis: Axis = "readout") -> str | None:
    """Why an executor cannot treat a regulariser (along an axis, if it streams), or None if it can."""
    if executor in ("keep", "stream"):
        return stream.why_not(regulariser, axis)
    return _REASONS[executor](regulariser) if executor in _REASONS else None


def make(plan: IterationPlan, regulariser: nn.Module) -> ExecutorLike:
    """The executor that an iteration's plan names, or the next best where the regulariser does not allow it."""
    reason = why_not(plan.executor, regulariser, plan.axis)
    if reason is None:
        return _MAKE[plan.executor](plan)
    instead = "nested" if nested.why_not(regulariser) is None else "store"
    # Python shows a warning of one text once for each line, here this one: enough for somebody who trains for days.
    warnings.warn(f"the regulariser cannot be executed as {plan.executor}: {reason}; {instead} it is.", stacklevel=1)
    return _MAKE[instead](plan)


_MAKE: dict[str, Callable[[IterationPlan], ExecutorLike]] = {
    "keep": lambda plan: Keep(
        plan.chunk,
        plan.kept_layers,
        torch.bfloat16 if plan.precision == "bfloat16" else None,
        plan.axis,
        plan.convolution,
    ),
    "reverse": lambda _: Reverse(),
    "store": lambda _: Whole(),
    "nested": lambda _: Nested(),
    "tile": lambda plan: Tile(plan.chunk),
    "stream": lambda plan: Stream(plan.chunk, plan.axis, plan.convolution),
}
