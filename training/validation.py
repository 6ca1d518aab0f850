"""Judges reconstructions of examples whose truth is known, and watches the network's channels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from melcore.learning import decibels, nrmse, psnr, ssim
from melcore.physics import conjugate_gradient
from melcore.unrolled import Unrolled
from training.data import Example
from training.problem import Problem, place

Metrics = dict[str, dict[str, float]]  #: of each method: nrmse_db, psnr_db, ssim
Method = Callable[[Problem], Tensor]


def zero_filled(problem: Problem) -> Tensor:
    """Adjoint of the data: every sample that was not taken is zero."""
    return problem.encoding.adjoint_data


def cg_sense(problem: Problem, iterations: int = 30, weight: float = 0.02) -> Tensor:
    """CG-SENSE with a light quadratic penalty, frame by frame."""
    normal = problem.encoding.operator.normal
    solution = conjugate_gradient(
        lambda v: normal(v) + weight * v,
        problem.encoding.adjoint_data,
        relative_tolerance=1e-5,
        max_iterations=iterations,
    )
    return solution.value


def learned(model: Unrolled) -> Method:
    """The model's reconstruction."""
    return lambda problem: model.refine(problem.encoding, problem.initial)


def judge(image: Tensor, problem: Problem | Example) -> dict[str, float]:
    """NRMSE (complex), PSNR and SSIM (magnitude), in the support of the maps."""
    volume, support = min(image.shape[-3:]) > 1, problem.support
    return {
        "nrmse_db": float(decibels(nrmse(image, problem.truth, support)).mean()),
        "psnr_db": float(psnr(image, problem.truth, support).mean()),
        "ssim": float(ssim(image, problem.truth, support, dimensions=3 if volume else 2).mean()),
    }


@torch.no_grad()
def evaluate(
    model: Unrolled, examples: Sequence[Example], device: torch.device, known: Metrics | None = None
) -> Metrics:
    """Mean metrics over the examples of ``learned``, ``zero_filled``, ``cg_sense`` and the ``start`` image.

    Parameters
    ----------
    model, examples
        What is judged, on what.
    device
        Where to compute.
    known
        Metrics of the conventional methods from before, which need not be computed again.
    """
    model.eval()
    methods: dict[str, Method] = {"learned": learned(model)}
    if not known:
        methods |= {"zero_filled": zero_filled, "cg_sense": cg_sense, "start": lambda problem: problem.initial}
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for index in range(len(examples)):
        problem = place(examples[index], device)
        for name, method in methods.items():
            collected[name].append(judge(method(problem), problem))
    means = {
        name: {key: sum(entry[key] for entry in entries) / len(entries) for key in entries[0]}
        for name, entries in collected.items()
    }
    return {**means, **(known or {})}


@torch.no_grad()
def live_channels(model: Unrolled, problem: Problem) -> float:
    """Fraction of the channels, over all layers that have an activation, whose output varies over an image.

    Channels die when a step of the optimiser throws them where their gradient vanishes; a learning rate or an
    initialisation that is too bold shows here first.
    """
    alive: list[Tensor] = []

    def look(_module: nn.Module, _inputs: object, features: Tensor) -> None:
        spread = features.transpose(0, 2).flatten(1).std(1)  # (batch, time, channel, z, y, x)
        alive.append(spread > 1e-4 * spread.max())

    hooks = []
    for iteration in model.distinct:
        layers = list(getattr(iteration.regulariser, "layers", []))
        hooks += [layer.register_forward_hook(look) for layer in layers[:-1]]
    try:
        learned(model)(problem)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.cat(alive).float().mean()) if alive else 1.0
