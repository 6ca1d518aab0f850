"""States that are not kept but computed back from later ones, each certified.

Wang et al., Memory-efficient learning for high-dimensional MRI reconstruction (2021), train with a memory that does not
grow with the number of iterations: the input of an iteration is recovered from its output, the network's by its inverse
or a fixed point, the data consistency's in closed form. That is right only where the way forward can be undone in the
precision at hand: a network that changes an image too much has no convergent fixed point, truncated conjugate gradients
have no closed form, and every iteration multiplies the error, by up to ``1 + 1 / mu`` for data consistency.

So every recovered state is compared with a certificate that the forward made (`melcore.memory.certificate`), and used
only if its error is within a bound. Beyond it, states are computed forward again from the nearest exact one. What is
learned thereby is remembered for each iteration as its *reach*: how many iterations in a row were undone well, up to
it. From then on the forward keeps one exact state for each reach, and later steps find their way back without failing;
an iteration whose reach is 0 keeps its state always. `reports` shows what came of it.

How often a network is evaluated on the way back depends on the data, so processes that must evaluate it together, as
those of FSDP do where a regulariser is sharded on its own, cannot use this; shard the model as a whole.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic

import torch
from torch import Tensor, nn

from melcore.memory.certificate import Certificate
from melcore.memory.plan import IterationPlan
from melcore.memory.protocols import E, InvertibleLike, IterationLike, State, UndoableLike
from melcore.memory.reach import Report, ReversalWarning, record_of, reports

__all__ = ["FIXED_POINT_STEPS", "Report", "Reversal", "ReversalWarning", "invert", "reports", "why_not"]

FIXED_POINT_STEPS = 20  #: evaluations of a network without an inverse, at most, to find its input

Advance = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def why_not(previous: IterationLike[Any], current: IterationLike[Any]) -> str | None:
    """Why the physics between two regularisers cannot be undone, or None if it can."""
    for iteration in (current, previous):
        reason = getattr(iteration, "irreversible", "it declares no way back")
        if reason is not None or not isinstance(iteration, UndoableLike):
            return f"{type(iteration).__name__} cannot be undone: {reason or 'it lacks undo_before or undo_after'}"
    return None


def invert(regularise: Callable[[Tensor], Tensor], regulariser: nn.Module, output: Tensor) -> Tensor:
    """The image that a regulariser maps to `output`, as well as it can be found.

    Parameters
    ----------
    regularise
        Computes the regulariser, by whatever executor.
    regulariser
        Its own ``inverse`` is used if it has one. Otherwise ``x = x + output - regularise(x)`` is repeated, which
        converges if ``regulariser(x) - x`` has a Lipschitz constant below 1: `FIXED_POINT_STEPS` times, or until the
        change is below ``eps^(3/4)`` of the image, or does not shrink any more.
    """
    if isinstance(regulariser, InvertibleLike):
        return regulariser.inverse(output)
    x, before = output, math.inf
    scale = torch.linalg.vector_norm(output)
    tolerance = torch.finfo(output.dtype).eps ** 0.75
    for _ in range(FIXED_POINT_STEPS):
        change = output - regularise(x)
        x = x + change if x is output else x.add_(change)
        size = torch.linalg.vector_norm(change)
        del change
        if bool(size <= tolerance * scale):
            break
        if not (now := float(size)) < before:
            break
        before = now
    return x


class Reversal(Generic[E]):
    """The states of one run that are computed back, and the exact ones from which to compute forward.

    Parameters
    ----------
    iterations, plans
        Of the whole model.
    """

    def __init__(self, iterations: Sequence[IterationLike[E]], plans: Sequence[IterationPlan]) -> None:
        self._iterations, self._plans = list(iterations), plans
        for index, plan in enumerate(plans):
            if index and plan.states == "reverse":
                self._refuse(index, why_not(iterations[index - 1], iterations[index]))
        self._keeps = self._to_keep(0, len(plans) - 1)
        self._advance: dict[int, Advance] = {}
        self._exact: dict[int, Callable[[], Sequence[Tensor]]] = {}
        self._again: dict[int, Sequence[Tensor]] = {}
        self._handed: dict[int, tuple[Sequence[Tensor], int]] = {}

    def _refuse(self, index: int, reason: str | None) -> None:
        if reason is None:
            return
        record = record_of(self._iterations[index])
        record.reach, record.reason = 0, reason
        self._warn(index, f"states of iteration {index + 1} are kept on the device, not computed back: {reason}.")

    def _warn(self, index: int, message: str) -> None:
        """Once for each model."""
        if not any(record_of(iteration).warned for iteration in self._iterations):
            record_of(self._iterations[index]).warned = True
            warnings.warn(message, ReversalWarning, stacklevel=2)

    def _to_keep(self, first: int, last: int) -> set[int]:
        """Units from `first` to `last` whose inputs must be kept, if the outputs of `last` are exact."""
        keep, depth = set(), 0
        for index in range(last, first - 1, -1):
            depth += 1
            if self._plans[index].states != "reverse":
                depth = 0
            elif depth > record_of(self._iterations[index]).reach:
                keep.add(index)
                depth = 0
        return keep

    def recovers(self, index: int) -> bool:
        """Whether the inputs of a unit are computed back; where not, it keeps them."""
        return self._plans[index].states == "reverse" and index not in self._keeps and index - 1 in self._advance

    def keeps_outputs(self, index: int) -> bool:
        """Whether a unit must keep its outputs, as nothing that runs later in the backward hands them on."""
        return index + 1 == len(self._plans) or self._plans[index + 1].executor == "plain"

    def enter(self, index: int, advance: Advance, exact: Callable[[], Sequence[Tensor]] | None) -> None:
        """Note a unit in the forward: how its outputs are computed again, and where its inputs are if they are kept."""
        self._advance[index] = advance
        if exact is not None:
            self._exact[index] = exact

    def hand_on(self, index: int, inputs: Sequence[Tensor], depth: int) -> None:
        """In the backward: the inputs of a unit are the outputs of the one before, exact if `depth` is 0."""
        if index and index - 1 in self._advance and self.recovers(index - 1):
            self._handed[index - 1] = [tensor.detach() for tensor in inputs], depth

    def recall(
        self,
        index: int,
        outputs: Sequence[Tensor],
        undo: Callable[[State], tuple[Tensor, State]],
        certificates: tuple[Certificate, Certificate],
    ) -> tuple[Sequence[Tensor], list[Tensor], int]:
        """The inputs of a unit, the regulariser's input if it was found too, and how many units in a row were undone.

        Parameters
        ----------
        outputs
            Those of the unit where it kept them; empty where they were handed on.
        undo
            From the unit's outputs to the regulariser's input and the unit's inputs.
        certificates
            Of the regulariser's input and of the unit's inputs.
        """
        handed, depth = self._handed.pop(index, (outputs, 0))
        if index in self._again:
            return self._again.pop(index), [], 0
        record = record_of(self._iterations[index])
        if depth + 1 <= record.reach:
            x, inputs = undo(tuple(handed))
            errors = [certificates[0].error((x,)), certificates[1].error(inputs)]
            bound = _bound(self._plans[index], x)
            if all(bool(error <= bound) for error in errors):
                record.recovered += 1
                record.worst = max(record.worst, *(float(error) for error in errors))
                return inputs, [x], depth + 1
            del x, inputs
            self._fail(index, depth, [float(error) for error in errors], bound)
        del handed
        return self._computed_again(index), [], 0

    def _fail(self, index: int, depth: int, errors: list[float], bound: float) -> None:
        record, iteration = record_of(self._iterations[index]), self._iterations[index]
        network = not errors[0] <= bound
        error = errors[0] if network else errors[1]
        record.reach = depth
        record.reason = (
            f"the {depth + 1}. state in a row was off by up to {error:.1e}, more than {bound:.1e}, "
            f"behind the {'network' if network else 'physics'}"
        )
        remedy = (
            f"{type(iteration.regulariser).__name__} changes images too much for a fixed point: use a coupling network"
            if network
            else "let conjugate gradients converge (relative_tolerance, cg_iterations), or raise their weight"
        )
        if depth:
            remedy = f"errors grow from one to the next; if that is too often, {remedy}"
        kept = f"one state in {depth + 1} is" if depth else "states are"
        self._warn(
            index,
            f"the input of iteration {index + 1} could not be computed back: {record.reason}. It is computed forward "
            f"again, and from now on {kept} kept; gradients stay exact. {remedy[0].upper()}{remedy[1:]}, or plan for "
            "states on the device.",
        )

    def _computed_again(self, index: int) -> Sequence[Tensor]:
        """The inputs of a unit from the nearest exact ones before; those that will be needed on the way are kept."""
        exact = {number: get for number, get in self._exact.items() if number <= index}
        start = max((*exact, *(number for number in self._again if number <= index)))
        state = self._again[start] if start in self._again else exact[start]()
        keep = self._to_keep(start + 1, index - 1)
        for number in range(start, index):
            state = self._advance[number](state)
            if number + 1 in keep:
                self._again[number + 1] = state
        return state


def _bound(plan: IterationPlan, like: Tensor) -> float:
    return plan.reversal_bound if plan.reversal_bound is not None else torch.finfo(like.dtype).eps ** 0.5
