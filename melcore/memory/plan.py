"""Memory plans: for every iteration, how its backward gets what the forward did not keep."""

from dataclasses import dataclass
from typing import Literal

from melcore.errors import ConfigError

Executor = Literal["plain", "checkpoint", "store"]
EXECUTORS: tuple[Executor, ...] = ("plain", "checkpoint", "store")


@dataclass(frozen=True)
class IterationPlan:
    """How one iteration is executed in training.

    Attributes
    ----------
    executor
        ``plain``: automatic differentiation keeps everything. ``checkpoint``: keeps the state, and computes the whole
        iteration again in the backward. ``store``: keeps the state and the regulariser's output, so that the network
        and the data consistency are differentiated one after the other, never both at once.
    """

    executor: Executor = "plain"

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ConfigError(f"there is no executor {self.executor!r}: choose one of {', '.join(EXECUTORS)}.")


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a whole model, one entry for each iteration, with what was predicted for it.

    Attributes
    ----------
    iterations
        The plan of each iteration, in the order of execution.
    predicted_peak_bytes
        Everything that training holds at its peak, or None where nobody measured it.
    relative_time
        Time of a step relative to plain backpropagation of the same problem.
    """

    iterations: tuple[IterationPlan, ...]
    predicted_peak_bytes: int | None = None
    relative_time: float | None = None

    @classmethod
    def uniform(cls, executor: Executor, count: int) -> "MemoryPlan":
        """The same executor for `count` iterations."""
        return cls((IterationPlan(executor),) * count)
