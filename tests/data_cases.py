"""Small anatomies, prepared as `mel prepare` would, and configurations that draw from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melcore.physics.fourier import fft
from melcore.simulate.coils import coil_maps
from melcore.simulate.phantom import random_anatomy
from training.anatomies import Entry, Split, file_name, write_manifest, write_subject
from training.config import DataSettings

DATA: dict[str, Any] = {
    "dimensions": "2d",
    "validation": 3,
    "y": [36, 44],
    "x": [32, 40],
    "coils": [3, 5],
    "snr": [20, 200],
    "masks": [{"kind": "poisson", "acceleration": [1.5, 3], "calibration": [12, 14]}],
    "workers": 0,
    "reuse": 3,
    "ahead": 4,
}


def data(**settings: Any) -> DataSettings:
    """The small settings, some replaced."""
    return DataSettings.model_validate_json(json.dumps({**DATA, **settings}))


def volume(seed: int, shape: tuple[int, int, int] = (20, 26, 22)) -> torch.Tensor:
    """A magnitude ``(1, z, y, x)``, float16, air around it."""
    return random_anatomy(shape, seed=seed).abs()[None].half()


def write(folder: Path, subject: str, split: Split, kind: str = "volume", seed: int = 0, **tensors: Any) -> Entry:
    """Write one subject of a kind."""
    rng = np.random.default_rng(seed)
    if not tensors and kind == "volume":
        tensors = {"images": volume(seed)}
    elif not tensors and kind == "planes":
        tensors = {"images": torch.from_numpy(rng.random((2, 3, 90, 70)).astype(np.float16))}
    elif not tensors and kind == "labels":
        tensors = {"labels": (volume(seed)[0].float() * 5).round().to(torch.int16)}
    elif not tensors and kind == "pairs":
        image = torch.from_numpy(rng.random((3, 60, 60)).astype(np.float16))
        flow = torch.from_numpy(rng.normal(0, 1, (3, 2, 60, 60)).astype(np.float16))
        tensors = {"first": image, "second": image.flip(-1), "forward": flow, "backward": -flow}
    main = next(iter(tensors.values()))
    box = tuple((0, size - 1) for size in main.shape[-3:]) if kind in ("volume", "labels") else ()
    folder.mkdir(parents=True, exist_ok=True)
    entry = Entry(subject, split, kind, file_name(subject), tuple(main.shape), (2.0, 2.0, 2.0), box)  # type: ignore[arg-type]
    entry = write_subject(folder, entry, tensors)
    write_manifest(folder)
    return entry


def measured(seed: int, snr: float, shape: tuple[int, int, int] = (1, 40, 36), coils: int = 4) -> torch.Tensor:
    """Fully sampled k-space ``(1, coil, 1, z, y, x)`` with noise of complex variance 2, of mean signal `snr`."""
    image = random_anatomy(shape, seed=seed)
    magnitude = image.abs()
    image = image * snr / magnitude[magnitude > 0.1 * magnitude.max()].mean()
    k_space = fft(coil_maps(shape, coils, seed=seed) * image, (-3, -2, -1))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k_space.shape, dtype=torch.complex64, generator=generator) * 2**0.5
    return (k_space + noise)[None, :, None]
