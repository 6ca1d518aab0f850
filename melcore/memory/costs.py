"""What the parts of a model cost, measured on fake tensors; and from that the peak and the work of any plan.

Every way to execute a network is measured once, and so is the physics; the peak of a whole plan follows by adding up
what is there in each phase.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from melcore.memory import executors
from melcore.memory.meter import Meter
from melcore.memory.plan import IterationPlan, MemoryPlan, Way
from melcore.memory.protocols import EncodingLike, IterationLike, State
from melcore.memory.states import recomputed
from melcore.memory.streaming.sweep import AXES
from melcore.memory.unit import HandedOver, Unit

#: Time of one operation of a Fourier transform, in operations of a convolution: transforms are limited by memory
#: bandwidth. A common ratio; `melcore.memory.calibrate` measures a device's own.
FOURIER_COST = 10.0
#: What convolution libraries and the allocator use besides what the meter sees, as a part of the peak.
MARGIN = 0.05


@dataclass(frozen=True)
class Cost:
    """Of one part of an iteration: bytes beside its inputs, and operations.

    Attributes
    ----------
    kept
        Bytes that stay from the forward to the backward.
    forward, backward
        Peaks, above the inputs and, in the backward, above what was kept and the incoming gradient.
    work, backward_work
        Operations in convolutions.
    """

    kept: int
    forward: int
    backward: int
    work: float
    backward_work: float


I = TypeVar("I", bound=IterationLike[Any])  # noqa: E741


class Costs:
    """What the parts of a model cost, measured on fake tensors when first asked for.

    Regularisers of one structure are measured once.

    Parameters
    ----------
    iterations
        Of a model whose parameters are fake; the physics of the middle one stands for all.
    encoding, state
        Fake measurement, and the state before the first iteration.
    fixed
        Bytes of everything that is there all the time: parameters, gradients, optimiser, inputs.
    fourier_cost, convolution
        What is known of the device; see `melcore.memory.calibrate`.
    """

    def __init__(
        self,
        iterations: Sequence[IterationLike[Any]],
        encoding: EncodingLike,
        state: State,
        *,
        fixed: int,
        fourier_cost: float = FOURIER_COST,
        convolution: Way = "channels_last",
    ) -> None:
        self.count, self.encoding, self.fixed = len(iterations), encoding, fixed
        self.fourier_cost, self.convolution = fourier_cost, convolution
        self.iteration = iterations[len(iterations) // 2]
        self.unit = Unit(self.iteration, self.iteration, IterationPlan())
        self._alike = alike(iterations)
        with torch.no_grad():
            self.x, carry = self.iteration.before(state, encoding)
        self.carry = carry
        # The first state, beside the images that are there anyway.
        self.start = _distinct((*state, encoding.adjoint_data)) - _bytes(encoding.adjoint_data)
        self.image = _bytes(self.x)
        # What a unit passes on: the regulariser's output, and the carried images; its input may be one of them.
        self.state = self.image + _distinct(carry)
        self.input = _distinct((self.x, *carry)) - _distinct(carry)
        self._networks: dict[tuple[Any, ...], Cost] = {}

    @cached_property
    def physics(self) -> Cost:
        """The physics between two regularisers, with its record for differentiation."""

        def between(inputs: State) -> State:
            x, carry = self.unit.physics(inputs, self.encoding)
            return x, *carry

        return self._physics(between)

    @cached_property
    def tail(self) -> Cost:
        """The physics behind the last regulariser, whose first image is the result."""
        return self._physics(lambda inputs: self.iteration.after(inputs[0], inputs[1:], self.encoding)[:1])

    def _physics(self, run: Callable[[State], State]) -> Cost:
        with Meter() as meter:
            inputs = [tensor.detach().clone().requires_grad_() for tensor in (self.x, *self.carry)]
            before = _begin(meter)
            x, *carry = run(tuple(inputs))
            kept, forward, work = meter.live - before, meter.peak - before, self._work(meter)
            gradients = [torch.empty_like(tensor) for tensor in carry if tensor.requires_grad]
            before = _begin(meter)
            # As the backward of a unit does it: x and its gradient, which counts here, go when they were used.
            ends = [*(tensor for tensor in carry if tensor.requires_grad), HandedOver.apply(x, [torch.empty_like(x)])]
            del x
            parameters, seeds = self.unit.physical, [*gradients, torch.ones_like(ends[-1])]
            torch.autograd.grad(ends, [*inputs, *parameters], seeds, allow_unused=True)
            return Cost(kept, forward, meter.peak - before, work, self._work(meter))

    def network(self, plan: IterationPlan, number: int = 0) -> Cost:
        """The regulariser of an iteration alone under an executor."""
        iteration = self._alike[number]
        options = (plan.executor, plan.chunk, plan.kept_layers, plan.precision, plan.axis, plan.convolution)
        key = (id(iteration), *options)
        if key not in self._networks:
            whole = plan.executor in ("plain", "checkpoint")
            self._networks[key] = self._plain(iteration) if whole else self._executed(plan, iteration.regulariser)
        return self._networks[key]

    def _plain(self, iteration: IterationLike[Any]) -> Cost:
        regulariser = iteration.regulariser
        with Meter() as meter:
            # Whether its input stays for the backward shows only together with the physics.
            inputs = [tensor.detach().clone().requires_grad_() for tensor in (self.x, *self.carry)]
            before = _begin(meter)
            outputs = Unit(iteration, iteration, IterationPlan())(tuple(inputs), self.encoding)
            kept = meter.live - before - _distinct(outputs) - self.physics.kept + _distinct(self.carry)
            del inputs, outputs
            x = self.x.detach().clone().requires_grad_()
            before = _begin(meter)
            output = regulariser(x)
            forward, work = meter.peak - before, self._work(meter)
            gradient = torch.empty_like(output)
            before = _begin(meter)
            torch.autograd.grad(output, [x, *_learned(regulariser)], gradient)
            # The graph is freed on the way, so the peak above it may be small, but is never negative.
            return Cost(kept, forward, max(0, meter.peak - before), work, self._work(meter))

    def _executed(self, plan: IterationPlan, regulariser: nn.Module) -> Cost:
        executor = executors.make(plan, regulariser)
        axis = 2 if plan.axis == "time" else 5
        whole, planes = self.x.shape[axis], self._enough(plan, regulariser, self.x.shape[axis])
        with Meter() as meter:
            x = self.x.narrow(axis, 0, planes).detach().clone()
            before = _begin(meter)
            with torch.no_grad():
                output, kept_tensors = executor.forward(regulariser, x)
            forward, work = meter.peak - before, self._work(meter)
            kept = meter.live - before - _bytes(output)
            gradient = torch.empty_like(output)
            del output
            before = _begin(meter)
            executor.vjp(regulariser, x, gradient, kept_tensors, _learned(regulariser))
            backward = meter.peak - before
            more = self.image - _bytes(x)  # of the output, or of the gradient of the input
            part = whole / planes
            kept = round(kept * part)
            forward += more + (kept - round(kept / part))
            return Cost(kept, forward, backward + more, work * part, self._work(meter) * part)

    def _enough(self, plan: IterationPlan, regulariser: nn.Module, size: int) -> int:
        """Planes after which a wavefront is in its steady state: the rest of the volume repeats itself."""
        halo = getattr(regulariser, "halo", None)
        streams = executors.why_not(plan.executor, regulariser, plan.axis) is None
        if plan.executor not in ("stream", "keep") or not streams or halo is None:
            return size
        return min(size, 4 * plan.chunk + 8 * int(halo[AXES[plan.axis]]))

    def _work(self, meter: Meter) -> float:
        work = meter.convolution + self.fourier_cost * meter.fourier
        meter.convolution = meter.fourier = 0
        return work

    def work(self, plan: MemoryPlan) -> float:
        """Operations of a training step."""
        physics, total = self.physics, self.tail.work + self.tail.backward_work
        slots = sum(entry.states == "slots" for entry in plan.iterations)
        for number, entry in enumerate(plan.iterations):
            network = self.network(entry, number)
            total += network.work + network.backward_work + physics.work + physics.backward_work
            if entry.executor != "plain":
                total += physics.work * (1 if entry.hold_physics or entry.keep_input else 2)
            if entry.executor == "checkpoint":
                total += network.work
        if slots:
            network = self.network(plan.iterations[0])  # of the first one, though places are looked at later
            total += recomputed(slots, plan.slots) * (network.work + physics.work)
        return total

    def peak(self, plan: MemoryPlan) -> int:
        """Bytes at the fullest moment of a training step, without margin."""
        physics, states, peak = self.physics, 0, 0
        if any(entry.states == "slots" for entry in plan.iterations):
            states += self.start + self.state * min(plan.slots, self.count)
        if any(entry.states == "host" for entry in plan.iterations):
            states += self.state
        for number, entry in enumerate(plan.iterations):
            network = self.network(entry, number)
            # In the forward: the physics, then the network beside its input, on top of what earlier units keep.
            here = self.state
            peak = max(peak, states + here + physics.forward, states + here + self.image + network.forward)
            states += self._kept(entry, network, first=number == 0)
            peak = max(peak, states + self._backward(entry, network))
        # The result itself is among what is fixed, so that nobody lets go of it.
        tail = states + self.state + max(self.tail.forward, self.tail.kept + self.tail.backward)
        return self.fixed + max(peak, tail)

    def _kept(self, entry: IterationPlan, network: Cost, *, first: bool) -> int:
        """Bytes that a unit keeps on the device for its backward."""
        kept = network.kept if entry.executor in ("plain", "keep") else 0
        if entry.executor == "plain":
            return kept + (0 if first else self.physics.kept)  # nothing follows a regulariser there yet
        if entry.states == "host":
            return 0
        if entry.states == "device":
            kept += (self.start if first else self.state) + (self.input if entry.keep_input else 0)
        return kept

    def _backward(self, entry: IterationPlan, network: Cost) -> int:
        """Peak of a unit's backward above what is kept: the network, then the physics."""
        physics, incoming = self.physics, self.state
        held = 0 if entry.executor == "plain" else physics.kept
        during = held if entry.hold_physics else self.input
        if entry.keep_input:
            during = 0
        freed = network.kept if entry.executor == "plain" else 0
        if entry.executor == "checkpoint":
            during += network.kept
        return max(
            during + incoming + network.backward,
            held + incoming + physics.backward - freed,
            0 if entry.executor == "plain" else physics.forward + incoming,
        )

    def predict(self, plan: MemoryPlan, *, margin: float = MARGIN) -> MemoryPlan:
        """The plan with its predicted peak, margin included, and its time relative to plain backpropagation."""
        plain = MemoryPlan((IterationPlan(),) * self.count)
        return replace(
            plan,
            predicted_peak_bytes=round(self.peak(plan) * (1 + margin)),
            relative_time=self.work(plan) / self.work(plain),
        )


def _begin(meter: Meter) -> int:
    """Start a measurement: the bytes that are live before it."""
    meter.restart()
    return meter.live


def _learned(regulariser: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in regulariser.parameters() if parameter.requires_grad]


def alike(iterations: Sequence[I]) -> list[I]:
    """For each iteration, the first whose regulariser is built alike, and costs the same."""
    first: dict[object, I] = {}

    def structure(module: nn.Module) -> object:
        shapes = [(name, parameter.shape, parameter.requires_grad) for name, parameter in module.named_parameters()]
        return repr(module), tuple(shapes)

    return [first.setdefault(structure(iteration.regulariser), iteration) for iteration in iterations]


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _distinct(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: _bytes(tensor) for tensor in tensors}.values())
