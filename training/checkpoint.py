"""Checkpoints of a training, without pickle: one safetensors file with everything needed to continue bit by bit."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from melcore.errors import DataError
from melcore.io.atomic import replacing
from training.weights import Average

FORMAT = "mel-checkpoint"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside tensors: JSON types only."""

    step: int  #: optimiser steps done
    seconds: float  #: spent training, over all sessions
    config: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...] = ()  #: validation metrics
    memory: Mapping[str, Any] | None = None  #: the memory plan; another one would round differently
    origin: Mapping[str, Any] | None = None  #: the bundle that the training began from
    time_up: bool = False  #: whether `training.max_hours` of the configuration were over


def save(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, average: Average | None = None
) -> None:
    """Write a checkpoint; the previous one stays until the new one is complete on disk."""
    from safetensors.torch import save as serialise

    tensors = {f"model/{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state = optimiser.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            tensors[f"optimiser/{index}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    if average is not None:
        tensors |= {f"average/{name}": value.cpu().contiguous() for name, value in average.values.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    metadata = {
        "format": FORMAT,
        "groups": json.dumps(state["param_groups"]),
        "progress": json.dumps(asdict(progress)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with replacing(path) as temporary:
            temporary.write_bytes(serialise(tensors, metadata))
    except OSError as error:  # a MelError of `replacing` passes
        raise DataError(f"the checkpoint {path} cannot be written: {error.strerror}.") from error


def sweep(path: Path) -> None:
    """Remove what writers of this file that were killed have left behind."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], Progress]:
    """Tensors, parameter groups and progress of a checkpoint.

    Raises
    ------
    DataError
        If it is missing, damaged or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"there is no checkpoint {path} to resume from: start without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"the checkpoint {path} is damaged ({error}): remove it and start again.") from error
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is not a checkpoint of a training.")
    progress = json.loads(metadata["progress"])
    history = tuple(progress.pop("history"))
    return tensors, json.loads(metadata["groups"]), Progress(**progress, history=history)


def restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: Average | None = None) -> Progress:
    """Load a checkpoint into a model, its optimiser and its running average, and the state of the random generators.

    Raises
    ------
    DataError
        As `read`, or if the model is another one.
    """
    tensors, groups, progress = read(path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    try:
        model.load_state_dict(_part(tensors, "model/"), strict=True)
        optimiser.load_state_dict({"state": state, "param_groups": groups})
        if average is not None:
            average.load(_part(tensors, "average/"))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the checkpoint {path} is of another model: {reason}") from error
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return progress


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# What may differ between the sessions of one training.
_FREE = {
    "output.bundle",
    "output.notes",
    "training.steps",
    "training.max_hours",
    "training.device",
    "training.checkpoint_interval",
    "data.workers",
    "data.ahead",
}


def differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ and must not, between the sessions of one training."""
    if isinstance(new, dict) and isinstance(old, dict):
        names = sorted({*new, *old})
        return [d for name in names for d in differences(new.get(name), old.get(name), f"{prefix}{name}.")]
    name = prefix.rstrip(".")
    return [] if new == old or name in _FREE or name.startswith("memory") else [name]


def check_fresh(path: Path) -> None:
    """Raise `DataError` if a training without ``--resume`` would overwrite a checkpoint."""
    if path.is_file():
        raise DataError(f"{path} exists: continue that training with --resume, or set another output.directory.")
