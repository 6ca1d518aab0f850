"""The memory engine: how an unrolled model is executed, so that training fits the memory there is (torch only)."""

from melcore.memory.calibrate import calibrate
from melcore.memory.engine import run
from melcore.memory.plan import EXECUTORS, IterationPlan, MemoryPlan
from melcore.memory.retry import demoted, retrying
from melcore.memory.verify import verify

__all__ = ["EXECUTORS", "IterationPlan", "MemoryPlan", "calibrate", "demoted", "retrying", "run", "verify"]
