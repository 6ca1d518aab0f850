"""Runs the iterations of a model as a memory plan says. See `melcore.memory.plan` for what the executors do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from melcore.errors import ConfigError, DataError
from melcore.memory.plan import IterationPlan, MemoryPlan
from melcore.memory.protocols import E, IterationLike, State
from melcore.memory.states import Shelf
from melcore.memory.unit import Unit, execute


def run(iterations: Sequence[IterationLike[E]], state: State, encoding: E, plan: MemoryPlan | None = None) -> State:
    """Run `iterations` one after the other from `state`.

    Parameters
    ----------
    iterations
        At least one; the same object may stand several times, with shared weights.
    state
        Complex images ``(batch, set, time, z, y, x)``; the first one is the reconstruction.
    encoding
        Passed to the iterations; gradients flow to its `adjoint_data` too.
    plan
        One entry for each iteration; None is plain automatic differentiation. A plan changes memory and time, never
        results: gradients are those of plain automatic differentiation up to rounding.

    Raises
    ------
    ConfigError
        If the plan is made for another number of iterations.
    DataError
        If a state is not finite; the iteration is named.
    """
    plans = (IterationPlan(),) * len(iterations) if plan is None else plan.iterations
    if len(plans) != len(iterations):
        raise ConfigError(
            f"the memory plan is made for {len(plans)} iterations, but the model has {len(iterations)}: make a new one."
        )
    sizes = [_size(state[0])]
    tensors = state
    del state
    shelf = Shelf(sum(entry.states == "slots" for entry in plans), plan.slots if plan else 0)
    for index, (previous, current, entry) in enumerate(zip((None, *iterations), iterations, plans, strict=False)):
        tensors = execute(Unit(previous, current, entry), tensors, encoding, shelf, index)
        sizes.append(_size(tensors[0]))
    last = iterations[-1].after(tensors[0], tensors[1:], encoding)
    _check_finite([*sizes, _size(last[0])])
    return last


def _size(x: Tensor) -> Tensor:
    """One number that is not finite if `x` is not: looked at once, at the end, so that the device need not wait."""
    return torch.linalg.vector_norm(x.detach(), ord=1)


def _check_finite(sizes: list[Tensor]) -> None:
    finite = torch.isfinite(torch.stack(sizes)).tolist()
    if all(finite):
        return
    first = finite.index(False)
    count = len(sizes) - 2
    if first == 0:
        raise DataError("the initial image contains NaN or infinity: check the k-space data and the coil maps.")
    where = f"the regulariser of iteration {first}" if first <= count else f"the last step of iteration {count}"
    raise DataError(
        f"{where} (of {count}) gave NaN or infinity: lower the learning rate, or check the scale of the data."
    )
