"""Keeps BART's answers under a digest of what was asked: the same question is not computed twice."""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from melcore.errors import ConfigError
from melcore.io.atomic import replacing
from melcore.io.cfl import Complex
from melcore.io.toolbox import run, version


def cached_run(
    command: Sequence[str],
    array: Complex,
    outputs: int,
    *,
    cache: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    threads: int = 1,
    cancel: threading.Event | None = None,
) -> list[Complex]:
    """As `melcore.io.toolbox.run` with one input, but an answer that is in the cache is taken from there.

    Parameters
    ----------
    cache
        A folder, made if it is absent; by default the one that ``MEL_CACHE`` names, and none if that is unset. Files in
        it may be deleted at any time; one that is damaged is replaced.

    Raises
    ------
    ConfigError
        If the folder cannot be made.
    """
    folder = cache or os.environ.get("MEL_CACHE")
    if not folder:
        return run(command, [array], outputs, timeout=timeout, threads=threads, cancel=cancel)
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the cache {place} cannot be made: {error.strerror}; name another folder.") from None
    path = place / f"{_digest([version(), *command, str(array.shape)], array)}.safetensors"
    names = [f"out{index}" for index in range(outputs)]
    try:
        found = load_file(path)
        return [found[name].T for name in names]
    except (OSError, SafetensorError, KeyError):
        pass  # absent, or damaged: ask BART
    results = run(command, [array], outputs, timeout=timeout, threads=threads, cancel=cancel)
    with replacing(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(result.T) for name, result in zip(names, results, strict=True)}, temporary
        )
    return results


def _digest(words: Sequence[str], array: Complex) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    digest.update(np.ascontiguousarray(array.T).view(np.uint8).data)
    return digest.hexdigest()
