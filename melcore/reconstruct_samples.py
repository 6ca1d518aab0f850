"""Non-Cartesian samples to an image: gridding, and CG-SENSE with coil maps by BART."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from melcore.data import CoilMaps, Image, Samples
from melcore.errors import ConfigError, DataError
from melcore.physics import NonUniformSense, conjugate_gradient
from melcore.preprocess.compression import coil_compression_matrix, compress_coils
from melcore.preprocess.gridding import calibration_from_samples, sample_density
from melcore.preprocess.preparation import Preparation
from melcore.reconstruct import CONVENTIONAL, Conventional, Reconstruction

# The operator is weighted by the density, so that its normal operator is near the identity whatever the trajectory.
_CG_ITERATIONS, _CG_WEIGHT = 30, 0.02


def reconstruct_samples(
    samples: Samples,
    method: Conventional = "cg-sense",
    *,
    coil_maps: CoilMaps | None = None,
    settings: Preparation | None = None,
) -> Reconstruction:
    """Reconstruct whitened samples of a radial, spiral or other non-Cartesian scan.

    Parameters
    ----------
    samples
        See `melcore.data.Samples`.
    method
        ``"adjoint"``: the density-compensated adjoint (gridding), combined by the coil maps. ``"cg-sense"``: the image
        that fits the samples best, each counted by its density, with a light quadratic penalty.
    coil_maps
        Maps on the encoded matrix, where they are known; else BART estimates them from the centre of k-space, all
        frames taken together.
    settings
        Coils, map sets, map method, calibration size and crop count; the defaults if None.

    Returns
    -------
    Reconstruction
        The image on the encoded matrix, in the units of the whitened samples.

    Raises
    ------
    ConfigError
        If there is no such method for these data.
    DataError
        If samples are not finite or all zero, or the centre of k-space gives no maps.
    MissingDependencyError
        If FINUFFT or BART is not installed.
    """
    if method not in CONVENTIONAL:
        raise ConfigError(f"non-Cartesian data can be reconstructed by {' or '.join(CONVENTIONAL)}, not by {method}.")
    _check(samples)
    settings = settings or Preparation()
    begin = time.perf_counter()
    retained, support = 1.0, None
    if coil_maps is None:
        # Imported here: estimating maps starts a program, which those who bring their own maps do not need.
        from melcore.io.bart import MapSettings, estimate_maps

        if settings.coils is not None and settings.coils < samples.data.shape[1]:
            matrix, retained = coil_compression_matrix(samples.data, settings.coils)
            samples = replace(samples, data=compress_coils(samples.data, matrix))
        calibration = calibration_from_samples(samples, settings.calibration_size or 24)
        wanted = MapSettings(
            settings.map_method, settings.map_sets, calibration_size=settings.calibration_size, crop=0.0
        )
        estimate = estimate_maps(calibration, wanted)
        coil_maps = estimate.coil_maps
        if estimate.eigenvalues is not None:
            support = estimate.eigenvalues > settings.map_crop
            coil_maps.data[:, 1:] *= support[:, 1:].unsqueeze(2)
    density, steps = sample_density(samples)
    root = density.sqrt()
    operator = NonUniformSense(coil_maps.data, samples.trajectory, weights=root, time=samples.data.shape[2])
    weighted = root[:, None] * samples.data
    timings = {"prepare": time.perf_counter() - begin}
    image = operator.adjoint(weighted)
    remarks = []
    if not all(step.converged for step in steps):
        worst = max(step.deviation for step in steps)
        remarks.append(f"the density compensation did not converge (deviation {worst:.2g}): the image may be shaded")
    if method == "cg-sense":
        image = conjugate_gradient(
            lambda v: operator.normal(v) + _CG_WEIGHT * v,
            image,
            relative_tolerance=1e-4,
            max_iterations=_CG_ITERATIONS,
        ).value
    timings["reconstruct"] = time.perf_counter() - begin - timings["prepare"]
    quality = {
        "data_residual": float((operator(image) - weighted).norm() / weighted.norm()),
        "map_support": float(((coil_maps.data != 0).any(2) if support is None else support)[:, 0].float().mean()),
        "readouts": _per_frame(samples.taken),
        "retained_energy": retained,
    }
    if not bool(torch.isfinite(torch.view_as_real(image)).all()):
        raise DataError("the image is not finite: are samples extremely large?")
    timings["total"] = time.perf_counter() - begin
    return Reconstruction(Image(image, samples.info), quality, timings, method, remarks=tuple(remarks))


def _per_frame(taken: Tensor) -> float:
    return float(taken.sum(1).float().mean())


def _check(samples: Samples) -> None:
    if not bool(torch.isfinite(torch.view_as_real(samples.data)).all()):
        raise DataError(f"the samples {tuple(samples.data.shape)} hold NaN or infinity: repair or exclude them.")
    if not bool(samples.data.any()):
        raise DataError(f"the samples {tuple(samples.data.shape)} are all zero: there is nothing to reconstruct.")
