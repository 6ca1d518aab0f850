"""What training minimises. Every loss is relative to the truth, so that dim and bright examples weigh the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from melcore.errors import ConfigError
from melcore.learning.metrics import check_images, ssim

# A reference as good as this counts as no better: below are rounding and the last traces of interpolated maps.
_LEAST = 1e-4


def relative_l1(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Sum of the magnitudes of the complex differences over that of the truth, averaged over the batch."""
    check_images(image, truth, support)
    error, size = (image - truth).abs(), truth.abs()
    if support is not None:
        error, size = error * support, size * support
    return _ratio(error, size)


def relative_l2(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Energy of the complex difference over that of the truth (`nrmse` squared), averaged over the batch."""
    check_images(image, truth, support)
    error, size = (image - truth).abs().square(), truth.abs().square()
    if support is not None:
        error, size = error * support, size * support
    return _ratio(error, size)


def relative_root(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Mean `nrmse`, with a gradient that stays finite at the truth.

    >>> truth = torch.ones(1, 1, 1, 1, 2, 2, dtype=torch.complex64)
    >>> float(relative_root(2 * truth, truth))
    1.0
    """
    check_images(image, truth, support)
    weight = truth.real.new_ones(()) if support is None else support
    error, size = (image - truth).abs().square() * weight, truth.abs().square() * weight
    return _root(error.flatten(1).sum(1) / size.flatten(1).sum(1))


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return (error.flatten(1).sum(1) / size.flatten(1).sum(1)).mean()


def _root(energy: Tensor) -> Tensor:
    # The root's derivative is infinite at 0; this shift is a millionth of the best reference's energy.
    return ((energy + 1e-6 * _LEAST**2).sqrt() - 1e-3 * _LEAST).mean()


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weighted sum of relative terms; terms of weight 0 are not computed.

    ``l1`` is `relative_l1`, ``nrmse`` the relative root mean square (`relative_root`), ``l2`` its square, and ``ssim``
    stands for ``1 - ssim``. Divided by the terms of a reference image (`divisors`), the weights are the shares that
    the terms have where an image is as good as the reference, and examples of any noise level and acceleration weigh
    alike.

    Outside the support, the truth is zero and no data contradict the network: over the whole image the loss teaches it
    to leave zeros there. The SSIM term is that of the support where one is given.

    Attributes
    ----------
    l1, l2, ssim, nrmse
        Weights, not negative, at least one positive.
    dimensions
        Of the windows of SSIM.
    region
        Where L1, L2 and NRMSE count: the whole ``"image"``, or its ``"support"``.
    """

    l1: float = 1.0
    l2: float = 0.0
    ssim: float = 0.0
    nrmse: float = 0.0
    dimensions: int = 2
    region: Literal["image", "support"] = "image"

    def __post_init__(self) -> None:
        weights = (self.l1, self.l2, self.ssim, self.nrmse)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"the weights of a loss must not be negative, nor all zero: (l1, l2, ssim, nrmse) = {weights}."
            )
        if self.region not in ("image", "support"):
            raise ConfigError(f"a loss counts over the image or the support, not over {self.region!r}.")

    def __call__(
        self,
        image: Tensor,
        truth: Tensor,
        support: Tensor | None = None,
        divisors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Loss of complex images ``(batch, set, time, z, y, x)``, a scalar.

        Parameters
        ----------
        image, truth
            What is judged, and what it should be.
        support
            Boolean, broadcastable to the images.
        divisors
            What every term is divided by; see `divisors`.
        """
        total = truth.real.new_zeros(())
        for name, value in self.terms(image, truth, support).items():
            weighted = getattr(self, name) * value
            total = total + (weighted if divisors is None else weighted / divisors[name])
        return total

    @torch.no_grad()
    def divisors(self, reference: Tensor, truth: Tensor, support: Tensor | None = None) -> dict[str, Tensor]:
        """Terms of a reference image, by which those of other images can be divided: none is zero."""
        least = {"l2": _LEAST**2}
        terms = self.terms(reference, truth, support)
        return {name: value.clamp(min=least.get(name, _LEAST)) for name, value in terms.items()}

    def terms(self, image: Tensor, truth: Tensor, support: Tensor | None = None) -> dict[str, Tensor]:
        """Every term whose weight is not zero, as it is."""
        check_images(image, truth, support)
        # One difference serves all terms: each of its own would hold another image until its backward.
        error, size = (image - truth).abs(), truth.abs()
        if self.region == "support" and support is not None:
            error, size = error * support, size * support
        found = {}
        if self.l1:
            found["l1"] = _ratio(error, size)
        if self.nrmse or self.l2:
            energy = error.square().flatten(1).sum(1) / size.square().flatten(1).sum(1)
            found |= {"nrmse": _root(energy)} if self.nrmse else {}
            found |= {"l2": energy.mean()} if self.l2 else {}
        if self.ssim:
            found["ssim"] = (1 - ssim(image, truth, support, dimensions=self.dimensions)).mean()
        return found
