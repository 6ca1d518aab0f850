"""What to do when the memory was not enough after all: the next cheaper plan, and the same step again."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from melcore.errors import MemoryBudgetError
from melcore.memory.plan import IterationPlan, MemoryPlan

T = TypeVar("T")


# Planes of a chunk that cost hardly any time to do with; fewer keep a device less busy.
_SMALL = 4


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


def retrying(
    plan: MemoryPlan | None, step: Callable[[MemoryPlan | None], T], forget: Callable[[], None]
) -> tuple[T, MemoryPlan | None]:
    """Do a training step; on running out of memory, do it again by a cheaper plan.

    Parameters
    ----------
    plan
        To begin with.
    step
        Forward and backward by a plan. Parameters and optimiser keep their state, so it must not change them before its
        backward has ended.
    forget
        Clears the gradients before a repetition.

    Returns
    -------
    tuple
        What `step` returned, and the plan by which it did so: use it from then on.

    Raises
    ------
    MemoryBudgetError
        If the cheapest plan runs out of memory too.
    """
    while True:
        try:
            return step(plan), plan
        except torch.OutOfMemoryError as error:
            cheaper = demoted(plan) if plan is not None else None
            if cheaper is None:
                raise MemoryBudgetError(
                    "a training step does not fit the device's memory, even with the cheapest plan: use a smaller "
                    f"volume, fewer coils, or a larger device ({error})."
                ) from error
        forget()
        plan = cheaper
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
