"""Training examples: simulated from seeds, prepared exactly as at the scanner, and kept on disk.

The target of an example is what a perfect scan would give in the gauge of its maps: the noise-free, fully sampled
k-space of all coils, compressed and whitened as the data were, transformed, combined with the *estimated* maps (``sum
over coils conj(map) * coil image``), and divided by the scale of the data. It is therefore zero where the maps are.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from melcore import __version__
from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, DataError, ToolError
from melcore.io.atomic import replacing
from melcore.physics import Sense
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.compression import coil_compression_matrix, compress_coils
from melcore.preprocess.preparation import Preparation, Prepared, prepare
from training.config import DataSettings
from training.simulation import Scan, simulate

# Part of the cache's key: raise it when the same settings come to mean other examples.
_GENERATION = 1

# Energy of the noise-free signal that estimated maps may miss. On measured heads they miss 1 %, failed ones over 10.
_MOST_MISSED = 0.04


@dataclass(frozen=True)
class Example:
    """What a reconstruction starts from, and what it should give.

    Attributes
    ----------
    prepared
        See `melcore.preprocess.preparation.prepare`.
    truth
        Scaled image ``(batch, set, time, z, y, x)``.
    """

    prepared: Prepared
    truth: Tensor

    @property
    def support(self) -> Tensor:
        """Where the maps are not zero, ``(batch, set, 1, z, y, x)``."""
        return self.prepared.coil_maps.data.abs().sum(2) > 0


def make_example(scan: Scan, settings: Preparation) -> Example:
    """Prepare a simulated scan as the scanner's data are prepared, and its target with the same maps and scale.

    Raises
    ------
    DataError
        If the estimated maps miss so much of the noise-free signal that no target could be consistent with the data.
    """
    prepared = prepare(scan.k_space, settings=settings)
    complete = scan.noiseless
    if settings.coils is not None and settings.coils < complete.shape[1]:
        # The same matrix as inside `prepare`: it depends on the data alone.
        matrix, _ = coil_compression_matrix(scan.k_space.data, settings.coils)
        complete = compress_coils(complete, matrix)
    everywhere = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    combine = Sense(prepared.coil_maps.data, everywhere, time=complete.shape[2])
    image = combine.adjoint(complete)
    missed = 1 - float(image.abs().square().sum() / complete.abs().square().sum())
    if missed > _MOST_MISSED:
        raise DataError(f"the estimated maps miss {missed:.1%} of the signal: the coil maps have failed.")
    return Example(prepared, image / prepared.scale.view(-1, 1, 1, 1, 1, 1))


def window_readout(example: Example, start: int, size: int) -> Example:
    """Cut a window out of the readout, exactly: a fully sampled axis decouples after a Fourier transform along it.

    Raises
    ------
    ConfigError
        If the mask changes along the readout.
    """
    p = example.prepared
    if p.k_space.mask.shape[-1] != 1:
        raise ConfigError("only a readout that is fully sampled can be cut; leave out training.readout_window.")
    cut = slice(start, start + size)
    hybrid = ifft(p.k_space.data, (-1,))[..., cut]
    k_space = replace(p.k_space, data=fft(hybrid.contiguous(), (-1,)))
    maps = replace(p.coil_maps, data=p.coil_maps.data[..., cut].contiguous())
    prepared = replace(p, k_space=k_space, coil_maps=maps, initial=p.initial[..., cut].contiguous())
    return Example(prepared, example.truth[..., cut].contiguous())


class Examples(Sequence[Example]):
    """Prepared examples on disk, read when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        return Examples(self.paths[index]) if isinstance(index, slice) else read_example(self.paths[index])


def write_example(path: Path, example: Example) -> None:
    """Write one example, complete or not at all."""
    from safetensors.torch import save_file

    p = example.prepared
    tensors = {
        "k_space": p.k_space.data,
        "mask": p.k_space.mask,
        "coil_maps": p.coil_maps.data,
        "scale": p.scale,
        "initial": p.initial,
        "truth": example.truth,
    }
    info = p.k_space.info
    metadata = {
        "encoded_matrix": info.encoded_matrix,
        "recon_matrix": info.recon_matrix,
        "noise": asdict(p.k_space.noise),
        "source": p.coil_maps.source,
        "gauge": p.coil_maps.gauge,
        "retained_energy": p.retained_energy,
    }
    with replacing(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"mel": json.dumps(metadata)})


def read_example(path: Path) -> Example:
    """Read what `write_example` wrote; `DataError` if the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, Any] = json.loads(file.metadata()["mel"])
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"the example {path} is missing or damaged ({error}): remove it, and it is made again."
        ) from None
    info = ScanInfo(tuple(metadata["encoded_matrix"]), tuple(metadata["recon_matrix"]))
    k_space = KSpace(tensors["k_space"], tensors["mask"], info, Noise(**metadata["noise"]))
    maps = CoilMaps(tensors["coil_maps"], metadata["source"], metadata["gauge"])
    prepared = Prepared(k_space, maps, tensors["scale"], tensors["initial"], metadata["retained_energy"])
    return Example(prepared, tensors["truth"])


def cache_key(settings: DataSettings, preparation: Preparation) -> str:
    """Hexadecimal digest of everything that examples depend on, but their number and place."""
    content = settings.model_dump(mode="json", exclude={"examples", "validation", "workers", "cache"})
    content |= {"preparation": asdict(preparation), "melcore": __version__, "generation": _GENERATION}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def prepare_examples(
    settings: DataSettings, preparation: Preparation, progress: Callable[[], object] = lambda: None
) -> tuple[Examples, Examples]:
    """Make those examples that the cache lacks, in parallel, and open them all.

    Parameters
    ----------
    settings, preparation
        What to make.
    progress
        Called after each example.

    Returns
    -------
    tuple of Examples
        For training and for validation; their seeds never meet.
    """
    folder = settings.cache / cache_key(settings, preparation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the cache {folder} cannot be made: {error.strerror}; set data.cache.") from None
    splits = {"training": settings.examples, "validation": settings.validation}
    paths = {name: [folder / f"{name}-{index:05d}.safetensors" for index in range(n)] for name, n in splits.items()}
    tasks = [(name, index, path) for name in splits for index, path in enumerate(paths[name])]
    missing = [task for task in tasks if not task[2].is_file()]
    for _ in range(len(tasks) - len(missing)):
        progress()
    if settings.workers == 1 or len(missing) < 2:
        for task in missing:
            _make(settings, preparation, *task)
            progress()
        return Examples(paths["training"]), Examples(paths["validation"])
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        settings.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(_make, settings, preparation, *task) for task in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Examples(paths["training"]), Examples(paths["validation"])


def _make(settings: DataSettings, preparation: Preparation, split: str, index: int, path: Path) -> None:
    """Simulate and prepare one example in a worker process."""
    entropy = [settings.seed, ("training", "validation").index(split), index]
    for attempt in range(10):
        # Some draws cannot be prepared (an empty slice, a centre too small): those are drawn again.
        rng = np.random.default_rng([*entropy, attempt])
        try:
            example = make_example(simulate(settings, rng), preparation)
        except (DataError, ToolError) as error:
            reason = error
            continue
        write_example(path, example)
        return
    raise DataError(f"{split} example {index} could not be made in 10 attempts; the last error: {reason}")
