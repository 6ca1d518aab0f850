"""Judges reconstructions of examples whose truth is known, and watches the network's channels."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from melcore.learning import decibels, nrmse, psnr, ssim
from melcore.unrolled import Unrolled
from training.example import Example
from training.problem import Problem
from training.self_supervision import held_out_terms

Metrics = dict[str, dict[str, float]]  #: of each method: nrmse_db, psnr_db, ssim
Method = Callable[[Problem], Tensor]


def zero_filled(problem: Problem) -> Tensor:
    """Adjoint of the data: every sample that was not taken is zero."""
    return problem.encoding.adjoint_data


def cg_sense(problem: Problem, iterations: int = 60, weight: float | None = None) -> Tensor:
    """The product's CG-SENSE, frame by frame; its weight follows the noise unless one is given."""
    return problem.cg_sense(iterations, weight)


def learned(model: Unrolled) -> Method:
    """The model's reconstruction."""
    return lambda problem: model.refine(problem.encoding, problem.initial)


def judge(image: Tensor, problem: Problem | Example) -> dict[str, float]:
    """NRMSE (complex), PSNR and SSIM (magnitude) in the support of the maps, or the error of the held-out samples."""
    if isinstance(problem, Problem) and problem.held_out is not None:
        return {"held_out_db": float(decibels(held_out_terms(image, problem.held_out)["nrmse"]))}
    volume, support, truth = min(image.shape[-3:]) > 1, problem.support, problem.truth
    assert truth is not None
    return {
        "nrmse_db": float(decibels(nrmse(image, truth, support)).mean()),
        "psnr_db": float(psnr(image, truth, support).mean()),
        "ssim": float(ssim(image, truth, support, dimensions=3 if volume else 2).mean()),
    }


@torch.no_grad()
def evaluate(model: Unrolled, problems: Iterable[Problem], known: Metrics | None = None) -> Metrics:
    """Mean metrics over problems of ``learned``, ``zero_filled``, ``cg_sense`` and the ``start`` image.

    Parameters
    ----------
    model, problems
        What is judged, on what.
    known
        Metrics of the conventional methods from before, which need not be computed again.
    """
    model.eval()
    methods: dict[str, Method] = {"learned": learned(model)}
    if not known:
        methods |= {"zero_filled": zero_filled, "cg_sense": cg_sense, "start": lambda problem: problem.initial}
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for problem in problems:
        for name, method in methods.items():
            collected[name].append(judge(method(problem), problem))
    means = {
        name: {key: sum(entry[key] for entry in entries) / len(entries) for key in entries[0]}
        for name, entries in collected.items()
    }
    return {**means, **(known or {})}


@torch.no_grad()
def live_channels(model: Unrolled, problem: Problem) -> float | None:
    """Fraction of the channels, over all layers that have an activation, whose output varies over an image.

    None where the regularisers are not made of such layers: then nothing is known.

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
    return float(torch.cat(alive).float().mean()) if alive else None
