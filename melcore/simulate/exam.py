"""A whole exam as a scanner would write it, in ISMRMRD: header, noise scan, lines; beside them, the truth."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.io.atomic import replacing
from melcore.io.images import ImageSeries, write_images
from melcore.io.mrd import ACQUISITION_HEADER, IMAGE_HEADER, Acquisition, write_raw
from melcore.physics.fourier import fft
from melcore.preprocess.masks import poisson_disc, random_lines, variable_density_kt
from melcore.preprocess.whitening import RELATIVE_BANDWIDTH, NoiseCovariance, whitening_matrix
from melcore.simulate import mrd_text
from melcore.simulate.acquisition import scale_to_snr
from melcore.simulate.coils import coil_maps
from melcore.simulate.heart import random_cine
from melcore.simulate.noise import correlated_noise, random_noise_covariance
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.protocol import Protocol

#: Name of the group of the file that holds the true images, in the units of the whitened k-space.
TRUTH = "truth"

_NOISE_SAMPLES = 8192
_NOISE_DWELL, _IMAGE_DWELL = 2.5e-6, 4e-6
_UNIT = 1e-6  # standard deviation of the noise scan: raw data are small numbers on most scanners
_TICK = 2.5e-3  # of the time stamps

# Directions of an oblique scan; the position is that of the isocentre plus a little.
_READ, _PHASE, _SLICE = (0.0, 0.0, -1.0), (0.1736482, 0.9848078, 0.0), (0.9848078, -0.1736482, 0.0)
_POSITION = np.array([5.0, -12.0, 30.0])  # mm

# Bits of flags, counted from 0 (`melcore.io.mrd_types` has the standard's numbers, which start at 1).
_FIRST_IN_SLICE, _LAST_IN_SLICE, _FIRST_IN_PHASE, _LAST_IN_PHASE = 1 << 6, 1 << 7, 1 << 10, 1 << 11
_FIRST_IN_REPETITION, _LAST_IN_REPETITION = 1 << 12, 1 << 13
_NOISE, _CALIBRATION_AND_IMAGING, _LAST_IN_MEASUREMENT = 1 << 18, 1 << 20, 1 << 24


def write_exam(path: str | os.PathLike[str], protocol: Protocol | None = None) -> None:
    """Simulate an exam and write it; complete, or not at all.

    The file holds the raw data in ``dataset`` and the true complex images in the group `TRUTH`: what a
    fully sampled, noise-free scan would give after whitening, with maps of unit sum of squares.

    Parameters
    ----------
    path
        Replaced if it exists.
    protocol
        By default the exam of ``make demo``: 3D, 8 coils, 8-fold Poisson-disc sampling.

    Raises
    ------
    ConfigError
        If the acceleration cannot be reached with this calibration region, or a setting is wrong.
    DataError
        If the file cannot be written.
    """
    protocol = protocol or Protocol()
    mask = _draw_mask(protocol)  # first: it refuses what cannot be
    header = mrd_text.header(protocol)
    image = _draw_image(protocol)
    covariance = _UNIT**2 * random_noise_covariance(protocol.coils, seed=protocol.seed + 3)
    white = whitening_matrix(NoiseCovariance(covariance, _NOISE_DWELL, _NOISE_SAMPLES), _IMAGE_DWELL)
    maps = coil_maps(protocol.shape, protocol.coils, seed=protocol.seed + 2)
    # In the whitened data the coils have other weights: this is the image for maps of unit sum of squares.
    weight = torch.tensordot(white, maps, 1).abs().square().sum(0).sqrt()
    truth = scale_to_snr(image * weight, protocol.snr)
    image = truth / weight
    if not protocol.noise_scan:
        # Nobody will whiten: the sum of squares of the maps themselves is 1.
        truth = image
    with replacing(path) as temporary:
        write_raw(temporary, header, _acquisitions(protocol, image, maps, mask, covariance))
        write_images(temporary, TRUTH, header, [_truth_series(protocol, truth)], append=True)


def _draw_image(protocol: Protocol) -> Tensor:
    """Complex ``(time, z, y, x)``."""
    if protocol.time > 1:
        return random_cine((protocol.time, *protocol.shape), seed=protocol.seed)
    return random_anatomy(protocol.shape, seed=protocol.seed).unsqueeze(0)


def _draw_mask(protocol: Protocol) -> npt.NDArray[np.bool_]:
    """Boolean ``(time, z, y)``."""
    z, y, _ = protocol.shape
    if protocol.volume:
        frames = [
            poisson_disc(
                (z, y), protocol.acceleration, calibration=protocol.calibration, seed=protocol.seed + 1 + 1000 * frame
            )
            for frame in range(protocol.time)
        ]
        return torch.stack(frames).numpy()
    lines = protocol.calibration[1]
    if protocol.time > 1:
        mask = variable_density_kt(protocol.time, y, protocol.acceleration, lines, seed=protocol.seed + 1)
    else:
        mask = random_lines(y, protocol.acceleration, lines, seed=protocol.seed + 1).unsqueeze(0)
    return np.repeat(mask.numpy()[:, None], z, axis=1)


def _acquisitions(
    protocol: Protocol, image: Tensor, maps: Tensor, mask: npt.NDArray[np.bool_], covariance: Tensor
) -> Iterator[Acquisition]:
    generator = torch.Generator().manual_seed(protocol.seed + 4)
    if protocol.noise_scan:
        noise = correlated_noise((protocol.coils, _NOISE_SAMPLES), covariance, generator)
        head = _acquisition_header(protocol, _NOISE_SAMPLES, _NOISE_DWELL, _POSITION)
        head["flags"] = _NOISE
        yield _acquisition(head, noise)
    # The receiver of the image is slower than that of the noise scan, and sees less noise.
    seen = covariance * (_NOISE_DWELL / _IMAGE_DWELL / RELATIVE_BANDWIDTH)
    order = _scan_order(protocol, mask)
    calibration = _calibration_lines(protocol)
    current, k_space = (-1, -1), maps[:0]
    for number, (time, z, y) in enumerate(order):
        if current != (time, 0 if protocol.volume else z):
            current = time, 0 if protocol.volume else z
            k_space = _k_space(protocol, image[time], maps, None if protocol.volume else z)
        line = k_space[:, z if protocol.volume else 0, y]
        readout = line.shape[-1]
        position = _POSITION if protocol.volume else _slice_position(protocol, z)
        head = _acquisition_header(protocol, readout, _IMAGE_DWELL, position)
        head["center_sample"] = readout // 2
        head["scan_counter"] = number + 1
        head["acquisition_time_stamp"] += round((0.1 + number * mrd_text.REPETITION_TIME) / _TICK)
        head["physiology_time_stamp"][0] = round(time * mrd_text.CYCLE / protocol.time / _TICK)
        head["idx"]["kspace_encode_step_1"] = y
        head["idx"]["kspace_encode_step_2"] = z if protocol.volume else 0
        head["idx"]["slice"] = 0 if protocol.volume else z
        head["idx"]["phase"] = time
        head["flags"] = _flags(order, number, protocol) | (_CALIBRATION_AND_IMAGING if calibration[z, y] else 0)
        yield _acquisition(head, line + correlated_noise(tuple(line.shape), seen, generator))


def _k_space(protocol: Protocol, frame: Tensor, maps: Tensor, z: int | None) -> Tensor:
    """Noise-free k-space ``(coil, z, y, x)`` of one frame, or of its slice `z`, with the readout oversampled."""
    if z is not None:
        frame, maps = frame[z : z + 1], maps[:, z : z + 1]
    coil_images = maps * frame
    size = protocol.shape[2]
    padded = coil_images.new_zeros(*coil_images.shape[:-1], size * protocol.oversampling)
    start = padded.shape[-1] // 2 - size // 2
    padded[..., start : start + size] = coil_images
    return fft(padded)


def _scan_order(protocol: Protocol, mask: npt.NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """``(time, z, y)`` of all lines in the order of their acquisition; slices are interleaved."""
    z_order = list(range(protocol.shape[0]))
    if not protocol.volume:
        z_order = z_order[::2] + z_order[1::2]
        return [(t, z, int(y)) for z in z_order for t in range(protocol.time) for y in np.flatnonzero(mask[t, z])]
    return [(t, z, int(y)) for t in range(protocol.time) for z in z_order for y in np.flatnonzero(mask[t, z])]


def _calibration_lines(protocol: Protocol) -> npt.NDArray[np.bool_]:
    """Boolean ``(z, y)``; of 2D scans, every slice has the central lines."""
    z, y, _ = protocol.shape
    lines = np.zeros((z, y), bool)
    if protocol.calibrated:
        size_z, size_y = min(protocol.calibration[0], z) if protocol.volume else z, min(protocol.calibration[1], y)
        top, left = z // 2 - size_z // 2, y // 2 - size_y // 2
        lines[top : top + size_z, left : left + size_y] = True
    return lines


def _flags(order: list[tuple[int, int, int]], number: int, protocol: Protocol) -> int:
    def changes(one: int, other: int) -> tuple[bool, bool]:
        if not 0 <= other < len(order):
            return True, True
        (time, z, _), (other_time, other_z, _) = order[one], order[other]
        return not protocol.volume and z != other_z, time != other_time

    flags = 0
    new_slice, new_phase = changes(number, number - 1)
    end_slice, end_phase = changes(number, number + 1)
    flags |= _FIRST_IN_SLICE * new_slice | _LAST_IN_SLICE * end_slice
    if protocol.time > 1:
        flags |= _FIRST_IN_PHASE * (new_phase or new_slice) | _LAST_IN_PHASE * (end_phase or end_slice)
    flags |= _FIRST_IN_REPETITION * (number == 0)
    return flags | (_LAST_IN_REPETITION | _LAST_IN_MEASUREMENT) * (number == len(order) - 1)


def _acquisition_header(protocol: Protocol, samples: int, dwell: float, position: npt.NDArray[np.float64]) -> Any:
    head: Any = np.zeros((), ACQUISITION_HEADER)
    head["version"] = 1
    head["measurement_uid"] = protocol.seed % 2**32
    head["acquisition_time_stamp"] = 14 * 3600 * 400  # two o'clock, in ticks
    head["number_of_samples"] = samples
    head["available_channels"] = head["active_channels"] = protocol.coils
    head["channel_mask"][: -(-protocol.coils // 64)] = 2**64 - 1
    head["channel_mask"][protocol.coils // 64] = (1 << protocol.coils % 64) - 1
    head["sample_time_us"] = dwell * 1e6
    head["position"], head["read_dir"], head["phase_dir"], head["slice_dir"] = position, _READ, _PHASE, _SLICE
    return head


def _acquisition(head: Any, data: Tensor) -> Acquisition:
    trajectory = np.zeros((data.shape[-1], 0), np.float32)
    return Acquisition(head[()], trajectory, data.to(torch.complex64).contiguous().numpy())


def _slice_position(protocol: Protocol, z: int) -> npt.NDArray[np.float64]:
    distance = 1.2 * 1e3 * protocol.voxel[0] * (z - (protocol.shape[0] - 1) / 2)  # with a gap of a fifth
    return _POSITION + distance * np.array(_SLICE)


def _truth_series(protocol: Protocol, truth: Tensor) -> ImageSeries:
    """One complex image for each phase, and for each slice of 2D scans."""
    time, z = truth.shape[:2]
    depth = z if protocol.volume else 1
    data = truth.reshape(time * (z // depth), 1, depth, *truth.shape[2:]).numpy()
    headers = np.zeros(len(data), IMAGE_HEADER)
    headers["version"] = 1
    headers["measurement_uid"] = protocol.seed % 2**32
    sizes = (protocol.shape[2], protocol.shape[1], depth)
    headers["field_of_view"] = np.array(sizes) * np.array(protocol.voxel[::-1]) * 1e3
    headers["read_dir"], headers["phase_dir"], headers["slice_dir"] = _READ, _PHASE, _SLICE
    for index, head in enumerate(headers):
        head["phase"], head["slice"] = divmod(index, z // depth)
        head["position"] = _POSITION if protocol.volume else _slice_position(protocol, int(head["slice"]))
        head["image_index"] = index + 1
    headers["image_type"] = 5  # complex
    return ImageSeries(headers, data)
