"""Model bundles: one safetensors file that holds weights, architecture, preparation and card. No pickle anywhere.

A bundle is all that training and the scanner share. Its metadata are JSON: ``architecture`` (for
`melcore.unrolled.build`), ``preparation`` (how its data were prepared), ``conventions`` (which meanings of whitening,
Fourier transform and axes the weights were trained with) and ``card`` (data, seed, steps, machine, time, metrics).
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melcore.errors import ConfigError, DataError, unknown
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import Unrolled, build

FORMAT = "mel-bundle"
VERSION = "1"
SUFFIX = ".safetensors"

CONVENTIONS = {
    "axes": "image (batch, set, time, z, y, x)",
    "fourier": "centred, orthonormal",
    "whitening": "gadgetron-noiseadjust",
    "scale": "99th percentile of the calibration image in the support of the maps",
    "map_gauge": "first principal component",
}


@dataclass(frozen=True)
class Bundle:
    """A trained model with everything that is needed to use it.

    Attributes
    ----------
    model
        In evaluation mode when loaded.
    architecture
        What `melcore.unrolled.build` makes the model from.
    preparation
        How its training data were prepared, and data at the scanner must be.
    card
        Free, JSON: how the model was trained and what it reached.
    name, digest
        File name without suffix, and the first 16 hex digits of the content's SHA-256, which a file holds too, so that
        damage shows; empty before saving.
    """

    model: Unrolled
    architecture: Mapping[str, Any]
    preparation: Preparation
    card: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    digest: str = ""

    @property
    def dimensions(self) -> str:
        """Which data the model is for: ``2d``, ``3d``, ``2d+t`` or ``3d+t``."""
        return self.model.iterations[0].regulariser.dimensions

    def save(self, path: str | Path) -> Path:
        """Write the bundle; the file appears complete or not at all."""
        from safetensors.torch import save

        path = Path(path)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": json.dumps(dict(self.architecture)),
            "preparation": json.dumps(dataclasses.asdict(self.preparation)),
            "conventions": json.dumps(CONVENTIONS),
            "card": json.dumps(dict(self.card)),
        }
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        metadata["digest"] = _digest(metadata, weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(save(weights, metadata))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Read a bundle, given its path or the name of one that ships.

        Raises
        ------
        DataError
            If the file is missing, damaged, not a bundle, or made for other conventions.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load

        path = find(path)
        content = path.read_bytes()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            weights = load(content)
        except SafetensorError as error:
            raise DataError(f"{path} is damaged or not a safetensors file ({error}): get the bundle again.") from error
        if metadata.get("format") != FORMAT:
            raise DataError(f"{path} is a safetensors file but not a MEL bundle: it has no metadata format = {FORMAT}.")
        if metadata.get("version") != VERSION:
            raise DataError(
                f"{path} is a bundle of version {metadata.get('version')}, but this program reads version {VERSION}."
            )
        stored = metadata.pop("digest", None)  # bundles of the first days have none
        digest = _digest(metadata, weights)
        if stored not in (None, digest):
            raise DataError(
                f"{path} is damaged: its content has the digest {digest}, but {stored} when it was saved: get the "
                "bundle again."
            )
        try:
            architecture = json.loads(metadata["architecture"])
            preparation = Preparation(**json.loads(metadata["preparation"]))
            conventions, card = json.loads(metadata["conventions"]), json.loads(metadata["card"])
            model = build(architecture)
            model.load_state_dict(weights, strict=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: the bundle's weights and description do not fit together: {reason}") from error
        for key, value in conventions.items():
            if CONVENTIONS.get(key) != value:
                raise DataError(
                    f"{path} was made for {key} = {value!r}, but this program uses {CONVENTIONS.get(key)!r}."
                )
        name = path.name.removesuffix(SUFFIX)
        return cls(model.eval(), architecture, preparation, card, name, digest)


def _digest(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """Of metadata and weights in a fixed order; files of the same content may differ in their order."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def find(name: str | Path) -> Path:
    """The file of a bundle: a path as it is, or the name of a bundle that ships.

    Raises
    ------
    DataError
        If a path leads nowhere.
    ConfigError
        If there is no such name; the message lists those there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundles = shipped()
    if str(name) in bundles:
        return bundles[str(name)]
    if path.suffix == SUFFIX or len(path.parts) > 1:
        raise DataError(f"there is no bundle at {path}. Bundles that ship: {', '.join(bundles) or 'none'}.")
    raise unknown("bundle", str(name), bundles) if bundles else ConfigError(f"there is no bundle {name!r}.")


def shipped() -> dict[str, Path]:
    """Bundles that ship with the package, by name."""
    package = importlib.util.find_spec("pipelines")
    locations = package.submodule_search_locations if package else None
    folders = [Path(location) / "bundles" for location in locations or []]
    return {file.stem: file for folder in folders for file in sorted(folder.glob(f"*{SUFFIX}"))}
