"""The piece of a model that is executed, and differentiated, as one.

The iterations ``after(regulariser(before(state)))`` in a row are cut behind each regulariser, not behind each
iteration: a unit is the physics that leads to a regulariser, ``before`` and the preceding iteration's ``after``, and
then the regulariser. What a unit saves is the output of the regulariser before it. From that the backward runs the
physics once, with what its differentiation needs, which gives the regulariser's input for its own recomputation;
neither the network nor the data consistency is ever computed for the sake of the other. Behind the last regulariser
follows a tail of physics alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from melcore.errors import MelError
from melcore.memory import executors
from melcore.memory.plan import IterationPlan
from melcore.memory.protocols import E, Gradients, IterationLike, State
from melcore.memory.states import Shelf
from melcore.memory.surroundings import Surroundings


class Unit(Generic[E]):
    """The physics after one regulariser (or from the start), and the next regulariser.

    Its inputs and its outputs are tuples of tensors: the output of a regulariser, and what its iteration carries past
    it; the inputs of the first unit are the initial state.
    """

    def __init__(self, previous: IterationLike[E] | None, current: IterationLike[E], plan: IterationPlan) -> None:
        self.previous, self.current, self.plan = previous, current, plan
        learned = list(current.regulariser.parameters())
        physics = [*(previous.parameters() if previous else ()), *current.parameters()]
        regularisers = {id(p) for i in (previous, current) if i is not None for p in i.regulariser.parameters()}
        self.learned = [p for p in learned if p.requires_grad]
        self.physical = [p for p in dict.fromkeys(physics) if p.requires_grad and id(p) not in regularisers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that the unit differentiates besides its inputs, each once."""
        return [*self.learned, *self.physical]

    def physics(self, inputs: State, encoding: E) -> tuple[Tensor, State]:
        """From the unit's inputs to the regulariser's input, and what is carried past it."""
        state = inputs if self.previous is None else self.previous.after(inputs[0], inputs[1:], encoding)
        return self.current.before(state, encoding)

    @contextmanager
    def replaced(self, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
        """Let other tensors stand for parameters, by their id.

        Gradients with respect to the parameters themselves would call the hooks that users and DDP register on them,
        once for each iteration instead of once.
        """
        changed = []
        iterations = [iteration for iteration in (self.previous, self.current) if iteration is not None]
        for module in dict.fromkeys(module for iteration in iterations for module in iteration.modules()):
            for name, parameter in module._parameters.items():
                if id(parameter) in stand_ins:
                    changed.append((module._parameters, name, parameter))
        try:
            for table, name, parameter in changed:
                table[name] = stand_ins[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for table, name, parameter in changed:
                table[name] = parameter

    def __call__(self, inputs: State, encoding: E) -> State:
        """Compute the unit as one piece."""
        x, carry = self.physics(inputs, encoding)
        return (self.current.regulariser(x), *carry)


def execute(unit: Unit[E], inputs: State, encoding: E, shelf: Shelf, index: int) -> State:
    """Run a unit as its plan says; differentiable where that is called for.

    Parameters
    ----------
    shelf, index
        Where the inputs wait for the backward if not on the device, and the unit's number there.
    """
    tensors = [*inputs, encoding.adjoint_data, *unit.parameters]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if unit.plan.executor == "plain":
        return unit(inputs, encoding)
    if differentiated:
        return tuple(_Recomputed.apply(unit, encoding, (shelf, index), len(inputs), *tensors))
    return _forward(unit, inputs, encoding)[0]


def _forward(unit: Unit[Any], inputs: State, encoding: Any) -> tuple[State, Sequence[Tensor]]:
    """Outputs of a unit, and what its executor keeps; called without automatic differentiation."""
    x, carry = unit.physics(inputs, encoding)
    if unit.plan.executor == "checkpoint":
        return (unit.current.regulariser(x), *carry), ()
    output, kept = executors.make(unit.plan, unit.current.regulariser).forward(unit.current.regulariser, x)
    if unit.plan.keep_input:
        kept = (x, *kept)
    return (output, *carry), kept


class _Recomputed(torch.autograd.Function):
    """A unit of which only the inputs are saved, and what its executor chooses to keep."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit[Any], encoding: Any, place: tuple[Shelf, int], count: int, *tensors: Tensor
    ) -> State:
        inputs = tensors[:count]
        ctx.unit, ctx.encoding, ctx.place, ctx.count = unit, encoding, place, count
        ctx.set_materialize_grads(False)
        surroundings = ctx.surroundings = Surroundings(inputs[0])
        shelf, index = place
        with surroundings.autocast():
            outputs, kept = _forward(unit, inputs, encoding)

        def advance(state: Sequence[Tensor]) -> Sequence[Tensor]:
            with surroundings.restored(), torch.no_grad():
                return _forward(unit, tuple(state), encoding)[0]

        if unit.plan.states == "slots":
            shelf.remember(index, inputs, advance)
        elif unit.plan.states == "host":
            shelf.park(index, (*inputs, *kept))
        else:
            ctx.save_for_backward(*inputs, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise MelError(
                "the memory engine computes first derivatives only, but its backward was asked for a graph of its own "
                "(create_graph=True): set the model's memory plan to None to differentiate twice."
            )
        unit: Unit[Any] = ctx.unit
        needed = ctx.needs_input_grad[4:]
        shelf, index = ctx.place
        saved: Sequence[Tensor]
        known: list[Tensor] = []
        if unit.plan.states == "slots":
            saved = shelf.recall(index)
        elif unit.plan.states == "host":
            saved = shelf.fetch(index)
        else:
            saved = ctx.saved_tensors
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved[: ctx.count], needed[: ctx.count], strict=True)
        ]
        kept = saved[ctx.count :]
        if unit.plan.keep_input:
            known, kept = [kept[0]], kept[1:]
        stand_ins = {id(parameter): parameter.detach().requires_grad_() for parameter in unit.parameters}
        data = ctx.encoding.adjoint_data.detach().requires_grad_(needed[ctx.count])
        leaves = [tensor for tensor in (*inputs, data) if tensor.requires_grad]
        with ctx.surroundings.restored(), unit.replaced(stand_ins):
            encoding = replace(ctx.encoding, adjoint_data=data)
            if unit.plan.executor == "checkpoint":
                known.clear()
                with torch.enable_grad():
                    outputs = unit(tuple(inputs), encoding)
                found = _grad(outputs, [*leaves, *stand_ins.values()], gradients)
            else:
                found = _separately(unit, tuple(inputs), encoding, leaves, stand_ins, known, kept, gradients)
        by_leaf = iter(found)
        results = [next(by_leaf) if tensor.requires_grad else None for tensor in (*inputs, data)]
        return None, None, None, None, *results, *by_leaf


def _separately(
    unit: Unit[Any],
    inputs: State,
    encoding: Any,
    leaves: list[Tensor],
    stand_ins: dict[int, Tensor],
    known: list[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiate the regulariser, then the physics, so that their intermediate results never exist together.

    Where the regulariser's input is `known`, nothing of the physics need be there while the network is differentiated;
    it is taken out of the list, so that it does not wait for the physics.
    """
    regulariser = unit.current.regulariser
    executor = executors.make(unit.plan, regulariser)
    learned = [stand_ins[id(parameter)] for parameter in unit.learned]
    network: Gradients = (None, [None] * len(learned))
    given = bool(known)
    if given:
        x = known.pop()
        if gradients[0] is not None:
            network = executor.vjp(regulariser, x, gradients[0], kept, learned)
        del x
    elif not unit.plan.hold_physics and gradients[0] is not None:
        with torch.no_grad():
            x = unit.physics(inputs, encoding)[0]
        network = executor.vjp(regulariser, x, gradients[0], kept, learned)
        del x
    with torch.enable_grad():
        x, carry = unit.physics(inputs, encoding)
    if unit.plan.hold_physics and not given and gradients[0] is not None:
        network = executor.vjp(regulariser, x.detach(), gradients[0], kept, learned)
    physical = [stand_ins[id(parameter)] for parameter in unit.physical]
    to_x, to_learned = network
    del network
    ends, seeds = [*carry], [*gradients[1:]]
    if to_x is not None and x.requires_grad:
        box = [to_x]
        with torch.enable_grad():
            ends.append(HandedOver.apply(x, box))
        seeds.append(torch.ones_like(ends[-1]))
    del x, to_x
    found = _grad(tuple(ends), [*leaves, *physical], seeds)
    return [*found[: len(leaves)], *to_learned, *found[len(leaves) :]]


class HandedOver(torch.autograd.Function):
    """A scalar whose gradient with respect to a tensor comes out of a box.

    Who calls `torch.autograd.grad` with a gradient holds that, and the tensor, to the end. Here both go as soon as they
    were used, which saves two images.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, box: list[Tensor]) -> Tensor:
        """The scalar."""
        ctx.box = box
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        """The gradient, taken out of the box."""
        return ctx.box.pop(), None


def _grad(outputs: State, inputs: list[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of `inputs`, None where nothing depends on them."""
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
