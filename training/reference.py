"""What an image of a case should be, where it is judged, and how far it is from that."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.learning import decibels, hfen, nrmse, object_region, psnr, ssim
from melcore.physics import Sense
from melcore.physics.fourier import ifft
from melcore.preprocess.preparation import Prepared
from training.cases import Case

#: Of the 99th percentile of the smoothed reference: what is brighter is the object.
OBJECT_THRESHOLD = 0.1
REGIONS = ("object", "support", "whole")
METRICS = ("nrmse_db", "psnr_db", "ssim", "hfen")

Figures = dict[str, dict[str, float]]  #: of each region: nrmse_db (complex), psnr_db, ssim, hfen (magnitude)


@dataclass(frozen=True)
class Reference:
    """The truth of a case in the gauge and the units of its preparation.

    Attributes
    ----------
    image
        The fully sampled coil images combined with the maps; where the maps are zero, the root of their sum of squares
        (less what noise adds to it), so that a method that leaves the image blank there is charged for what was there.
    regions
        Boolean, broadcastable to the image: ``object`` (brighter than `OBJECT_THRESHOLD`), ``support`` (where the
        preparation of the undersampled data found signal that the maps explain) and ``whole``.
    floor_db
        For each region, the error that the noise-free image itself would have against this reference, in dB; minus
        infinity where the reference has no noise. Figures near it mean nothing.
    """

    image: Tensor
    regions: dict[str, Tensor]
    floor_db: dict[str, float]

    @property
    def volume(self) -> bool:
        """Whether windows extend over slices too."""
        return min(self.image.shape[-3:]) > 1

    def error(self, image: Tensor) -> float:
        """Complex NRMSE in the support, in dB: what sweeps minimise."""
        return float(decibels(nrmse(image, self.image, self.regions["support"])).mean())

    def judge(self, image: Tensor) -> Figures:
        """All figures of an image."""
        dimensions, found = 3 if self.volume else 2, {}
        for name, region in self.regions.items():
            found[name] = {
                "nrmse_db": float(decibels(nrmse(image, self.image, region)).mean()),
                "psnr_db": float(psnr(image, self.image, region).mean()),
                "ssim": float(ssim(image, self.image, region, dimensions=dimensions).mean()),
                "hfen": float(hfen(image, self.image, region, dimensions=dimensions).mean()),
            }
        return found


def reference(case: Case, prepared: Prepared) -> Reference:
    """The reference of a case for what was prepared of it."""
    matrix = (prepared.mixing / prepared.scale.view(-1, 1, 1))[0]  # what was done to the coils, and the scale
    complete = torch.einsum("vc,bctzyx->bvtzyx", matrix, case.complete)
    maps = prepared.coil_maps.data
    everywhere = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    combined = Sense(maps, everywhere, time=complete.shape[2]).adjoint(complete)
    mapped = (maps != 0).any(2)
    image = combined
    level = case.reference_noise * float(matrix.abs().square().sum(1).mean().sqrt())  # of a sample, in scaled units
    if not bool(mapped.any(1).all()):
        energy = ifft(complete).abs().square().sum(1, keepdim=True) - complete.shape[1] * level**2
        beyond = energy.clamp(min=0).sqrt().to(combined.dtype)
        image = combined.clone()
        nowhere = ~mapped.any(1, keepdim=True).expand_as(image[:, :1])
        image[:, :1] = torch.where(nowhere, beyond, combined[:, :1])
    regions = {
        "object": object_region(image, OBJECT_THRESHOLD, dimensions=3 if min(image.shape[-3:]) > 1 else 2),
        "support": prepared.support,
        "whole": torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool),
    }
    floor = {}
    for name, region in regions.items():
        inside = region.expand_as(image)
        energy = float((image.abs().square() * inside).sum())
        noise = level**2 * float(inside.sum())
        floor[name] = 10 * math.log10(noise / energy) if noise > 0 and energy > 0 else -math.inf
    return Reference(image, regions, floor)
