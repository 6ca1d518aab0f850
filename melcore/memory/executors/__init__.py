"""Ways to compute a regulariser and its gradients; one module for each."""

from melcore.errors import ConfigError
from melcore.memory.executors.stream import Stream
from melcore.memory.executors.whole import Whole
from melcore.memory.plan import IterationPlan
from melcore.memory.protocols import ExecutorLike

__all__ = ["make"]


def make(plan: IterationPlan) -> ExecutorLike:
    """The executor that an iteration's plan names."""
    if plan.executor == "store":
        return Whole()
    if plan.executor == "stream":
        return Stream(plan.chunk)
    raise ConfigError(f"the executor {plan.executor!r} does not treat the regulariser on its own.")
