"""Small unrolled models, and the comparison of a memory plan with plain automatic differentiation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from laws import random
from torch import Tensor

from melcore.memory import MemoryPlan
from melcore.networks import Regulariser, ResidualCNN, SpaceTimeCNN, shrinkages
from melcore.physics import Sense
from melcore.unrolled import ADMM, Encoding, Iteration, MoDL, PrimalDual, ProximalGradient, Unrolled, VarNet

SCHEMES: dict[str, Callable[[Regulariser], Iteration]] = {
    "modl": lambda network: MoDL(network, mu=20.0, cg_iterations=3),
    "proximal_gradient": lambda network: ProximalGradient(network, step=0.8),
    "varnet": lambda network: VarNet(network, step=0.8),
    "admm": lambda network: ADMM(network, rho=20.0, cg_iterations=2),
}


@dataclass(frozen=True)
class Network:
    """A regulariser to be made, and the (time, z, y, x) of images that it suits."""

    name: str
    make: Callable[[], Regulariser]
    matrix: tuple[int, int, int, int]

    def __str__(self) -> str:
        return self.name


NETWORKS = [
    Network("2d", lambda: ResidualCNN(2, channels=4, layers=3), (1, 1, 6, 7)),
    Network("3d", lambda: ResidualCNN(3, channels=3, layers=4), (1, 5, 4, 9)),
    Network("2d+t", lambda: SpaceTimeCNN(2, channels=3, stages=2, time_padding="circular"), (4, 1, 5, 8)),
    Network("3d+t", lambda: SpaceTimeCNN(3, channels=3, stages=2), (3, 2, 4, 5)),
]


@dataclass(frozen=True)
class PrimalDualCase:
    """Options of `melcore.networks.shrinkages`, and the (time, z, y, x) of images that they suit."""

    name: str
    options: dict[str, Any]
    matrix: tuple[int, int, int, int]

    def __str__(self) -> str:
        return self.name

    @property
    def sets(self) -> int:
        """Map sets of the images."""
        return int(self.options.get("sets", 1))

    def make(self, count: int = 4, *, dtype: torch.dtype = torch.float64) -> Unrolled:
        """A model whose every gradient matters: places are looked at in the second and in the third step of four."""
        torch.manual_seed(5)
        small = {"filters": 4, "maps": 3, "channels": 4}
        made = Unrolled([PrimalDual(step, step=0.8) for step in shrinkages(count, **(small | self.options))]).to(dtype)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.1)
        return made


PRIMAL_DUAL = [
    PrimalDualCase("2d", {"dimensions": 2}, (1, 1, 6, 7)),
    PrimalDualCase("3d", {"dimensions": 3, "scales": 2}, (1, 5, 4, 9)),
    PrimalDualCase("2d+t", {"dimensions": 2, "series": True}, (4, 1, 5, 8)),
    PrimalDualCase("2d+t-ends", {"dimensions": 2, "series": True, "circular": False, "scales": 2}, (5, 2, 3, 6)),
    PrimalDualCase("two-sets", {"dimensions": 2, "sets": 2, "kernel": 5}, (1, 3, 5, 6)),
]


def encoding(
    matrix: tuple[int, int, int, int], *, batch: int = 1, sets: int = 1, dtype: torch.dtype = torch.complex128
) -> Encoding:
    """A SENSE encoding with random maps and mask, and random data; elements of the batch differ in their noise."""
    time, *space = matrix
    mask = random((batch, 1, time, *space[:2], 1), seed=1).real > -0.3
    operator = Sense(random((batch, sets, 2, 1, *space), dtype, seed=2) / 2, mask, time=time)
    sigma = torch.linspace(0.1, 0.2, batch, dtype=operator.mask.dtype)
    return Encoding(operator, operator.adjoint(random(operator.codomain, dtype, seed=3)), sigma)


def model(
    network: Callable[[], Regulariser],
    *,
    scheme: str = "modl",
    count: int = 3,
    shared: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Unrolled:
    """An unrolled model with weights large enough that every gradient matters."""
    torch.manual_seed(5)
    made = Unrolled.repeat(lambda: SCHEMES[scheme](network()), count, shared=shared).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("layers.0.bias") or "bias" in name:
                parameter.normal_(std=0.2)
            elif name.endswith("weight"):
                parameter.mul_(1.5)
    return made


def gradients(
    made: Unrolled, problem: Encoding, plan: MemoryPlan | None, *, initial: Tensor | None = None
) -> dict[str, Tensor]:
    """Result of a step: the image, and the gradient of every parameter and of a differentiable initial image."""
    made.zero_grad()
    start = problem.adjoint_data if initial is None else initial
    start = start.detach().requires_grad_()
    image = made.refine(problem, start, memory=plan)
    weights = random(tuple(image.shape), image.dtype, seed=7)
    (image * weights).abs().square().sum().backward()
    found = {"image": image.detach(), "initial": start.grad}
    found |= {name: parameter.grad for name, parameter in made.named_parameters()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of two results of `gradients`."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].to(value.dtype) - value).norm() / value.norm().clamp(min=1e-300))
        for name, value in expected.items()
    )


def plans(executors: Sequence[tuple[str, dict[str, Any]]], count: int) -> list[MemoryPlan]:
    """A uniform plan for each executor and options."""
    return [MemoryPlan.uniform(name, count, **options) for name, options in executors]  # type: ignore[arg-type]
