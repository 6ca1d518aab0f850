"""Small trainings: a configuration, and examples that are made without BART."""

import copy
import math
from pathlib import Path
from typing import Any

import torch

from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.physics import Sense
from melcore.preprocess.preparation import prepare
from training.config import Config, parse
from training.example import Example
from training.trainer import Trainer

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "dimensions": "2d",
        "validation": 2,
        "y": [36, 44],
        "x": [32, 40],
        "coils": [3, 5],
        "snr": [30, 60],
        "masks": [{"kind": "poisson", "acceleration": [2, 3], "calibration": [12, 14]}],
        "workers": 0,
    },
    "model": {
        "iterations": 2,
        "cg_iterations": 3,
        "regulariser": {"name": "resnet", "dimensions": 2, "channels": 4, "layers": 3},
    },
    "optimiser": {"warm_up": 1, "frozen_steps": 2, "learning_rate": 3e-3},
    "training": {"steps": 6, "validation_interval": 4, "checkpoint_interval": 2, "device": "cpu"},
    "output": {"directory": "unset"},
}


def content(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tiny configuration with its output in `folder`, and some settings replaced."""
    found = copy.deepcopy(TINY)
    found["output"] = {"directory": str(folder / "run")}
    for section, settings in sections.items():
        found.setdefault(section, {}).update(settings)
    return found


def tiny(folder: Path, **sections: dict[str, Any]) -> Config:
    """See `content`."""
    return parse(content(folder, **sections))


def phantom(
    seed: int, *, shape: tuple[int, int, int, int] = (1, 1, 18, 14), cut_readout: bool = True, sigma: float = 0.01
) -> Example:
    """A small example made without BART: smooth coils, blocks in an ellipse, a mask along y (and x), noise."""
    frames, z, y, x = shape
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in (z, y, x)), indexing="ij")
    angles = (0.3, 2.0, 4.0, 5.2)
    near = [(axes[2] - math.cos(a)) ** 2 + (axes[1] - math.sin(a)) ** 2 for a in angles]
    maps = torch.stack([torch.exp(1j * (a + axes[1]) - d) for a, d in zip(angles, near, strict=True)])
    inside = (axes[1] ** 2 + axes[2] ** 2) < 0.8
    maps = (maps / maps.abs().square().sum(0).sqrt() * inside).to(torch.complex64)[None, None, :, None]
    # Blocks: what smooths them between their edges is better than any linear method.
    blocks = torch.rand(1, 1, frames, z, (y + 3) // 4, (x + 3) // 4, generator=generator)
    blocks = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :y, :x]
    image = torch.polar(blocks, 0.5 * axes[1].expand(blocks.shape)) * inside
    mask = torch.rand(1, 1, frames, 1, y, 1 if cut_readout else x, generator=generator) < 0.5
    mask[..., y // 2 - 2 : y // 2 + 3, :] = True
    complete = Sense(maps, torch.ones(1, 1, 1, 1, 1, 1), time=frames)(image)
    noisy = complete + sigma * torch.randn(complete.shape, dtype=complete.dtype, generator=generator)
    noise = Noise(whitened=True, source="simulated", level=(sigma,))
    k_space = KSpace(noisy * mask, mask, ScanInfo((z, y, x), (z, y, x)), noise)
    prepared = prepare(k_space, coil_maps=CoilMaps(maps))
    return Example(prepared, image / prepared.scale.view(-1, 1, 1, 1, 1, 1))


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, their average, and everything the optimiser remembers."""
    state = {f"model/{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    for index, entries in trainer.optimiser.state_dict()["state"].items():
        state |= {f"{index}/{name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    if trainer.average is not None:
        state |= {f"average/{name}": value.clone() for name, value in trainer.average.values.items()}
    return state


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
