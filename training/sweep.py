"""The best weight of a method on a logarithmic scale: from coarse to fine, until the best is inside what was tried."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# Beyond these no weight changes an image that is scaled to 1.
LEAST, MOST = 1e-8, 1e3
# A curve as flat as this (in dB) has no better end.
_FLAT = 0.002


@dataclass(frozen=True)
class Sweep:
    """What was tried, and what was best.

    Attributes
    ----------
    weight, error
        The best.
    inside
        Whether larger and smaller weights were tried and are not better.
    trials
        Errors by weight.
    """

    weight: float
    error: float
    inside: bool
    trials: dict[float, float]


def sweep(measure: Callable[[float], float], start: float, *, factor: float = 3.0, refinements: int = 2) -> Sweep:
    """Minimise `measure` over positive weights.

    The grid ``start * factor ** n`` is extended until its best is inside, then the minimum of a parabola through the
    best and its neighbours (over the logarithm) is tried, `refinements` times.

    Parameters
    ----------
    measure
        Error at a weight, smaller is better; in dB. A weight is never asked for twice.
    start
        Where to begin.
    factor
        Between neighbours of the grid.
    refinements
        How often the minimum of a parabola is tried.
    """
    trials: dict[float, float] = {}

    def at(weight: float) -> float:
        weight = float(f"{min(max(weight, LEAST), MOST):.4g}")
        if weight not in trials:
            trials[weight] = measure(weight)
        return weight

    low = centre = high = at(start)
    low, high = at(centre / factor), at(centre * factor)
    while True:
        best = min(trials, key=lambda weight: trials[weight])
        if best == low and low > LEAST and trials[low] < trials[_next(trials, low, 1)] - _FLAT:
            low = at(low / factor)
        elif best == high and high < MOST and trials[high] < trials[_next(trials, high, -1)] - _FLAT:
            high = at(high * factor)
        else:
            break
    for _ in range(refinements):
        best = min(trials, key=lambda weight: trials[weight])
        if best in (min(trials), max(trials)):
            break
        weight = _vertex([(math.log(w), trials[w]) for w in (_next(trials, best, -1), best, _next(trials, best, 1))])
        if abs(weight - math.log(best)) < 0.1:
            break
        at(math.exp(weight))
    best = min(trials, key=lambda weight: trials[weight])
    edge = best in (min(trials), max(trials))
    # A flat end, or the end of all weights, is as good as an inside.
    flat = edge and abs(trials[best] - trials[_next(trials, best, 1 if best == min(trials) else -1)]) <= _FLAT
    return Sweep(best, trials[best], not edge or flat or best in (LEAST, MOST), dict(sorted(trials.items())))


def _next(trials: dict[float, float], weight: float, step: int) -> float:
    """The neighbour that was tried."""
    tried = sorted(trials)
    return tried[tried.index(weight) + step]


def _vertex(points: list[tuple[float, float]]) -> float:
    """Where the parabola through three points is lowest, kept within them."""
    (x0, y0), (x1, y1), (x2, y2) = points
    below, above = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = above - below
    if curvature <= 1e-12:
        return x1
    found = 0.5 * (x0 + x1) - below * (x2 - x0) / (2 * curvature)
    return min(max(found, x0 + 0.2 * (x1 - x0)), x2 - 0.2 * (x2 - x1))
