"""The few kinds of error that MEL raises on purpose: each message says what was expected, what came, and what to do."""

import difflib
from collections.abc import Iterable


class MelError(Exception):
    """Base of every error that MEL raises on purpose. Commands print its text as one line and exit with 1."""


class DataError(MelError, ValueError):
    """The data cannot be used as they are: damaged file, NaN, missing calibration, changing coil counts."""


class ShapeError(DataError):
    """Two arrays do not fit together, or an array lacks one of the axes of `melcore.layout`."""


class ConfigError(MelError, ValueError):
    """A setting, a configuration file or a pipeline is wrong; the message names the nearest right one."""


class MissingDependencyError(MelError, ImportError):
    """A program or an optional package is absent; the message says how to install it."""


class ToolError(MelError, RuntimeError):
    """An external program failed, or answered with something that cannot be right; its own words are in the message."""


class MemoryBudgetError(MelError, MemoryError):
    """No plan fits the memory budget; the message states the least that would do."""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not among the known ones; it points to the nearest.

    >>> unknown("option", "chanels", ["channels", "layers"])
    ConfigError("there is no option 'chanels': did you mean 'channels'? Known: channels, layers.")
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"there is no {what} {name!r}: {hint}Known: {', '.join(names)}.")
