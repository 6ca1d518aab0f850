"""Space-time separated CNNs, (2+1)D and (3+1)D: spatial and temporal convolutions in turn."""

from melcore.errors import ConfigError
from melcore.networks.layers import LocalLayer, PaddingMode, SpatialConvolution, TemporalConvolution
from melcore.networks.regulariser import LocalRegulariser, soften_last


class SpaceTimeCNN(LocalRegulariser):
    """Residual CNN whose every stage is a spatial convolution, an activation, and a convolution over time.

    Tran et al., A closer look at spatiotemporal convolutions, CVPR 2018; for dynamic MRI: Sandino et al., DL-ESPIRiT,
    Magn Reson Med 85:152 (2021).

    Parameters
    ----------
    dimensions
        Spatial dimensions, 2 or 3.
    channels, stages
        Width, and number of pairs of convolutions (at least 2).
    kernel, time_kernel
        Sizes along each spatial axis and along time (odd).
    sets, slope, padding, dropout
        As for `melcore.networks.ResidualCNN`; `time_padding` applies to time (``"circular"`` for a heart cycle).
    """

    def __init__(
        self,
        dimensions: int,
        *,
        channels: int = 32,
        stages: int = 3,
        kernel: int = 3,
        time_kernel: int = 3,
        sets: int = 1,
        slope: float = 0.1,
        padding: PaddingMode = "zeros",
        time_padding: PaddingMode = "zeros",
        dropout: float = 0.0,
    ) -> None:
        if stages < 2:
            raise ConfigError(f"SpaceTimeCNN needs at least 2 stages, but {stages} were asked for.")
        chain: list[LocalLayer] = []
        for stage in range(stages):
            first, last = stage == 0, stage == stages - 1
            chain += [
                SpatialConvolution(
                    2 * sets if first else channels,
                    channels,
                    dimensions=dimensions,
                    kernel=kernel,
                    slope=slope,
                    padding=padding,
                ),
                TemporalConvolution(
                    channels,
                    2 * sets if last else channels,
                    kernel=time_kernel,
                    slope=1.0 if last else slope,
                    padding=time_padding,
                ),
            ]
        soften_last(chain)
        super().__init__(chain, dimensions=f"{dimensions}d+t", sets=sets, dropout=dropout)
