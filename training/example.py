"""A training example: data prepared exactly as at the scanner, and the image that a perfect scan would give.

The target is in the gauge of the example's maps: the noise-free, fully sampled k-space of all coils, compressed and
whitened as the data were, transformed, combined with the *estimated* maps (``sum over coils conj(map) * coil image``),
and divided by the scale of the data. Where the truth was itself measured, it keeps a little noise.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from melcore.errors import ConfigError
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.preparation import Prepared


@dataclass(frozen=True)
class Example:
    """What a reconstruction starts from, and what it should give.

    Attributes
    ----------
    prepared
        See `melcore.preprocess.preparation.prepare`.
    truth
        Scaled image ``(batch, set, time, z, y, x)``; None for data that were never sampled fully.
    """

    prepared: Prepared
    truth: Tensor | None

    @property
    def support(self) -> Tensor:
        """Where signal lies, ``(batch, set, 1, z, y, x)``."""
        return self.prepared.support


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
    prepared = replace(
        p,
        k_space=k_space,
        coil_maps=maps,
        initial=p.initial[..., cut].contiguous(),
        support=p.support[..., cut].contiguous(),
        prior=p.prior[..., cut].contiguous(),
    )
    truth = None if example.truth is None else example.truth[..., cut].contiguous()
    return Example(prepared, truth)
