"""Several processes of ``torchrun`` that train together: each differentiates its share of a batch.

Gradients are added up once, after the last backward of a step, so that a step costs one exchange whatever the memory
plan. Every process holds the whole model and its own examples; the first one alone writes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from melcore.errors import ConfigError

# Processes wait for the first one while it prepares examples, validates or writes.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Team:
    """The processes of a training; one alone is a team too."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, positions: Sequence[int]) -> list[int]:
        """Which members of a batch are this process's.

        Raises
        ------
        ConfigError
            If there are more processes than examples in the batch.
        """
        if len(positions) < self.size:
            raise ConfigError(
                f"{self.size} processes cannot share a batch of {len(positions)}: set training.batch to {self.size} or "
                "a multiple of it."
            )
        return list(positions[self.rank :: self.size])

    def add_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by the sum over the processes."""
        if self.size == 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def add(self, *numbers: float, device: torch.device) -> list[float]:
        """Sums of numbers over the processes."""
        if self.size == 1:
            return list(numbers)
        total: Tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(number) for number in total]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> Team:
    """The team that ``torchrun`` started this process in; a process that it did not start is alone.

    Parameters
    ----------
    device
        As in the configuration. Processes on GPUs take one each, by their local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    return Team(dist.get_rank(), dist.get_world_size())


def leave(team: Team) -> None:
    """Close the connections."""
    if team.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {name!r} cannot be used here: {' '.join(str(error).split())}") from None
    return torch.device(name)
