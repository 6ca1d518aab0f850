"""Unrolled reconstruction schemes: iterations of data consistency and a learned regulariser, strung together."""

from melcore.unrolled.build import build
from melcore.unrolled.iteration import Encoding, Iteration, State
from melcore.unrolled.model import Unrolled
from melcore.unrolled.modl import MoDL

__all__ = ["Encoding", "Iteration", "MoDL", "State", "Unrolled", "build"]
