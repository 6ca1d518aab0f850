"""What training minimises. Every loss is relative to the truth, so that dim and bright examples weigh the same."""

from dataclasses import dataclass

from torch import Tensor

from melcore.errors import ConfigError
from melcore.learning.metrics import check_images, ssim


def relative_l1(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Sum of the magnitudes of the complex differences over that of the truth, averaged over the batch."""
    check_images(image, truth, support)
    error, size = (image - truth).abs(), truth.abs()
    if support is not None:
        error, size = error * support, size * support
    return (error.flatten(1).sum(1) / size.flatten(1).sum(1)).mean()


def relative_l2(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Energy of the complex difference over that of the truth (`nrmse` squared), averaged over the batch."""
    check_images(image, truth, support)
    error, size = (image - truth).abs().square(), truth.abs().square()
    if support is not None:
        error, size = error * support, size * support
    return (error.flatten(1).sum(1) / size.flatten(1).sum(1)).mean()


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weighted sum of the relative L1 and L2 losses and of ``1 - ssim``; terms of weight 0 are not computed.

    Outside the support, the truth is zero and no data contradict the network: without a support the loss teaches it to
    leave zeros there. The SSIM term is taken inside the support where one is given.

    Attributes
    ----------
    l1, l2, ssim
        Weights, not negative, at least one positive.
    dimensions
        Of the windows of SSIM.
    """

    l1: float = 1.0
    l2: float = 0.0
    ssim: float = 0.0
    dimensions: int = 2

    def __post_init__(self) -> None:
        weights = (self.l1, self.l2, self.ssim)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(f"the weights of a loss must not be negative, nor all zero: (l1, l2, ssim) = {weights}.")

    def __call__(self, image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
        """Loss of complex images ``(batch, set, time, z, y, x)``, a scalar."""
        total = truth.real.new_zeros(())
        if self.l1:
            total = total + self.l1 * relative_l1(image, truth)
        if self.l2:
            total = total + self.l2 * relative_l2(image, truth)
        if self.ssim:
            total = total + self.ssim * (1 - ssim(image, truth, support, dimensions=self.dimensions)).mean()
        return total
