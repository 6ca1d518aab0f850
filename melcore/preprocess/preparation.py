"""From whitened k-space to what a reconstruction starts from: the one path of training data and of the scanner.

Coils are compressed, sensitivity maps estimated by BART, the data scaled, and a start image computed. Each choice is a
setting that a model bundle records, so that a network sees at the scanner what it saw in training.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from melcore.data import CoilMaps, KSpace
from melcore.errors import DataError, ShapeError
from melcore.physics import LinearOperator, Sense, conjugate_gradient
from melcore.preprocess.calibration import calibration_region, signal_within, units_of_calibration
from melcore.preprocess.compression import compress_coils, virtual_coils
from melcore.preprocess.noise_level import whitened_by_estimate
from melcore.preprocess.scaling import low_resolution_image, scale_within

# Of the signal. Pure noise has about the fraction of the field of view that the maps cover.
_LEAST_COVERED = 0.2

_CG_TOLERANCE = 1e-4
_ABOVE_NOISE = 3.0
_BLURRING = 24  # samples of the calibration region along each axis that make the image of low resolution
_FAINTEST = 1e-4  # of the mean energy: what is expected of air
_LEAST_WEIGHT = 1e-6  # without noise: the solution is still unique
_LEAST_SIGMA = 1e-5  # of data without noise: single precision has no less


@dataclass(frozen=True)
class Preparation:
    """How k-space is prepared. The defaults suit brains and bodies at 4 to 32 coils.

    Attributes
    ----------
    coils
        Compress to at most so many virtual coils. By default, to those that rise above the noise
        (`melcore.preprocess.compression.virtual_coils`).
    map_sets
        Sets of sensitivity maps (2: soft SENSE).
    map_method
        ``"espirit"`` or ``"caldir"``; see `melcore.io.bart.estimate_coil_maps`.
    calibration_size
        At most so many central samples along each axis are used for the maps; None leaves it to the method.
    map_crop
        The support of the signal is where the maps' eigenvalue is above this. The first set of maps has no holes:
        images show what is faint. Further sets are zero outside their own support.
    start
        ``"zero"``: the start image is a short CG-SENSE from zero. ``"time average"``: it begins from, and is drawn
        towards, the average over time; for data that differ little from frame to frame.
    start_iterations, start_weight
        At most so many steps of conjugate gradients, and weight of the quadratic penalty, of CG-SENSE: of the start
        image, and of the reconstruction where that is CG-SENSE. By default the weight follows the noise and the
        acceleration (`cg_sense_weight`).
    """

    coils: int | None = None
    map_sets: int = 1
    map_method: Literal["espirit", "caldir"] = "espirit"
    calibration_size: int | None = None
    map_crop: float = 0.8
    start: Literal["zero", "time average"] = "zero"
    start_iterations: int = 100
    start_weight: float | None = None


@dataclass(frozen=True)
class Prepared:
    """What a reconstruction starts from.

    Attributes
    ----------
    k_space
        Compressed and divided by `scale`.
    coil_maps
        Maps of the (virtual) coils.
    scale
        ``(batch,)``, positive: multiply images by it to return to the units of the whitened data.
    initial
        Start image ``(batch, set, time, z, y, x)``, in scaled units.
    retained_energy
        Fraction of the calibration data's energy that coil compression kept.
    signal_in_maps
        Fraction of the signal that the coil maps explain, at low resolution.
    support
        Where signal lies, boolean ``(batch, set, 1, z, y, x)``: of metrics and figures, never of the image.
    mixing
        What was done to the coils, complex ``(batch, virtual coil, coil)``: whitening and compression.
    prior
        Expected magnitude of the image at low resolution, positive, ``(batch, set, 1, z, y, x)``: CG-SENSE's penalty
        is weak where it is large (`image_prior`).
    sigma
        Standard deviation of the complex noise of one white sample in units of the scaled image, ``(batch,)``.
    sigma_source
        ``"scan"``: known, from a noise scan, a file or a simulation. ``"estimated"``: from the data themselves.
    """

    k_space: KSpace
    coil_maps: CoilMaps
    scale: Tensor
    initial: Tensor
    retained_energy: float
    signal_in_maps: float = 1.0
    support: Tensor = field(kw_only=True)
    prior: Tensor = field(kw_only=True)
    mixing: Tensor = field(kw_only=True)
    sigma: Tensor = field(kw_only=True)
    sigma_source: Literal["scan", "estimated"] = field(default="scan", kw_only=True)

    def operator(self) -> Sense:
        """The encoding operator of these data."""
        return Sense(self.coil_maps.data, self.k_space.mask, time=self.k_space.data.shape[2])


def prepare(
    k_space: KSpace,
    *,
    calibration: KSpace | None = None,
    coil_maps: CoilMaps | None = None,
    settings: Preparation = Preparation(),
    timeout: float | None = None,
    cancel: threading.Event | None = None,
) -> Prepared:
    """Prepare k-space for reconstruction.

    Data that are not white are whitened first, by the noise that is estimated from them.

    Parameters
    ----------
    k_space
        Without readout oversampling.
    calibration
        Separate calibration data on the same grid, in units of their own; by default the centre of `k_space` itself.
    coil_maps
        Maps of the coils as they are; then neither compression nor estimation takes place.
    settings
        See `Preparation`.
    timeout, cancel
        Of the estimation of the maps, in s, and to stop it from another thread; then it fails with `ToolError`.

    Raises
    ------
    DataError
        If there is no sample, a sample that is not finite, no calibration region for the maps, or little signal where
        the maps are not zero.
    ShapeError
        If given maps or calibration data do not fit the k-space.
    """
    _check(k_space, calibration, coil_maps)
    k_space, calibration, mixing = whitened_by_estimate(k_space, calibration, mix=coil_maps is None)
    source = calibration or k_space
    region = calibration_region(source.mask, source.data.shape)
    retained, eigenvalues = 1.0, None
    if coil_maps is None:
        # Imported here: estimating maps starts a program, which those who bring their own maps do not need.
        from melcore.io.bart import MapSettings, estimate_maps

        # An estimate of the noise is an upper bound: half of it may be all that there is.
        bound = max(source.noise.level) * (0.5 if source.noise.source == "estimated" else 1.0)
        matrix, retained = virtual_coils(source.data, region, bound, settings.coils)
        if len(matrix) < matrix.shape[1]:
            mixing = matrix.to(mixing) @ mixing
            k_space = replace(k_space, data=compress_coils(k_space.data, matrix))
            source = k_space if calibration is None else replace(source, data=compress_coils(source.data, matrix))
        wanted = MapSettings(
            settings.map_method, settings.map_sets, calibration_size=settings.calibration_size, crop=0.0
        )
        estimate = estimate_maps(source, wanted, timeout=timeout, cancel=cancel)
        coil_maps, eigenvalues = estimate.coil_maps, estimate.eigenvalues
        if eigenvalues is not None and settings.map_sets > 1:
            # Where there is one image only, a second would take half of the noise in.
            coil_maps.data[:, 1:] *= (eigenvalues[:, 1:] > settings.map_crop).unsqueeze(2)
    # More would not be blurred: the same of every acceleration.
    blurring = (min(region[0], _BLURRING), min(region[1], _BLURRING), min(region[2], _BLURRING))
    level = torch.tensor(source.noise.level, device=source.data.device)
    blurred, gain = low_resolution_image(source.data, coil_maps.data, blurring)
    if calibration is not None:
        units = units_of_calibration(k_space, source, blurring)
        blurred, level = blurred * units.view(-1, 1, 1, 1, 1, 1), level * units
    support = signal_support(blurred, coil_maps.data, gain * level, eigenvalues, settings.map_crop)
    covered, explained = signal_within(source.data, coil_maps.data, region)
    if covered < _LEAST_COVERED:
        raise DataError(
            f"the coil maps ({coil_maps.source}) are zero where {100 * (1 - covered):.0f} % of the signal is: they "
            "have holes, or belong to another exam; estimate them again."
        )
    scale = scale_within(blurred, support, blurring)
    k_space = replace(k_space, data=k_space.data / scale.view(-1, 1, 1, 1, 1, 1))
    sigma = (torch.tensor(k_space.noise.level, device=scale.device) / scale).to(torch.float32).clamp(min=_LEAST_SIGMA)
    scales = scale.view(-1, 1, 1, 1, 1, 1)
    prior = image_prior(blurred / scales, gain * (level / scale).to(sigma).clamp(min=_LEAST_SIGMA), support)
    initial = start_image(k_space, coil_maps, sigma, settings, prior)
    known: Literal["scan", "estimated"] = "estimated" if k_space.noise.source == "estimated" else "scan"
    return Prepared(
        k_space,
        coil_maps,
        scale,
        initial,
        retained,
        explained,
        support=support,
        prior=prior,
        mixing=mixing,
        sigma=sigma,
        sigma_source=known,
    )


def signal_support(
    image: Tensor, coil_maps: Tensor, noise: Tensor, eigenvalues: Tensor | None, least_eigenvalue: float
) -> Tensor:
    """Where signal lies: where the maps are sure of themselves, and an image of low resolution rises above its noise.

    Parameters
    ----------
    image, noise
        Of `melcore.preprocess.scaling.low_resolution_image`, and the standard deviation of its noise ``(batch,)``.
    coil_maps
        Complex ``(batch, set, coil, 1, z, y, x)``.
    eigenvalues, least_eigenvalue
        Of the maps, ``(batch, set, 1, z, y, x)``, if known.

    Returns
    -------
    Tensor
        Boolean ``(batch, set, 1, z, y, x)``; nowhere empty: without signal, all that the maps cover counts.
    """
    covered = (coil_maps != 0).any(2).expand_as(image)
    bright = image.abs() > _ABOVE_NOISE * noise.view(-1, 1, 1, 1, 1, 1)
    sure = bright if eigenvalues is None else bright & (eigenvalues > least_eigenvalue)
    support = covered & sure
    empty = ~support.flatten(1).any(1).view(-1, 1, 1, 1, 1, 1)
    return torch.where(empty, covered, support)


def image_prior(image: Tensor, noise: Tensor, support: Tensor) -> Tensor:
    """Expected magnitude of an image, from a blurred version of it.

    Air is not blanked but expected to be faint. That keeps noise and aliasing out of it, and with it out of the object:
    at R=2.2 and low noise, CG-SENSE has an error of -38.8 dB in a head with it, -38.6 with maps cut to the head, and
    -32.9 with neither.

    Parameters
    ----------
    image, noise
        Of `melcore.preprocess.scaling.low_resolution_image`, and the standard deviation of its noise ``(batch,)``.
    support
        Boolean ``(batch, set, 1, z, y, x)``.

    Returns
    -------
    Tensor
        Positive, ``(batch, set, 1, z, y, x)``, in units of the image.
    """
    noise_energy = noise.square().view(-1, 1, 1, 1, 1, 1).to(support.device, image.real.dtype)
    energy = (image.abs().square() - noise_energy).clamp(min=0)
    axes = (1, 2, 3, 4, 5)
    mean = (energy * support).sum(axes, keepdim=True) / support.sum(axes, keepdim=True).clamp(min=1) + noise_energy
    return (energy + torch.maximum(noise_energy, _FAINTEST * mean)).sqrt()


def cg_sense_weight(sigma: Tensor, acceleration: float) -> Tensor:
    """Weight of CG-SENSE's quadratic penalty on an image in units of its `image_prior`.

    It is that of start images, of the fallback, of the reference in training's loss, and of evaluation. Without
    acceleration, ``sigma**2`` is the least-squares optimum. With it, more is needed at low noise, where errors of the
    maps count, and little more at high noise.

    Loss in dB against the best weight for each case, in the object, with maps by BART (96x96, 4 anatomies of 8 to 12
    coils: two heads, a measured brain, a heart that fills the field of view; 119 cases)::

        R     sigma .001  .005  .02   .07   .25      mean and largest over the anatomies
        1     .00 .00  .00 .01  .01 .02  .01 .03  .03 .09
        1.5   .02 .09  .05 .09  .04 .07  .10 .24  .08 .13
        2.1   .21 .76  .13 .26  .12 .41  .29 .59  .22 .54
        4     .05 .11  .29 .98  .31 .85  .42 .88  .20 .50
        8     .22 .62  .36 .53  .54 .98  .40 .97  .25 .40

    The median is .05 dB. The largest belong to the anatomies that fill the field of view, whose maps are the least
    certain: one asks for more than this, the other for less.

    Parameters
    ----------
    sigma
        Noise of a sample, see `Prepared`; any shape.
    acceleration
        Samples of the grid for each sample that was taken, at least 1.
    """
    beyond = max(acceleration - 1.0, 0.0)
    return sigma.square() * (1 + 5 * beyond / (1 + 16 * beyond * sigma)).clamp(min=1) + _LEAST_WEIGHT


def cg_sense(
    operator: LinearOperator,
    adjoint_data: Tensor,
    weight: Tensor,
    *,
    prior: Tensor | None = None,
    reference: Tensor | None = None,
    iterations: int = 100,
) -> Tensor:
    """CG-SENSE: the image ``x`` that minimises ``|A x - y|^2 + weight |(x - reference) / prior|^2``.

    Parameters
    ----------
    operator, adjoint_data
        ``A``, and ``A^H y``, ``(batch, set, time, z, y, x)``.
    weight
        ``(batch,)``, positive; see `cg_sense_weight`.
    prior
        `image_prior`; 1 by default.
    reference
        Zero by default; it is also where the iterations begin.
    iterations
        At most; they end where the residual is small enough.
    """
    weight = weight.to(adjoint_data.device).view(-1, *[1] * (adjoint_data.ndim - 1))
    factor = adjoint_data.real.new_ones(()) if prior is None else prior.to(adjoint_data.device)
    rhs = adjoint_data if reference is None else adjoint_data - operator.normal(reference)
    # In units of the prior the penalty is the same everywhere, and the system well conditioned.
    solution = conjugate_gradient(
        lambda v: factor * operator.normal(factor * v) + weight * v,
        factor * rhs,
        relative_tolerance=_CG_TOLERANCE,
        max_iterations=iterations,
    )
    return factor * solution.value if reference is None else reference + factor * solution.value


def start_image(
    k_space: KSpace,
    coil_maps: CoilMaps,
    sigma: Tensor,
    settings: Preparation = Preparation(),
    prior: Tensor | None = None,
) -> Tensor:
    """The image of `cg_sense` that a reconstruction starts from, or falls back to.

    Parameters
    ----------
    k_space, coil_maps
        Scaled data, and their maps.
    sigma
        See `Prepared`.
    settings
        Its weight and iterations; with ``start="time average"``, the average over time is the reference.
    prior
        See `Prepared`.

    Returns
    -------
    Tensor
        Image ``(batch, set, time, z, y, x)``.
    """
    operator = Sense(coil_maps.data, k_space.mask, time=k_space.data.shape[2])
    adjoint_data = operator.adjoint(k_space.data)
    weight = cg_sense_weight(sigma, sampled_fraction(k_space) ** -1)
    if settings.start_weight is not None:
        weight = torch.full_like(sigma, settings.start_weight)
    reference = None
    if settings.start == "time average" and k_space.data.shape[2] > 1:
        reference = time_average(k_space, coil_maps).expand_as(adjoint_data)
    return cg_sense(
        operator, adjoint_data, weight, prior=prior, reference=reference, iterations=settings.start_iterations
    )


def sampled_fraction(k_space: KSpace) -> float:
    """Samples that were taken, of those of the full grid."""
    return float(k_space.mask.float().mean())


def time_average(k_space: KSpace, coil_maps: CoilMaps) -> Tensor:
    """SENSE combination of the k-space averaged over the frames that sampled it, ``(batch, set, 1, z, y, x)``."""
    mask = k_space.mask.expand(-1, -1, k_space.data.shape[2], -1, -1, -1)
    counts = mask.sum(2, keepdim=True)
    averaged = k_space.data.sum(2, keepdim=True) / counts.clamp(min=1)
    return Sense(coil_maps.data, counts > 0).adjoint(averaged)


def _check(k_space: KSpace, calibration: KSpace | None, coil_maps: CoilMaps | None) -> None:
    shape = tuple(k_space.data.shape)
    for name, data in (("k-space", k_space), ("calibration data", calibration)):
        if data is None:
            continue
        if not bool(torch.isfinite(torch.view_as_real(data.data)).all()):
            raise DataError(
                f"the {name} {tuple(data.data.shape)} holds NaN or infinite samples: repair or exclude them."
            )
        if not bool(data.mask.any()) or not bool(data.data.any()):
            raise DataError(f"the {name} {tuple(data.data.shape)} holds no sample that is not zero.")
    if calibration is not None and calibration.data.shape[1] != shape[1]:
        raise ShapeError(
            f"the calibration data have {calibration.data.shape[1]} coils {tuple(calibration.data.shape)} but the "
            f"k-space has {shape[1]} {shape}: take both from the same coils."
        )
    if coil_maps is not None and not bool(torch.isfinite(torch.view_as_real(coil_maps.data)).all()):
        raise DataError(f"the coil maps ({coil_maps.source}) hold NaN or infinity: estimate them again.")
    if coil_maps is not None and coil_maps.data.shape[2] != shape[1]:
        raise ShapeError(
            f"CoilMaps have {coil_maps.data.shape[2]} coils {tuple(coil_maps.data.shape)} but the k-space has "
            f"{shape[1]} {shape}: compress both with the same matrix, or estimate maps after compression."
        )
