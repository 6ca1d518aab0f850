"""Checkpoints of a training, without pickle: one safetensors file with everything needed to continue bit by bit."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from melcore.errors import DataError

FORMAT = "mel-checkpoint"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside tensors: JSON types only."""

    step: int  #: optimiser steps done
    seconds: float  #: spent training, over all sessions
    config: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...] = ()  #: validation metrics
    memory: Mapping[str, Any] | None = None  #: the memory plan; another one would round differently


def save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint; the previous one stays until the new one is complete on disk."""
    from safetensors.torch import save as serialise

    tensors = {f"model/{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state = optimiser.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            tensors[f"optimiser/{index}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    metadata = {
        "format": FORMAT,
        "groups": json.dumps(state["param_groups"]),
        "progress": json.dumps(
            {
                "step": progress.step,
                "seconds": progress.seconds,
                "config": dict(progress.config),
                "history": [dict(entry) for entry in progress.history],
                "memory": progress.memory,
            }
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(serialise(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"the checkpoint {path} cannot be written: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint into a model and its optimiser, and the state of the random generators.

    Raises
    ------
    DataError
        As `read`, or if the model is another one.
    """
    tensors, groups, progress = read(path)
    weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    try:
        model.load_state_dict(weights, strict=True)
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the checkpoint {path} is of another model: {reason}") from error
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return progress
