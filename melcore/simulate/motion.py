"""Periodic motion of a beating heart: a curve over the cycle, and the deformation that it drives."""

import math

import torch
from torch import Tensor


def contraction(frames: int, *, start: float = 0.0, systole: float = 0.35) -> Tensor:
    """How far the heart is contracted in each frame of one cycle: 0 at the end of diastole, 1 at the end of systole.

    Contraction, fast relaxation, and a rest in which the atria fill the last tenth; smooth and periodic.

    Parameters
    ----------
    frames
        Spread evenly over the cycle.
    start
        Of the first frame, as a fraction of the cycle (0 is the end of diastole).
    systole
        Duration of the contraction, as a fraction of the cycle.
    """
    phase = (torch.arange(frames) / frames + start) % 1
    relaxed = systole + 0.28
    rise = torch.sin(0.5 * math.pi * phase / systole).square()
    fall = 0.1 + 0.9 * torch.cos(0.5 * math.pi * (phase - systole) / 0.28).square()
    rest = 0.1 * torch.cos(0.5 * math.pi * (phase - relaxed) / (1 - relaxed)).square()
    return torch.where(phase < systole, rise, torch.where(phase < relaxed, fall, rest))


def contract(position: Tensor, amount: Tensor, *, cavity: float, wall: float, strength: float, twist: float) -> Tensor:
    """Where the tissue that is at `position` now was at the end of diastole.

    Around the long axis (z, through 0) the cavity shrinks and the wall thickens so that its area stays, as
    tissue is incompressible; farther out the displacement fades, and what is around stays in place.

    Parameters
    ----------
    position
        ``(..., 3)``, x, y, z, in the frame of the heart.
    amount
        Contraction, broadcasting against the leading axes of `position`.
    cavity, wall
        Radius of the cavity and thickness of the wall at the end of diastole.
    strength
        Fraction of the radius by which the cavity shrinks at most.
    twist
        Rotation of the cavity at most, in rad.
    """
    x, y, z = position.unbind(-1)
    now = (x.square() + y.square()).sqrt().clamp(min=1e-6)
    small = cavity * (1 - strength * amount)
    scaled = now * cavity / small
    conserved = (now.square() + cavity**2 - small.square()).clamp(min=0).sqrt()
    outer = cavity + wall
    fade = torch.exp(-((now - outer).clamp(min=0) / (0.6 * wall + 0.25 * cavity)).square())
    before = now + (torch.where(now < small, scaled, conserved) - now) * fade
    angle = torch.atan2(y, x) + twist * amount * fade
    return torch.stack((before * torch.cos(angle), before * torch.sin(angle), z * (1 + 0.12 * amount * fade)), -1)
