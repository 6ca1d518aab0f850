"""What a run of states that are computed back teaches: for each iteration, how far that works.

It is remembered with the iteration, for as long as that lives, so that a training fails once and not in every step.
"""

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from melcore.memory.protocols import IterationLike


class ReversalWarning(UserWarning):
    """States cannot be computed back, or not well enough; they are kept instead."""


@dataclass
class Record:
    """What is known about the reversal of one iteration; see `Report`."""

    reach: float = math.inf
    recovered: int = 0
    worst: float = 0.0
    reason: str | None = None
    warned: bool = False


_records: weakref.WeakKeyDictionary[Any, Record] = weakref.WeakKeyDictionary()


def record_of(iteration: Any) -> Record:
    """The record of an iteration; empty at first."""
    return _records.setdefault(iteration, Record())


@dataclass(frozen=True)
class Report:
    """How the reversal of an iteration went so far.

    Attributes
    ----------
    iterations
        Its numbers in the model, from 1; several where weights are shared.
    recovered
        How many times its input was computed back within the bound.
    worst
        The largest relative error of those inputs, as bounded by their certificates.
    reach
        How many iterations in a row are undone at most, up to this one; None is no limit so far, 0 is none: its state
        is kept.
    reason
        What set the limit.
    """

    iterations: tuple[int, ...]
    recovered: int
    worst: float
    reach: int | None
    reason: str | None

    def __str__(self) -> str:
        numbers = f"{self.iterations[0]}" + (f"-{self.iterations[-1]}" if len(self.iterations) > 1 else "")
        text = f"iteration {numbers}: {self.recovered} states recovered, errors up to {self.worst:.1e}"
        if self.reach is None:
            return text
        limit = f"at most {self.reach} iterations in a row" if self.reach else "states kept"
        return f"{text}; {limit}: {self.reason}"


def reports(iterations: Iterable[IterationLike[Any]]) -> list[Report]:
    """What the reversal of a model's iterations has come to, one report for each distinct one that took part.

    Examples
    --------
    >>> for report in reports(model.iterations):
    ...     print(report)
    iteration 1-10: 63 states recovered, errors up to 2.1e-05; at most 2 iterations in a row: ...
    """
    numbers: dict[IterationLike[Any], list[int]] = {}
    for number, iteration in enumerate(iterations, start=1):
        numbers.setdefault(iteration, []).append(number)
    found = []
    for iteration, where in numbers.items():
        if (record := _records.get(iteration)) is not None:
            reach = None if record.reach == math.inf else int(record.reach)
            found.append(Report(tuple(where), record.recovered, record.worst, reach, record.reason))
    return found
