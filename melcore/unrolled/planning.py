"""Memory plans for a model and a problem, on any machine: nothing is allocated, no device is needed."""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from melcore.errors import MemoryBudgetError
from melcore.memory import MemoryPlan
from melcore.memory.costs import FOURIER_COST, MARGIN, Costs, alike
from melcore.memory.executors import why_not
from melcore.memory.meter import Meter, fake_tensors
from melcore.memory.plan import Way
from melcore.memory.planner import CHUNKS, choose
from melcore.physics import Sense
from melcore.physics.fourier import centring_phase
from melcore.units import format_bytes
from melcore.unrolled.iteration import Encoding
from melcore.unrolled.model import Unrolled

_OPTIMISER_STATES = 2  # Adam's two moments


def costs(
    model: Unrolled,
    shape: tuple[int, int, int],
    coils: int,
    *,
    time: int = 1,
    batch: int = 1,
    sets: int = 1,
    sampled_readout: bool = True,
    fourier_cost: float = FOURIER_COST,
    convolution: Way = "channels_last",
) -> Costs:
    """What the parts of a model cost for a problem; see `plan`. Use it within `melcore.memory.meter.fake_tensors`."""
    twin, encoding = _fake_problem(model, shape, coils, time, batch, sets, sampled_readout)
    data = encoding.adjoint_data
    parameters = sum(p.numel() * p.element_size() for p in twin.parameters())
    buffers = sum(b.numel() * b.element_size() for b in encoding.operator.buffers())
    # Beside the operator: its adjoint data, the target, and the result, which whoever trains holds for the metrics.
    images = 3 * data.numel() * data.element_size()
    fixed = parameters * (2 + _OPTIMISER_STATES) + buffers + images
    iterations = twin.iterations
    known = {"fourier_cost": fourier_cost, "convolution": convolution}
    return Costs(iterations, encoding, iterations[0].start(data, encoding), fixed=fixed, **known)  # type: ignore[arg-type]


def _fake_problem(
    model: Unrolled,
    shape: tuple[int, int, int],
    coils: int,
    time: int,
    batch: int,
    sets: int,
    sampled_readout: bool,
) -> tuple[Unrolled, Encoding]:
    """A twin of the model and a measurement for it, of fake tensors."""
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    complex_, real = (torch.complex128, torch.float64) if wide else (torch.complex64, torch.float32)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        twin = copy.deepcopy(model)
        # The ramps of the transforms are cached for good, so they must be made of real numbers.
        like = torch.empty(0, dtype=complex_)
        for conjugate in (False, True):
            centring_phase(shape, range(3), like=like, conjugate=conjugate)
    _make_fake(twin)
    z, y, x = shape
    maps = torch.empty((batch, sets, coils, 1, z, y, x), dtype=complex_)
    mask = torch.empty((batch, 1, time, z, y, 1 if sampled_readout else x), dtype=real)
    operator = Sense(maps, mask, time=time, coil_batch=None if sampled_readout else 1)
    data = torch.empty(operator.domain, dtype=complex_)
    sigma, phase = torch.empty(batch, dtype=real), torch.empty((batch, 1, 1, 1, 1, 1), dtype=complex_)
    return twin, Encoding(operator, data, sigma, phase)


def plan(
    model: Unrolled,
    shape: tuple[int, int, int],
    coils: int,
    budget: int,
    *,
    time: int = 1,
    batch: int = 1,
    sets: int = 1,
    sampled_readout: bool = True,
    host: bool = True,
    margin: float = MARGIN,
    fourier_cost: float = FOURIER_COST,
    convolution: Way = "channels_last",
) -> MemoryPlan:
    """The fastest memory plan for training `model` on such data within `budget` bytes.

    Parameters
    ----------
    shape
        Image matrix (z, y, x).
    coils, time, batch, sets
        Coils (after compression), frames, examples at a time, map sets.
    budget
        For everything that training holds on the device: parameters, gradients, Adam's moments, coil maps, mask,
        adjoint data, target, result, states, and a margin for workspaces. k-space itself is not needed once its adjoint
        is known.
    sampled_readout
        Whether the readout is fully sampled, as on Cartesian grids.
    host
        Whether states may wait in the host's memory.
    margin
        Part of the peak that is added for what cannot be measured beforehand.
    fourier_cost, convolution
        What is known of the device; see `melcore.memory.calibrate`.

    Raises
    ------
    MemoryBudgetError
        If nothing fits; the message states the least that would do.
    """
    with fake_tensors():
        measured = costs(
            model,
            shape,
            coils,
            time=time,
            batch=batch,
            sets=sets,
            sampled_readout=sampled_readout,
            fourier_cost=fourier_cost,
            convolution=convolution,
        )
        return choose(measured, budget, host=host, margin=margin)


def plan_inference(
    model: Unrolled,
    shape: tuple[int, int, int],
    coils: int,
    budget: int,
    *,
    time: int = 1,
    sets: int = 1,
    sampled_readout: bool = True,
    margin: float = MARGIN,
) -> MemoryPlan:
    """The fastest plan for reconstructing one example, without gradients, within `budget` bytes.

    Parameters and errors are those of `plan`. The network is computed whole if that fits, otherwise it is streamed in
    chunks of planes as large as fit.
    """
    least = 0
    count = len(model.order)
    candidates = [MemoryPlan.uniform("plain", count)]
    regulariser, axes = model.iterations[0].regulariser, (["readout", "time"] if time > 1 else ["readout"])
    axes = [axis for axis in axes if why_not("stream", regulariser, axis) is None]  # type: ignore[arg-type]
    for chunk in CHUNKS:
        candidates += [MemoryPlan.uniform("stream", count, chunk=chunk, axis=axis) for axis in axes if chunk >= 4]
    for candidate in candidates:
        with fake_tensors(), torch.no_grad():
            twin, encoding = _fake_problem(model, shape, coils, time, 1, sets, sampled_readout)
            peak = 0
            for one in dict.fromkeys(alike(twin.iterations)):
                alone = Unrolled([one, one])
                with Meter() as meter:
                    meter.hold(*twin.parameters(), *encoding.operator.buffers(), encoding.adjoint_data)
                    only = MemoryPlan(candidate.iterations[:1] * 2)
                    alone.refine(encoding, torch.empty_like(encoding.adjoint_data), memory=only)
                    peak = max(peak, int(meter.peak * (1 + margin)))
        if peak <= budget:
            return replace(candidate, predicted_peak_bytes=peak)
        least = min(least or peak, peak)
    raise MemoryBudgetError(
        f"reconstructing {' x '.join(map(str, shape))} (z, y, x) with {coils} coils does not fit "
        f"{format_bytes(budget)}: the least that would do is {format_bytes(least)}. Allow more, compress the coils, or "
        "use another device."
    )


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones; within `fake_tensors` only."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, FakeTensorMode)
    made: dict[int, nn.Parameter] = {}  # shared parameters stay shared
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = mode.from_tensor(parameter.detach())
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
