"""Memory plans for a model and a problem, on any machine: nothing is allocated, no device is needed."""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from melcore.memory import MemoryPlan
from melcore.memory.meter import fake_tensors
from melcore.memory.planner import FOURIER_COST, MARGIN, Costs, choose
from melcore.physics import Sense
from melcore.physics.fourier import centring_phase
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
) -> Costs:
    """What the parts of a model cost for a problem; see `plan`. Use it within `melcore.memory.meter.fake_tensors`."""
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
    encoding = Encoding(operator, data)
    parameters = sum(p.numel() * p.element_size() for p in twin.parameters())
    buffers = sum(b.numel() * b.element_size() for b in operator.buffers())
    # Beside the operator: its adjoint data, the target, and the result, which whoever trains holds for the metrics.
    images = 3 * data.numel() * data.element_size()
    fixed = parameters * (2 + _OPTIMISER_STATES) + buffers + images
    iterations = twin.iterations
    return Costs(iterations, encoding, iterations[0].start(data), fixed=fixed, fourier_cost=fourier_cost)


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
    fourier_cost
        See `melcore.memory.calibrate`.

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
        )
        return choose(measured, budget, host=host, margin=margin)


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones; within `fake_tensors` only."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, FakeTensorMode)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
