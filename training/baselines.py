"""Conventional methods that learned ones are judged against, with the best weight for the very case: an oracle's.

The sweeps minimise the complex error in the support of the maps, which no user can: nobody knows the truth of a scan.
What users get without a network is the product's CG-SENSE, whose weight follows from the noise.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melcore import layout
from melcore.io import bart
from melcore.io.atomic import replacing
from melcore.physics import conjugate_gradient
from melcore.preprocess.preparation import Prepared, cg_sense_weight, time_average
from training.reference import Reference
from training.sweep import Sweep, sweep

PICS_ITERATIONS = 100  # of ADMM or FISTA; 300 change the best error by less than 0.05 dB
_CG_ITERATIONS = 100
# Of two regularisers, the second begins at this fraction of the first's weight.
_RATIO = 0.2


@dataclass(frozen=True)
class Outcome:
    """An image, and how it was made.

    Attributes
    ----------
    image
        Scaled ``(batch, set, time, z, y, x)``.
    setting
        The weights, in the words of the program that takes them.
    inside
        Whether the best weight is inside what was tried; None where nothing was swept.
    notes
        What else is worth keeping, JSON.
    """

    image: Tensor
    setting: str = ""
    inside: bool | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def zero_filled(prepared: Prepared) -> Outcome:
    """Adjoint of the data."""
    return Outcome(prepared.operator().adjoint(prepared.k_space.data))


def oracle_cg_sense(prepared: Prepared, reference: Reference) -> Outcome:
    """CG-SENSE with the best weight, and the best form of its penalty.

    Forms: on the image; on the image in units of what is expected of it, as the product's; and of series, both on the
    difference from the average over time.
    """
    operator = prepared.operator()
    adjoint = operator.adjoint(prepared.k_space.data)
    # The product's own form and weight come first: an oracle is never worse.
    start = float(cg_sense_weight(prepared.sigma, operator.acceleration).mean())
    anchors: dict[str, Tensor | None] = {"": None}
    if prepared.k_space.data.shape[2] > 1:
        average = time_average(prepared.k_space, prepared.coil_maps).expand_as(adjoint)
        anchors["towards the average over time, "] = average
    best: tuple[float, Outcome] | None = None
    for anchored, anchor in anchors.items():
        rhs = adjoint if anchor is None else adjoint - operator.normal(anchor.contiguous())
        for weighted, prior in (("relative to what is expected, ", prepared.prior), ("", torch.ones(()))):
            images: dict[float, Tensor] = {}

            def solve(weight: float, rhs: Tensor = rhs, prior: Tensor = prior, images: Any = images) -> Tensor:
                # The nearest weight's solution is close already.
                near = min(images, key=lambda other: abs(math.log(other / weight)), default=None)
                solution = conjugate_gradient(
                    lambda v: prior * operator.normal(prior * v) + weight * v,
                    prior * rhs,
                    initial=None if near is None else images[near],
                    relative_tolerance=1e-5,
                    max_iterations=_CG_ITERATIONS,
                )
                images[weight] = solution.value
                return prior * solution.value

            def restored(change: Tensor, anchor: Tensor | None = anchor) -> Tensor:
                return change if anchor is None else anchor + change

            found = sweep(lambda weight: reference.error(restored(solve(weight))), start, refinements=1)
            start = found.weight
            if best is None or found.error < best[0]:
                image = restored(prior * images[found.weight])
                words = f"{anchored}{weighted}weight {found.weight:.3g}"
                best = found.error, Outcome(image, words, found.inside, _notes(found))
    assert best is not None
    return best[1]


def pics_kinds(dimensions: str) -> dict[str, tuple[str, ...]]:
    """Regularisers of BART's pics worth trying, by name, each without its weight (``-R`` takes ``KIND:WEIGHT``)."""
    space = 7 if dimensions.startswith("3d") else 3
    if dimensions.endswith("+t"):
        return {
            "pics temporal TV + wavelet": ("T:1024:0", f"W:{space}:0"),
            "pics low rank": (f"L:{space}:{space}",),
        }
    return {
        "pics wavelet": (f"W:{space}:0",),
        "pics TV": (f"T:{space}:0",),
        "pics TV + wavelet": (f"T:{space}:0", f"W:{space}:0"),
    }


def pics(prepared: Prepared, regularisers: Sequence[str], iterations: int = PICS_ITERATIONS) -> Tensor:
    """BART's pics with the maps and the scale of what was prepared; `regularisers` with their weights."""
    k_space = layout.k_space_to_bart(prepared.k_space.data.numpy())
    maps = layout.coil_maps_to_bart(prepared.coil_maps.data.numpy())
    options = [part for regulariser in regularisers for part in ("-R", regulariser)]
    blocks = ["-b8"] if any(regulariser.startswith("L") for regulariser in regularisers) else []
    try:
        # -w1: no scaling of its own, so that weights have one meaning; -S: undo what scaling there is.
        (result,) = bart.run(["pics", "-S", "-w1", f"-i{iterations}", *blocks, *options], [k_space, maps])
    except bart.EmptyOutputError:
        return torch.zeros_like(prepared.initial)  # a weight so large that nothing is left is a result
    image = torch.from_numpy(np.ascontiguousarray(layout.image_from_bart(result)))
    # Where half the size of an axis is odd, BART's Fourier transform has the opposite sign.
    adjoint = prepared.operator().adjoint(prepared.k_space.data)
    return image if float((image.conj() * adjoint).sum().real) >= 0 else -image


def tuned_pics(prepared: Prepared, reference: Reference, kinds: Sequence[str], cache: Path | None = None) -> Outcome:
    """BART's pics with the best weights of one or two regularisers.

    Two weights are swept together at a fixed ratio, then the ratio, then both again where it moved.

    Parameters
    ----------
    prepared, reference
        The case.
    kinds
        Of `pics_kinds`.
    cache
        Folder in which finished trials are kept under a digest of data and command; an interrupted sweep continues.
    """
    ledger = _Ledger(prepared, reference, kinds, cache)

    def measure(weight: float, ratio: float) -> float:
        weights = [weight, weight * ratio]
        return ledger.measure(tuple(f"{kind}:{w:.4g}" for kind, w in zip(kinds, weights, strict=False)))

    # About where the best weights of brains, heads and hearts were found.
    start, ratio = max(0.5 * float(prepared.sigma.mean()), 1e-4), _RATIO
    found = sweep(lambda weight: measure(weight, ratio), start)
    inside, weight = found.inside, found.weight
    if len(kinds) > 1:
        ratios = sweep(lambda ratio: measure(weight, ratio), ratio, refinements=1)
        moved, ratio, inside = ratios.weight != ratio, ratios.weight, inside and ratios.inside
        if moved:
            again = sweep(lambda weight: measure(weight, ratio), weight, factor=1.7, refinements=1)
            weight, inside = again.weight, inside and again.inside
    setting = " ".join(ledger.best)
    return Outcome(ledger.image, setting, inside, {"trials": ledger.trials})


def _notes(found: Sweep) -> dict[str, Any]:
    return {"trials": {f"{weight:g}": round(error, 3) for weight, error in found.trials.items()}}


class _Ledger:
    """Errors of the settings that were tried, and the image of the best; on disk where there is a cache."""

    def __init__(self, prepared: Prepared, reference: Reference, kinds: Sequence[str], cache: Path | None) -> None:
        self.prepared, self.reference = prepared, reference
        self.trials: dict[str, float] = {}
        self.best: tuple[str, ...] = ()
        self.image = torch.zeros_like(prepared.initial)
        self.path = None if cache is None else cache / f"{self._digest(kinds)}.safetensors"
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def measure(self, setting: tuple[str, ...]) -> float:
        words = " ".join(setting)
        if words not in self.trials:
            image = pics(self.prepared, setting)
            error = self.reference.error(image)
            if not self.best or error < self.trials[" ".join(self.best)]:
                self.best, self.image = setting, image
            self.trials[words] = round(error, 4)
            self._write()
        return self.trials[words]

    def _digest(self, kinds: Sequence[str]) -> str:
        words = ["pics", bart.version(), str(PICS_ITERATIONS), *kinds]
        digest = hashlib.sha256("\0".join(words).encode())
        for tensor in (
            self.prepared.k_space.data,
            self.prepared.coil_maps.data,
            self.reference.image,
            self.reference.regions["support"],
        ):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:24]

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads(file.metadata()["mel"])
                self.image = file.get_tensor("image")
            self.trials, self.best = found["trials"], tuple(found["best"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            self.trials, self.best = {}, ()  # damaged: asked again

    def _write(self) -> None:
        from safetensors.torch import save_file

        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"trials": self.trials, "best": self.best})
        with replacing(self.path) as temporary:
            save_file({"image": self.image.contiguous()}, temporary, {"mel": record})
