"""Finds the fastest plan that fits a budget of bytes.

Every way to execute a network is measured once on fake tensors, and so is the physics; the peak of a whole plan follows
by adding up what is there in each phase. The search keeps the last iterations first: what they keep is used, and freed,
before anything else is computed in the backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from melcore.errors import MemoryBudgetError
from melcore.memory import executors
from melcore.memory.meter import Meter
from melcore.memory.plan import Axis, IterationPlan, MemoryPlan, Way
from melcore.memory.protocols import EncodingLike, IterationLike, State
from melcore.memory.states import recomputed
from melcore.memory.streaming.sweep import AXES
from melcore.memory.unit import Unit
from melcore.units import format_bytes

#: Time of one operation of a Fourier transform, in operations of a convolution: transforms are limited by memory
#: bandwidth. A common ratio; `melcore.memory.calibrate` measures a device's own.
FOURIER_COST = 10.0
#: What convolution libraries and the allocator use besides what the meter sees, as a part of the peak.
MARGIN = 0.05
CHUNKS = (32, 16, 8, 4, 2, 1)


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


class Costs:
    """What the parts of a model cost, measured on fake tensors when first asked for.

    Parameters
    ----------
    iterations
        Of a model whose parameters are fake; the middle one stands for all.
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
        with torch.no_grad():
            self.x, carry = self.iteration.before(state, encoding)
        self.carry = carry
        self.image = _bytes(self.x)
        # What a unit passes on: the regulariser's output, and the carried images; its input may be one of them.
        self.state = self.image + _distinct(carry)
        self.input = _distinct((self.x, *carry)) - _distinct(carry)
        self._networks: dict[tuple[Any, ...], Cost] = {}

    @cached_property
    def physics(self) -> Cost:
        """The physics between two regularisers, with its record for differentiation."""
        with Meter() as meter:
            inputs = [tensor.detach().clone().requires_grad_() for tensor in (self.x, *self.carry)]
            before = _begin(meter)
            x, carry = self.unit.physics(tuple(inputs), self.encoding)
            kept, forward, work = meter.live - before, meter.peak - before, self._work(meter)
            outputs = [tensor for tensor in (x, *carry) if tensor.requires_grad]
            gradients = [torch.empty_like(tensor) for tensor in outputs]
            before = _begin(meter)
            parameters = self.unit.physical
            torch.autograd.grad(outputs, [*inputs, *parameters], gradients, allow_unused=True)
            return Cost(kept, forward, meter.peak - before, work, self._work(meter))

    def network(self, plan: IterationPlan) -> Cost:
        """The regulariser alone under an executor."""
        key = (plan.executor, plan.chunk, plan.kept_layers, plan.precision, plan.axis, plan.convolution)
        if key not in self._networks:
            self._networks[key] = self._plain() if plan.executor in ("plain", "checkpoint") else self._executed(plan)
        return self._networks[key]

    def _plain(self) -> Cost:
        regulariser = self.iteration.regulariser
        with Meter() as meter:
            x = self.x.detach().clone().requires_grad_()
            before = _begin(meter)
            output = regulariser(x)
            kept, forward, work = meter.live - before - _bytes(output), meter.peak - before, self._work(meter)
            gradient = torch.empty_like(output)
            before = _begin(meter)
            torch.autograd.grad(output, [x, *self.unit.learned], gradient)
            # The graph is freed on the way, so the peak above it may be small, but is never negative.
            return Cost(kept, forward, max(0, meter.peak - before), work, self._work(meter))

    def _executed(self, plan: IterationPlan) -> Cost:
        regulariser = self.iteration.regulariser
        executor = executors.make(plan, regulariser)
        axis = 2 if plan.axis == "time" else 5
        whole, planes = self.x.shape[axis], self._enough(plan, self.x.shape[axis])
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
            executor.vjp(regulariser, x, gradient, kept_tensors, self.unit.learned)
            backward = meter.peak - before
            more = self.image - _bytes(x)  # of the output, or of the gradient of the input
            part = whole / planes
            kept = round(kept * part)
            forward += more + (kept - round(kept / part))
            return Cost(kept, forward, backward + more, work * part, self._work(meter) * part)

    def _enough(self, plan: IterationPlan, size: int) -> int:
        """Planes after which a wavefront is in its steady state: the rest of the volume repeats itself."""
        regulariser = self.iteration.regulariser
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
        physics, total = self.physics, self.physics.work + self.physics.backward_work
        slots = sum(entry.states == "slots" for entry in plan.iterations)
        for entry in plan.iterations:
            network = self.network(entry)
            total += network.work + network.backward_work + physics.work + physics.backward_work
            if entry.executor != "plain":
                total += physics.work * (1 if entry.hold_physics or entry.keep_input else 2)
            if entry.executor == "checkpoint":
                total += network.work
        if slots:
            network = self.network(plan.iterations[0])
            total += recomputed(slots, plan.slots) * (network.work + physics.work)
        return total

    def peak(self, plan: MemoryPlan) -> int:
        """Bytes at the fullest moment of a training step, without margin."""
        physics, states, peak = self.physics, 0, 0
        incoming = self.state
        if any(entry.states == "slots" for entry in plan.iterations):
            states += self.state * min(plan.slots, self.count)
        if any(entry.states == "host" for entry in plan.iterations):
            states += self.state
        for number, entry in enumerate(plan.iterations):
            network = self.network(entry)
            kept = network.kept if entry.executor in ("plain", "keep") else 0
            if entry.executor == "plain":
                kept += physics.kept if number else 0  # nothing follows a regulariser there yet
            elif entry.states == "host":
                kept = 0
            elif entry.states == "device":
                kept += (self.state if number else 0) + (self.input if entry.keep_input else 0)
            # In the forward: the physics, then the network beside its input, on top of what earlier units keep.
            here = self.state
            peak = max(peak, states + here + physics.forward, states + here + self.image + network.forward)
            states += kept
            held = 0 if entry.executor == "plain" else physics.kept
            during = held if entry.hold_physics and not entry.keep_input else self.input
            if entry.keep_input:
                during = 0
            # In the backward: the network, then the physics, when what the network kept is freed.
            freed = network.kept if entry.executor == "plain" else 0
            if entry.executor == "checkpoint":
                during += network.kept
            backward = max(
                during + incoming + network.backward,
                held + incoming + self.image + physics.backward - freed,
                0 if entry.executor == "plain" else physics.forward + incoming,
            )
            peak = max(peak, states + backward)
        tail = states + self.state + physics.kept + incoming + physics.backward
        return self.fixed + max(peak, tail)

    def predict(self, plan: MemoryPlan, *, margin: float = MARGIN) -> MemoryPlan:
        """The plan with its predicted peak, margin included, and its time relative to plain backpropagation."""
        plain = MemoryPlan((IterationPlan(),) * self.count)
        return replace(
            plan,
            predicted_peak_bytes=round(self.peak(plan) * (1 + margin)),
            relative_time=self.work(plan) / self.work(plain),
        )

    def published_reversal(self, fixed_point_steps: int = 5) -> tuple[int, float]:
        """Peak, without margin, and relative time of Wang et al. 2021, which this engine is to be compared with.

        States are not kept but recovered: the data consistency's in closed form, the regulariser's by so many
        evaluations in a fixed-point iteration. Then the iteration is differentiated as a whole.
        """
        plain, physics = IterationPlan(), self.physics
        network = self.network(plain)
        graph = physics.kept + network.kept + 3 * self.state
        peak = self.fixed + graph + max(network.backward, physics.backward - network.kept)
        evaluations = 2 + fixed_point_steps
        once = evaluations * network.work + network.backward_work + 3 * physics.work + physics.backward_work
        return peak, self.count * once / self.work(MemoryPlan((plain,) * self.count))

    def bases(self) -> Iterator[MemoryPlan]:
        """Uniform plans, the fastest first as far as is known beforehand."""
        regulariser, count = self.iteration.regulariser, self.count
        axes: list[Axis] = ["readout", "time"] if self.x.shape[2] > 1 else ["readout"]
        axes = [axis for axis in axes if executors.why_not("stream", regulariser, axis) is None]
        stream = IterationPlan("stream", convolution=self.convolution)
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
                    yield self._lightest(MemoryPlan((entry,) * count), count) if hold else MemoryPlan((entry,) * count)
        for slots in range(min(4, count - 1), -1, -1):
            for small in smallest:
                entry = replace(small, states="slots", hold_physics=False)
                yield MemoryPlan((entry,) * count, slots=slots)

    def _lightest(self, plan: MemoryPlan, first: int) -> MemoryPlan:
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
        return min(plans, key=self.peak)

    def upgrades(self, base: MemoryPlan) -> Iterator[MemoryPlan]:
        """The base with more and more of its last iterations keeping what they can, most first."""
        first_entry, hold = base.iterations[0], base.iterations[0].hold_physics
        for last in range(self.count, -1, -1):
            for kept in self._keeping(last, first_entry.axis):
                first = self.count - len(kept)
                small = (replace(first_entry, keep_input=False),) * first
                plan = replace(base, iterations=(*small, *kept))
                yield self._lightest(plan, first) if hold else plan
        yield base

    def _keeping(self, last: int, axis: Axis) -> Iterator[tuple[IterationPlan, ...]]:
        """So many iterations that keep all activations, behind one that keeps a few; from many to few."""
        regulariser = self.iteration.regulariser
        if executors.why_not("keep", regulariser, axis) is not None:
            if last:
                yield (IterationPlan("plain"),) * last
            return
        whole = IterationPlan("keep", chunk=32, keep_input=True, axis=axis, convolution=self.convolution)
        if last < self.count:
            # Of the signals between the layers the first is never kept.
            for layers in range(len(regulariser.layers) - 3, 0, -1):  # type: ignore[arg-type]
                yield (replace(whole, kept_layers=layers), *(whole,) * last)
        if last:
            yield (whole,) * last


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
    for base in costs.bases():
        if not host and base.iterations[0].states == "host":
            continue
        bare = costs.predict(base, margin=margin)
        bytes_ = bare.predicted_peak_bytes or 0
        least = bytes_ if least is None else min(least, bytes_)
        if bytes_ > budget:
            continue
        for plan in costs.upgrades(base):
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


def _begin(meter: Meter) -> int:
    """Start a measurement: the bytes that are live before it."""
    meter.restart()
    return meter.live


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _distinct(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: _bytes(tensor) for tensor in tensors}.values())
