"""What to do when the memory was not enough after all: the next cheaper plan, and the same step again."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from melcore.errors import MemoryBudgetError
from melcore.memory.plan import IterationPlan, MemoryPlan

T = TypeVar("T")


# Planes of a chunk that cost hardly any time to do with; fewer keep a device less busy.
_SMALL = 4


class HasPlan(Protocol):
    """A model that runs as its memory plan says."""

    memory: MemoryPlan | None

    def zero_grad(self) -> None:
        """Forget all gradients."""


def demoted(plan: MemoryPlan) -> MemoryPlan | None:
    """The plan with its most expensive iterations one level cheaper, or None if there is no cheaper one."""
    levels = [_level(entry) for entry in plan.iterations]
    worst = min(levels)
    entries = tuple(_cheaper(e) if level == worst else e for e, level in zip(plan.iterations, levels, strict=True))
    if entries == plan.iterations:
        return None
    return replace(plan, iterations=entries, predicted_peak_bytes=None, relative_time=None)


def _level(entry: IterationPlan) -> tuple[int, int, int, int]:
    """Plans in the order in which they are given up, the most expensive first."""
    order = ("plain", "checkpoint", "keep", "store", "nested", "reverse", "tile", "stream")
    place = 2 if entry.states != "device" else int(not (entry.hold_physics or entry.keep_input))
    return order.index(entry.executor), -max(entry.chunk, _SMALL), place, -entry.chunk


def _cheaper(entry: IterationPlan) -> IterationPlan:
    if entry.executor != "stream":
        return IterationPlan("stream", chunk=16, states=entry.states, axis=entry.axis, convolution=entry.convolution)
    if entry.chunk > _SMALL:
        return replace(entry, chunk=max(_SMALL, entry.chunk // 2))
    if entry.states == "device" and (entry.keep_input or entry.hold_physics):
        return replace(entry, keep_input=False, hold_physics=False)
    if entry.states == "device" and torch.cuda.is_available():
        # In the host's memory there is room for the regulariser's input too, and so nothing need wait on the device.
        return replace(entry, states="host", keep_input=True)
    return replace(entry, chunk=max(1, entry.chunk // 2))


def retrying(model: HasPlan, step: Callable[[], T]) -> T:
    """Do a training step; on running out of memory, give the model a cheaper plan and do it again.

    Parameters
    ----------
    model
        Its gradients are cleared before a repetition, its `memory` is replaced for good. Parameters and optimiser keep
        their state, so `step` must not change them before its backward has ended.
    step
        Forward and backward.

    Raises
    ------
    MemoryBudgetError
        If the cheapest plan runs out of memory too.
    """
    while True:
        try:
            return step()
        except torch.OutOfMemoryError as error:
            plan = model.memory or None
            cheaper = demoted(plan) if plan is not None else None
            if cheaper is None:
                raise MemoryBudgetError(
                    "a training step does not fit the device's memory, even with the cheapest plan: use a smaller "
                    f"volume, fewer coils, or a larger device ({error})."
                ) from error
        model.zero_grad()
        model.memory = cheaper
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
