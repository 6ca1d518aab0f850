"""Unrolled reconstruction schemes: iterations of data consistency and a learned regulariser, strung together."""

from melcore.unrolled.admm import ADMM
from melcore.unrolled.build import build
from melcore.unrolled.iteration import Encoding, Iteration, State
from melcore.unrolled.model import Unrolled
from melcore.unrolled.modl import MoDL
from melcore.unrolled.planning import plan
from melcore.unrolled.primal_dual import PrimalDual
from melcore.unrolled.proximal_gradient import ProximalGradient
from melcore.unrolled.varnet import VarNet

__all__ = [
    "ADMM",
    "Encoding",
    "Iteration",
    "MoDL",
    "PrimalDual",
    "ProximalGradient",
    "State",
    "Unrolled",
    "VarNet",
    "build",
    "plan",
]
