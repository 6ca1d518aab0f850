"""Finds the fastest plan that fits a budget of bytes.

The search keeps the last iterations first: what they keep is used, and freed, before anything else is computed in the
backward.
"""

from collections.abc import Iterator
from dataclasses import replace

from melcore.errors import MemoryBudgetError
from melcore.memory import executors
from melcore.memory.costs import MARGIN, Costs
from melcore.memory.plan import Axis, IterationPlan, MemoryPlan
from melcore.units import format_bytes

CHUNKS = (32, 16, 8, 4, 2, 1)


def choose(costs: Costs, budget: int, *, host: bool = True, margin: float = MARGIN) -> MemoryPlan:
    """The fastest plan whose peak, with margin, is within `budget` bytes.

    Parameters
    ----------
    host
        Whether states may wait in the host's memory.

    Raises
    ------
    MemoryBudgetError
        If there is none; the message states the least that would do.
    """
    plain = costs.predict(MemoryPlan((IterationPlan(),) * costs.count), margin=margin)
    if (plain.predicted_peak_bytes or 0) <= budget:
        return plain
    best: MemoryPlan | None = None
    least: int | None = None
    for base in _bases(costs):
        if not host and base.iterations[0].states == "host":
            continue
        bare = costs.predict(base, margin=margin)
        bytes_ = bare.predicted_peak_bytes or 0
        least = bytes_ if least is None else min(least, bytes_)
        if bytes_ > budget:
            continue
        for plan in _upgrades(costs, base):
            found = costs.predict(plan, margin=margin)
            if (found.predicted_peak_bytes or 0) <= budget:
                if best is None or (found.relative_time or 0) < (best.relative_time or 0) - 1e-3:
                    best = found
                break
        if base.iterations[0].states == "device" and best is not None and base.iterations[0].chunk <= 4:
            break
    if best is None:
        raise MemoryBudgetError(
            f"no plan fits {format_bytes(budget)}: the least that would do is {format_bytes(least or 0)} "
            f"({least} bytes). Crop the volume, compress the coils, or use a narrower network."
        )
    return best


def _bases(costs: Costs) -> Iterator[MemoryPlan]:
    """Uniform plans, the fastest first as far as is known beforehand."""
    regulariser, count = costs.iteration.regulariser, costs.count
    axes: list[Axis] = ["readout", "time"] if costs.x.shape[2] > 1 else ["readout"]
    axes = [axis for axis in axes if executors.why_not("stream", regulariser, axis) is None]
    stream = IterationPlan("stream", convolution=costs.convolution)
    smallest = [replace(stream, chunk=chunk, axis=axis) for chunk in CHUNKS for axis in axes]
    if not smallest:
        others = (("store", 16), ("nested", 16), ("tile", 128), ("tile", 64))
        smallest = [
            IterationPlan(name, chunk=chunk)  # type: ignore[arg-type]
            for name, chunk in others
            if executors.why_not(name, regulariser) is None
        ]
    for states in ("device", "host"):
        for hold in (True, False):
            for small in smallest:
                entry = replace(small, states=states, hold_physics=hold)
                yield _lightest(costs, MemoryPlan((entry,) * count), count) if hold else MemoryPlan((entry,) * count)
    for slots in range(min(4, count - 1), -1, -1):
        for small in smallest:
            entry = replace(small, states="slots", hold_physics=False)
            yield MemoryPlan((entry,) * count, slots=slots)


def _lightest(costs: Costs, plan: MemoryPlan, first: int) -> MemoryPlan:
    """The plan in which as many of the `first` iterations keep their inputs, the last ones first, as is lightest.

    An input that is kept costs an image, but then the record of the physics need not wait while the network is
    differentiated. That pays for the last iterations, whose backward runs while most states are still there.
    Neither takes time.
    """
    entries = plan.iterations
    inputs = [replace(entry, keep_input=True) for entry in entries]
    plans = (
        replace(plan, iterations=(*entries[:start], *inputs[start:first], *entries[first:]))
        for start in range(first, -1, -1)
    )
    return min(plans, key=costs.peak)


def _upgrades(costs: Costs, base: MemoryPlan) -> Iterator[MemoryPlan]:
    """The base with more and more of its last iterations keeping what they can, most first."""
    first_entry, hold = base.iterations[0], base.iterations[0].hold_physics
    for last in range(costs.count, -1, -1):
        for kept in _keeping(costs, last, first_entry.axis):
            first = costs.count - len(kept)
            small = (replace(first_entry, keep_input=False),) * first
            plan = replace(base, iterations=(*small, *kept))
            yield _lightest(costs, plan, first) if hold else plan
    yield base


def _keeping(costs: Costs, last: int, axis: Axis) -> Iterator[tuple[IterationPlan, ...]]:
    """So many iterations that keep all activations, behind one that keeps a few; from many to few."""
    regulariser = costs.iteration.regulariser
    if executors.why_not("keep", regulariser, axis) is not None:
        if last:
            yield (IterationPlan("plain"),) * last
        return
    whole = IterationPlan("keep", chunk=32, keep_input=True, axis=axis, convolution=costs.convolution)
    if last < costs.count:
        # Of the signals between the layers the first is never kept.
        for layers in range(len(regulariser.layers) - 3, 0, -1):  # type: ignore[arg-type]
            yield (replace(whole, kept_layers=layers), *(whole,) * last)
    if last:
        yield (whole,) * last
