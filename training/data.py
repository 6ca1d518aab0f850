"""Streams of training examples, without end: example n is a function of the configuration and n alone.

Every base (an anatomy, its coils, its maps) serves `reuse` examples, which are spread out so that a base is made once
in every `reuse` examples, and neighbours in the stream never share one (`base_of`). Processes draw ahead; how many
there are changes nothing but the time.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from melcore.errors import DataError, ToolError
from melcore.preprocess.preparation import Preparation
from training.anatomies import SPLITS, Split
from training.config import DataSettings
from training.example import Example, window_readout
from training.simulation import Base, Measured, draw_base
from training.sources import Mixture, open_mixture
from training.workers import Workers

__all__ = ["Drawing", "Example", "Stream", "base_of", "window_readout"]

Drawn = TypeVar("Drawn")

# Examples between two of the same base, for each of its uses.
_STRIDE = 2
_ATTEMPTS = 20


def base_of(n: int, reuse: int) -> int:
    """Number of the base of example n.

    In every `reuse` examples one base is new: the others' bases were so `_STRIDE`, twice `_STRIDE`, ... groups before.
    """
    group, place = divmod(n, reuse)
    return group + _STRIDE * (reuse - 1 - place)


@dataclass(frozen=True)
class Drawing:
    """Draws the examples of a split by their numbers; travels to worker processes."""

    settings: DataSettings
    preparation: Preparation
    mixture: Mixture
    split: Split
    window: int | None = None
    _bases: "OrderedDict[int, Base | Measured]" = field(default_factory=OrderedDict, compare=False, repr=False)

    def __call__(self, n: int) -> Example:
        """Example n.

        Raises
        ------
        DataError
            If it cannot be made, over and over.
        """
        base = self._base(base_of(n, self.settings.reuse))
        return self._attempt(1, n, lambda rng: base.draw(self.settings, self.preparation, rng, self.window))

    def _base(self, number: int) -> Base | Measured:
        """A base; those of late are kept."""
        if number not in self._bases:
            self._bases[number] = self._attempt(
                0, number, lambda rng: draw_base(self.settings, self.preparation, self.mixture, rng)
            )
            while len(self._bases) > _STRIDE * (self.settings.reuse - 1) + 1:
                self._bases.popitem(last=False)
        self._bases.move_to_end(number)
        return self._bases[number]

    def _attempt(self, what: int, number: int, make: Callable[[np.random.Generator], Drawn]) -> Drawn:
        """Some draws cannot be prepared (a centre too small, an empty slice): they are drawn again."""
        reason: Exception | None = None
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.settings.seed, SPLITS.index(self.split), what, number, attempt])
            try:
                return make(rng)
            except (DataError, ToolError) as error:
                reason = error
        name = ("anatomy", "example")[what]
        raise DataError(f"{self.split} {name} {number} failed in {_ATTEMPTS} attempts; the last error: {reason}")


class Stream:
    """Examples of a split by their numbers, drawn ahead by processes of its own.

    ``stream[n]`` is best asked for in ascending order, for what comes next is drawn ahead from there; any order gives
    the same examples. The validation split is a short sequence, whose examples are kept; the training split has no end.

    Parameters
    ----------
    settings
        Where examples come from.
    preparation
        See `melcore.preprocess.preparation.Preparation`.
    split
        ``"train"``, ``"validation"`` or ``"test"``; subjects and seeds of splits never meet.
    first, step
        Which examples will be asked for: of several processes that train together, each takes every `step`-th.
    window
        Samples along the readout that will be looked at, at most: no more are drawn, from a random place. None: all.

    Raises
    ------
    DataError, ConfigError
        See `training.sources.open_mixture`.
    """

    def __init__(
        self,
        settings: DataSettings,
        preparation: Preparation,
        split: Split = "train",
        *,
        first: int = 0,
        step: int = 1,
        window: int | None = None,
    ) -> None:
        self.settings, self.split, self.step = settings, split, step
        self.mixture = open_mixture(settings, split)
        self._kept: dict[int, Example] = {}
        task = Drawing(settings, preparation, self.mixture, split, window)
        self._workers = Workers(
            task,
            settings.workers,
            ahead=settings.ahead,
            # A base's examples belong to one process, which makes it once.
            owner=lambda n: base_of(n, settings.reuse),
            first=first,
            step=step,
            stop=settings.validation if split != "train" else None,
        )

    def __len__(self) -> int:
        if self.split == "train":
            raise TypeError("a stream of training examples has no end, and so no length")
        return self.settings.validation

    def __getitem__(self, n: int) -> Example:
        if n < 0 or (self.split != "train" and n >= self.settings.validation):
            raise IndexError(n)
        if n in self._kept:
            return self._kept[n]
        example = self._workers.get(n)
        if self.split != "train":
            self._kept[n] = example
            if len(self._kept) == self.settings.validation:
                self._workers.close()
        return example

    def __iter__(self) -> Iterator[Example]:
        n = 0
        while self.split == "train" or n < self.settings.validation:
            yield self[n]
            n += 1

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; an example that is asked for afterwards starts them again."""
        self._workers.close()
