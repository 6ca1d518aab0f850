"""The mixture that examples are drawn from: prepared folders and simulation, by their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from melcore.errors import ConfigError
from training.anatomies import Entry, Folder, Split, check_splits, open_folder
from training.anatomy import thick_axis
from training.config import DataSettings

Dimensions = Literal["2d", "3d", "2d+t"]


@dataclass(frozen=True)
class Source:
    """One source: the subjects of a folder that are in the split and of use, or simulation (no folder)."""

    weight: float
    folder: Folder | None
    entries: tuple[Entry, ...]
    zoom: tuple[float, float]

    def choose(self, rng: np.random.Generator) -> Entry | None:
        """One of the subjects; simulation has none."""
        return self.entries[int(rng.integers(len(self.entries)))] if self.entries else None


@dataclass(frozen=True)
class Mixture:
    """The sources of one split."""

    sources: tuple[Source, ...]

    def choose(self, rng: np.random.Generator) -> Source:
        """One of the sources, by its weight."""
        weights = np.array([source.weight for source in self.sources])
        return self.sources[rng.choice(len(self.sources), p=weights / weights.sum())]


def usable(entry: Entry, dimensions: Dimensions) -> bool:
    """Whether images of this kind can be drawn from a subject."""
    measured = entry.kind in ("k-space", "undersampled")
    if dimensions == "3d":
        if measured:
            return min(entry.shape[-3:]) > 1
        return entry.kind in ("volume", "labels") and thick_axis(entry) is None
    if measured:
        return dimensions == "2d" or (entry.shape[2] > 1 and entry.shape[3] == 1)
    return True


def open_mixture(settings: DataSettings, split: Split) -> Mixture:
    """Open the folders of a configuration.

    A source without a subject in the split takes no part in it.

    Raises
    ------
    DataError
        If a folder is missing, or a subject is in two splits.
    ConfigError
        If a folder holds nothing for these dimensions, or no source has a subject in the split.
    """
    opened = [None if one.folder is None else open_folder(one.folder) for one in settings.sources]
    check_splits([folder for folder in opened if folder is not None])
    sources = []
    for one, folder in zip(settings.sources, opened, strict=True):
        zoom = one.zoom or settings.zoom
        if folder is None:
            sources.append(Source(one.weight, None, (), zoom))
            continue
        fitting = [entry for entry in folder.entries if usable(entry, settings.dimensions)]
        if not fitting:
            kinds = ", ".join(sorted({entry.kind for entry in folder.entries})) or "nothing"
            raise ConfigError(
                f"{folder.path} holds {kinds}: of no use for {settings.dimensions} data; take it out of data.sources."
            )
        if chosen := tuple(entry for entry in fitting if entry.split == split):
            sources.append(Source(one.weight, folder, chosen, zoom))
    if not sources:
        raise ConfigError(
            f"none of data.sources has a subject in the {split} split: {_counts(opened)}. Prepare more subjects, "
            "assign splits with mel prepare --split, or add {simulate: true}."
        )
    return Mixture(tuple(sources))


def _counts(folders: Sequence[Folder | None]) -> str:
    known = [folder for folder in folders if folder is not None]
    return "; ".join(
        f"{Path(folder.path).name}: "
        + ", ".join(
            f"{sum(e.split == split for e in folder.entries)} {split}" for split in ("train", "validation", "test")
        )
        for folder in known
    )
