"""Two phases of a heart from a folder of its images, and the optical flows between them."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from melcore.errors import DataError
from training.image_files import read_picture, required

# Around the middle, where hearts are; borders are often warped or masked.
_KEPT = 0.78
_FLOW = {"attachment": 12, "tightness": 0.3, "num_warp": 4, "num_iter": 8, "tol": 1e-3}


def pair_up(paths: Sequence[Path], phases: int) -> list[tuple[Path, Path]]:
    """Pairs of images of the same slice, by the last number in their names, of which a slice has `phases`.

    Slices with another number of images than two are left out.
    """
    slices: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(paths):
        numbers = re.findall(r"\d+", path.stem)
        if numbers:
            slices[(int(numbers[-1]) - 1) // phases].append(path)
    return [(found[0], found[1]) for _, found in sorted(slices.items()) if len(found) == 2]


def read_pairs(paths: Sequence[Path], phases: int) -> dict[str, Tensor]:
    """The tensors of the kind ``pairs``; see `training.anatomies`.

    Raises
    ------
    DataError
        If there is no pair.
    """
    registration = required("skimage.registration", "scikit-image")
    pairs = pair_up(paths, phases)
    if not pairs:
        raise DataError(f"{paths[0].parent} holds no two images of one slice ({phases} phases): see --pairs.")
    columns: dict[str, list[np.ndarray]] = {"first": [], "second": [], "forward": [], "backward": []}
    for names in pairs:
        first, second = (_middle(read_picture(name)[0].astype(np.float32)) for name in names)
        if first.shape != second.shape:
            raise DataError(f"{names[0]} and {names[1]} differ in size.")
        level = max(float(np.percentile(first, 99)), 1e-6)
        first, second = first / level, second / level
        # Roots: flows should follow dark tissue as well as bright blood.
        roots = [np.sqrt(np.clip(image, 0, 2)) for image in (first, second)]
        columns["first"].append(first)
        columns["second"].append(second)
        columns["forward"].append(registration.optical_flow_tvl1(roots[0], roots[1], **_FLOW))
        columns["backward"].append(registration.optical_flow_tvl1(roots[1], roots[0], **_FLOW))
    if len({image.shape for image in columns["first"]}) > 1:
        raise DataError(f"the slices of {paths[0].parent} differ in size.")
    return {name: torch.from_numpy(np.stack(values).astype(np.float16)) for name, values in columns.items()}


def _middle(image: np.ndarray) -> np.ndarray:
    sizes = [round(_KEPT * size) for size in image.shape]
    starts = [(full - size) // 2 for full, size in zip(image.shape, sizes, strict=True)]
    return image[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]]
