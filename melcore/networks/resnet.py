"""The residual CNN of MoDL and of Wang et al. 2021: convolutions, activations, and the input added at the end."""

from itertools import pairwise

from melcore.errors import ConfigError
from melcore.networks.layers import LocalLayer, PaddingMode, SpatialConvolution
from melcore.networks.regulariser import LocalRegulariser, soften_last


class ResidualCNN(LocalRegulariser):
    """Residual CNN over (y, x) or (z, y, x), of complex images as pairs of real channels.

    Aggarwal et al., MoDL, IEEE Trans Med Imaging 38:394 (2019), without batch normalisation: its statistics would
    depend on the rest of the volume.

    Parameters
    ----------
    dimensions
        2 (every slice and frame on its own) or 3.
    channels, layers, kernel
        Width, number of convolutions (at least 2), and their size along each axis (odd).
    sets
        Map sets of the images.
    slope
        Negative slope of the leaky ReLUs between the convolutions.
    padding
        Continuation beyond the faces: zeros, replicate, reflect or circular.
    dropout
        Part of the activations that is dropped in training, after the activation of every layer but the last: between
        the convolutions, as in Zagoruyko and Komodakis, Wide residual networks, BMVC 2016.
    """

    def __init__(
        self,
        dimensions: int,
        *,
        channels: int = 64,
        layers: int = 5,
        kernel: int = 3,
        sets: int = 1,
        slope: float = 0.1,
        padding: PaddingMode = "zeros",
        dropout: float = 0.0,
    ) -> None:
        if layers < 2:
            raise ConfigError(f"ResidualCNN needs at least 2 layers, but {layers} were asked for.")
        widths = [2 * sets, *[channels] * (layers - 1), 2 * sets]
        slopes = [slope] * (layers - 1) + [1.0]
        chain: list[LocalLayer] = [
            SpatialConvolution(
                inputs, outputs, dimensions=dimensions, kernel=kernel, slope=layer_slope, padding=padding
            )
            for (inputs, outputs), layer_slope in zip(pairwise(widths), slopes, strict=True)
        ]
        soften_last(chain)
        super().__init__(chain, dimensions=f"{dimensions}d", sets=sets, dropout=dropout)
