"""From an anatomy to examples: coils, noise, masks, and the path of the scanner.

What is slow (anatomy, coils, maps estimated by BART from a noisy undersampled scan) makes a `Base`. Several examples
are drawn of each, every one with a mask, noise and scale of its own, and the maps of that one scan, as if it had been
a separate calibration.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.errors import DataError
from melcore.physics import Sense
from melcore.physics.fourier import fft
from melcore.preprocess.compression import compress_coils
from melcore.preprocess.preparation import Preparation, prepare, start_image
from melcore.preprocess.whitening import NoiseCovariance, whitening_matrix
from melcore.simulate.acquisition import scale_to_snr
from melcore.simulate.coils import coil_maps
from melcore.simulate.heart import random_cine
from melcore.simulate.noise import complex_noise, random_noise_covariance
from melcore.simulate.phantom import random_anatomy
from training.anatomies import Entry
from training.anatomy import Matrix, draw_anatomy
from training.cine import draw_cine
from training.config import DataSettings, MaskSettings
from training.example import Example, window_readout
from training.fields import add_phase, draw_seed, log_uniform, whole
from training.measured import draw_measured, draw_undersampled
from training.sampling import choose_kind, draw_mask
from training.sources import Mixture, Source

# Energy of the noise-free signal that estimated maps may miss. On measured heads they miss 1 %, failed ones over 10.
# Noise in the calibration region makes maps worse, and a scanner has no better ones: what it costs is allowed on top.
_MOST_MISSED = 0.04
_NOISE = math.sqrt(2)  # standard deviation of whitened complex noise
# Examples of one base are this much better or worse than the scan that its maps come from, at most.
_SNR_SPREAD = 2.0
# A measured truth has noise: at least so many times more is added to the data, or they would be told what it is.
_LEAST_ADDED = 2.0


@dataclass(frozen=True)
class Scan:
    """A fully sampled scan of a unit SNR, whitened.

    Attributes
    ----------
    complete
        ``(1, coil, time, z, y, x)``; noise of variance 2 is missing to a scan of SNR 1, or to one of SNR `s` once this
        is multiplied by it.
    noise
        Standard deviation of the complex noise that `complete` has already.
    """

    complete: Tensor
    noise: float = 0.0

    @property
    def matrix(self) -> Matrix:
        """Sizes ``(z, y, x)``."""
        _, _, _, z, y, x = self.complete.shape
        return z, y, x


@dataclass(frozen=True)
class Base:
    """What several examples have in common: a scan, compressed, and the maps that were estimated from it once.

    Attributes
    ----------
    combined
        `scan`, combined with the maps, ``(1, set, time, z, y, x)``.
    snr
        Of the scan that the maps come from.
    """

    scan: Scan
    coil_maps: CoilMaps
    combined: Tensor
    kind: MaskSettings
    snr: float

    def draw(
        self, settings: DataSettings, preparation: Preparation, rng: np.random.Generator, window: int | None = None
    ) -> Example:
        """See `draw_example`."""
        return draw_example(self, settings, preparation, rng, window)


@dataclass(frozen=True)
class Measured:
    """A base of one example only: a scan without a truth, as it was sampled."""

    example: Example

    def draw(
        self, _settings: DataSettings, _preparation: Preparation, _rng: np.random.Generator, _window: int | None = None
    ) -> Example:
        """The example: what is new at every step is which of its samples are held out."""
        return self.example


def draw_scan(settings: DataSettings, source: Source, entry: Entry | None, rng: np.random.Generator) -> Scan:
    """Draw an anatomy of a subject, or a simulated one, and the coils that see it; a measured scan has its own."""
    # Multiples of 4 have fast Fourier transforms, and matrices of scanners are even.
    matrix = (_size(rng, settings.z), _size(rng, settings.y), _size(rng, settings.x))
    frames, coils = whole(rng, settings.frames), whole(rng, settings.coils)
    if source.folder is not None and entry is not None and entry.kind == "k-space":
        complete, signal = draw_measured(source.folder, entry, settings, frames, rng)
        return Scan(complete / signal, _NOISE / signal)
    image = _draw_image(source, entry, settings, matrix, frames, rng)
    image = scale_to_snr(image, 1.0)
    maps = coil_maps(matrix, coils, seed=draw_seed(rng))
    covariance = random_noise_covariance(coils, rng.uniform(0, settings.correlation), seed=draw_seed(rng))
    # Whitened by the covariance itself: what little an estimate would differ by, no network can see.
    whitening = math.sqrt(2) * whitening_matrix(NoiseCovariance(2 * covariance, 0.0, 0), 0.0)
    maps = torch.tensordot(whitening, maps, 1)
    return Scan(fft(maps[None, :, None] * image, (-3, -2, -1)))


def _draw_image(
    source: Source, entry: Entry | None, settings: DataSettings, matrix: Matrix, frames: int, rng: np.random.Generator
) -> Tensor:
    """Complex ``(time, z, y, x)``."""
    zoom = rng.uniform(*source.zoom)
    if source.folder is not None and entry is not None:
        if frames > 1:
            return draw_cine(source.folder, entry, matrix, frames, zoom, settings.phase, rng)
        return draw_anatomy(source.folder, entry, matrix, zoom, settings.phase, rng)
    # On a small matrix, a window of a larger field of view shows finer structure than the whole would.
    larger = [size if size == 1 else round(size * max(zoom, 1.0)) for size in matrix]
    z, y, x = larger
    if frames > 1:
        image = random_cine((frames, z, y, x), seed=draw_seed(rng))
    else:
        image = random_anatomy((z, y, x), seed=draw_seed(rng))[None]
    starts = [int(rng.integers(large - size + 1)) for large, size in zip(larger, matrix, strict=True)]
    for axis, (start, size) in enumerate(zip(starts, matrix, strict=True), 1):
        image = image.narrow(axis, start, size)
    return add_phase(image, settings.phase, rng, smooth=False) if settings.phase > 0 else image


def draw_base(
    settings: DataSettings, preparation: Preparation, mixture: Mixture, rng: np.random.Generator
) -> Base | Measured:
    """Draw a scan, and estimate its maps as the scanner would.

    Raises
    ------
    DataError
        If the maps miss so much of the noise-free signal that no target could be consistent with the data.
    ToolError
        If BART fails.
    """
    source = mixture.choose(rng)
    entry = source.choose(rng)
    if source.folder is not None and entry is not None and entry.kind == "undersampled":
        k_space, calibration = draw_undersampled(source.folder, entry, settings, rng)
        return Measured(Example(prepare(k_space, calibration=calibration, settings=preparation), None))
    scan = draw_scan(settings, source, entry, rng)
    kind = choose_kind(settings.masks, rng)
    snr = _within(log_uniform(rng, settings.snr), scan)
    k_space = _measure(scan, kind, snr, rng)
    prepared = prepare(k_space, settings=replace(preparation, start_iterations=1))
    complete = compress_coils(scan.complete, prepared.mixing[0])
    everywhere = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    combined = Sense(prepared.coil_maps.data, everywhere, time=complete.shape[2]).adjoint(complete)
    _check_maps(complete, combined, scan.noise, snr)
    return Base(replace(scan, complete=complete), prepared.coil_maps, combined, kind, snr)


def _check_maps(complete: Tensor, combined: Tensor, noise: float, snr: float) -> None:
    total = float(complete.abs().square().sum())
    # Noise in a measured truth lies in all coils alike, and the maps keep one image's share of it.
    coils, samples = complete.shape[1], complete[:, 0].numel()
    unavoidable = noise**2 * samples * (coils - combined.shape[1])
    missed = (total - float(combined.abs().square().sum()) - unavoidable) / max(
        total - noise**2 * complete.numel(), 1e-30
    )
    if not missed <= _MOST_MISSED + 1 / snr:
        raise DataError(f"the estimated maps miss {missed:.1%} of the signal: the coil maps have failed.")


def draw_example(
    base: Base,
    settings: DataSettings,
    preparation: Preparation,
    rng: np.random.Generator,
    window: int | None = None,
) -> Example:
    """Draw one example of a base: a mask, noise and its strength anew, on the path of the scanner.

    Parameters
    ----------
    base, settings, preparation, rng
        Where it comes from.
    window
        Samples along the readout that are kept, from a random place; the start image, which is what takes longest, is
        computed for them alone. Masks that change along the readout keep all of it.

    Raises
    ------
    DataError
        If these data cannot be prepared.
    """
    least, most = (math.log(bound) for bound in settings.snr)
    exponent = math.log(base.snr) + rng.uniform(-1, 1) * math.log(_SNR_SPREAD)
    # What would leave the range is reflected into it: its ends are as frequent as its middle.
    exponent = 2 * least - exponent if exponent < least else 2 * most - exponent if exponent > most else exponent
    snr = _within(math.exp(min(max(exponent, least), most)), base.scan)
    k_space = _measure(base.scan, base.kind, snr, rng)
    rest = k_space.data.shape[-1] - (window or math.inf)
    if rest <= 0 or k_space.mask.shape[-1] > 1:
        prepared = prepare(k_space, coil_maps=base.coil_maps, settings=preparation)
        return Example(prepared, base.combined * snr / prepared.scale.view(-1, 1, 1, 1, 1, 1))
    prepared = prepare(k_space, coil_maps=base.coil_maps, settings=replace(preparation, start_iterations=1))
    truth = base.combined * snr / prepared.scale.view(-1, 1, 1, 1, 1, 1)
    part = window_readout(Example(prepared, truth), int(rng.integers(int(rest) + 1)), int(window or 0))
    p = part.prepared
    initial = start_image(p.k_space, p.coil_maps, p.sigma, preparation, p.prior)
    return Example(replace(p, initial=initial), part.truth)


def _within(snr: float, scan: Scan) -> float:
    """At most what leaves the noise of a measured truth small beside the noise of its data."""
    if scan.noise == 0:
        return snr
    return min(snr, _NOISE / scan.noise / math.sqrt(1 + _LEAST_ADDED**2))


def _measure(scan: Scan, kind: MaskSettings, snr: float, rng: np.random.Generator) -> KSpace:
    """Undersampled data with noise of variance 2, in which the image has this SNR."""
    frames, matrix = scan.complete.shape[2], scan.matrix
    mask = draw_mask(kind, matrix, frames, rng)
    generator = torch.Generator().manual_seed(draw_seed(rng))
    missing = math.sqrt(max(0.0, 1 - (scan.noise * snr / _NOISE) ** 2))
    data = scan.complete * snr + missing * complex_noise(tuple(scan.complete.shape), generator)
    return KSpace(data * mask, mask, ScanInfo(matrix, matrix), Noise(whitened=True, source="simulated"))


def _size(rng: np.random.Generator, span: tuple[int, int]) -> int:
    size = whole(rng, span)
    return size if size < 4 else size // 4 * 4
