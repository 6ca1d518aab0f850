"""A cheap self-check that an executor differentiates a regulariser as autograd does.

An executor that cuts the volume relies on what the regulariser says about itself. Where that is wrong, gradients would
be wrong without a sign of it; on a crop of a few dozen samples it shows at once.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.memory import executors
from melcore.memory.plan import IterationPlan, MemoryPlan
from melcore.memory.protocols import SampledLike

_BOUND = 1e-9


def verify(regulariser: nn.Module, plan: IterationPlan | MemoryPlan, *, sets: int = 1, time: int = 3) -> None:
    """Compare output and gradients with autograd's, in double precision on a small random image.

    Parameters
    ----------
    regulariser
        As in the model; it is copied, and evaluated without dropout.
    plan
        What is to be checked: one iteration's plan, or every different one of a model's.
    sets, time
        Map sets and frames of the image; the set count that the regulariser declares, if any, wins.

    Raises
    ------
    ConfigError
        If they differ: the regulariser's declared halo or structure is wrong.
    """
    entries = (plan,) if isinstance(plan, IterationPlan) else dict.fromkeys(plan.iterations)
    double = copy.deepcopy(regulariser).double().eval()
    halo: tuple[int, ...] = getattr(regulariser, "halo", None) or (0, 2, 2, 2)
    z, y, x = (2 * width + 5 if width else 2 for width in halo[1:])
    if any(entry.axis == "time" for entry in entries):
        time = max(time, 2 * halo[0] + 5)
    generator = torch.Generator().manual_seed(1)
    device = next((parameter.device for parameter in regulariser.parameters()), torch.device("cpu"))
    if isinstance(double, SampledLike):
        image = double.sample((time, z, y, x), generator)
    else:
        shape = (1, getattr(regulariser, "sets", sets), time, z, y, x)
        image = torch.randn(shape, dtype=torch.complex128, generator=generator)
    gradient = torch.randn(image.shape, dtype=image.dtype, generator=generator).to(device)
    image = image.to(device)
    expected = _by_autograd(double, image, gradient)
    for entry in entries:
        if entry.executor in ("plain", "checkpoint", "store"):
            continue
        how = f"{entry.executor} along time" if entry.axis == "time" else entry.executor
        along = halo[0 if entry.axis == "time" else 3]
        small = replace(entry, chunk=min(entry.chunk, max(along, 1) + 2), precision="full")
        executor = executors.make(small, double)
        parameters = [parameter for parameter in double.parameters() if parameter.requires_grad]
        with torch.no_grad():
            output, kept = executor.forward(double, image)
        first, others = executor.vjp(double, image, gradient, kept, parameters)
        for found, value in zip((output, first, *others), expected, strict=True):
            if found is None or float((found - value).norm()) > _BOUND * float(value.norm()):
                raise ConfigError(
                    f"{type(regulariser).__name__} executed as {how} differs from itself executed as a "
                    f"whole: its declared halo {tuple(halo)} along (time, z, y, x), or its structure, is wrong. "
                    "Correct the declaration, or choose the executor store."
                )


def _by_autograd(regulariser: nn.Module, image: Tensor, gradient: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in regulariser.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        leaf = image.clone().requires_grad_()
        output = regulariser(leaf)
    found = torch.autograd.grad(output, [leaf, *parameters], gradient, materialize_grads=True)
    return [output.detach(), *found]
