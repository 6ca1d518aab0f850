"""The memory engine: how an unrolled model is executed, so that training fits the memory there is (torch only)."""

from melcore.memory.engine import run
from melcore.memory.plan import EXECUTORS, IterationPlan, MemoryPlan

__all__ = ["EXECUTORS", "IterationPlan", "MemoryPlan", "run"]
