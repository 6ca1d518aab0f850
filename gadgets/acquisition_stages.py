"""Stages on single readouts, number for number what Gadgetron's gadgets of the same purpose do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gadgets.header import Header
from gadgets.messages import (
    ACQUISITION_HEADER,
    COUNTERS,
    Acquisition,
    AcquisitionBucket,
    Message,
    Statistics,
    Waveform,
)
from gadgets.settings import Dimension
from melcore.errors import DataError
from melcore.io.mrd_header import NOISE_FILE, WHITENED, user_text
from melcore.io.mrd_types import (
    IS_CALIBRATION,
    IS_CALIBRATION_AND_IMAGING,
    IS_NOISE,
    NOT_IMAGING,
)

_NOISE = 1 << IS_NOISE - 1
_CALIBRATION = 1 << IS_CALIBRATION - 1
_CALIBRATION_AND_IMAGING = 1 << IS_CALIBRATION_AND_IMAGING - 1
# Neither image nor calibration: in a buffer they would overwrite the lines whose counters they share.
_NOT_IMAGING = sum(1 << flag - 1 for flag in NOT_IMAGING)


@dataclass(frozen=True)
class NoSettings:
    """A stage without settings."""


@dataclass(frozen=True)
class TriggerSettings:
    """When a bucket is full, and by what it is split."""

    trigger_dimension: Dimension = Dimension.NONE
    sorting_dimension: Dimension = Dimension.NONE


def noise_adjust(messages: Iterator[Message], header: Header, _settings: NoSettings) -> Iterator[Message]:
    """Whiten by the noise readouts that come before the data, and keep these to itself (NoiseAdjustGadget).

    Without any, readouts pass unchanged, and the header's provenance says so, or how `mel whiten` whitened them before.

    Raises
    ------
    DataError
        If the noise readouts are unusable, or their coils are not those of the data.
    """
    import torch

    from melcore.io.noise_scan import covariance_of
    from melcore.preprocess import whitening

    noise: list[Acquisition] = []
    matrix: torch.Tensor | None = None
    ready = False
    for message in messages:
        if not isinstance(message, Acquisition):
            yield message
            continue
        if int(message.header["flags"]) & _NOISE:
            noise.append(message)
            continue
        if not ready:
            ready = True
            before = user_text(header.document, WHITENED)
            header.provenance["whitening"] = before or "no noise readouts before the data: not whitened"
            if noise:
                covariance, remarks = covariance_of(noise)
                bandwidth = whitening.RELATIVE_BANDWIDTH if header.noise_bandwidth is None else header.noise_bandwidth
                dwell_time = float(message.header["sample_time_us"]) * 1e-6
                matrix = whitening.whitening_matrix(covariance, dwell_time, bandwidth)
                separate = user_text(header.document, NOISE_FILE)
                words = "by the noise scan" + (f" of {separate}" if separate else "")
                header.provenance["whitening"] = "; ".join((words, *remarks, *covariance.remarks))
                header.provenance["noise_condition_number"] = f"{covariance.condition_number:.4g}"
        if matrix is None:
            yield message
            continue
        data = whitening.whiten(_tensor(message), matrix).numpy()
        yield Acquisition(message.header, message.trajectory, data)


def _tensor(message: Acquisition) -> "torch.Tensor":  # type: ignore[name-defined] # noqa: F821
    import torch

    # Views into a receive buffer may be unaligned.
    return torch.from_numpy(np.require(message.data, np.complex64, ["A", "W", "C"]))


def adjust_asymmetric_echo(messages: Iterator[Message], header: Header, _settings: NoSettings) -> Iterator[Message]:
    """Fill asymmetric readouts with zeros to the encoded matrix, the echo at its centre (AsymmetricEchoAdjustROGadget).

    The zeros are marked as discarded samples, so that a mask tells them from measured ones. A readout that ends early
    on both sides lies with its echo at the centre all the same; the server's gadget shifts it to one end.

    Raises
    ------
    DataError
        If a readout does not fit into the encoded matrix around its echo.
    """
    for message in messages:
        if not isinstance(message, Acquisition) or int(message.header["flags"]) & _NOISE:
            yield message
            continue
        old = message.header
        samples, centre, space = (int(old[n]) for n in ("number_of_samples", "center_sample", "encoding_space_ref"))
        encoding = header.encodings[space] if space < len(header.encodings) else header.encodings[0]
        size = encoding.encoded_matrix[0]
        if centre == samples // 2 or samples >= size or not encoding.cartesian:
            yield message
            continue
        start = size // 2 - centre
        if start < 0 or start + samples > size:
            raise DataError(
                f"a readout of {samples} samples with its echo at {centre} does not fit into the encoded matrix of "
                f"{size}: the header's matrix or the readout's center_sample is wrong."
            )
        data = np.zeros((len(message.data), size), np.complex64)
        data[:, start : start + samples] = message.data
        changed = old.copy()
        changed["number_of_samples"], changed["center_sample"] = size, size // 2
        changed["discard_pre"] = start + int(old["discard_pre"])
        changed["discard_post"] = size - start - samples + int(old["discard_post"])
        changed["trajectory_dimensions"] = 0
        yield Acquisition(changed, np.empty((size, 0), np.float32), data)


def remove_readout_oversampling(
    messages: Iterator[Message],
    header: Header,
    _settings: NoSettings,
) -> Iterator[Message]:
    """Keep the middle of the field of view along the readout (RemoveROOversamplingGadget)."""
    from melcore.preprocess.oversampling import remove_readout_oversampling as remove

    ratios = [encoding.encoded_fov[0] / encoding.recon_fov[0] for encoding in header.encodings]
    header.provenance["readout_oversampling"] = f"{ratios[0]:g} removed"
    for message in messages:
        if not isinstance(message, Acquisition):
            yield message
            continue
        white = "not whitened" not in header.provenance.get("whitening", "not whitened")
        old = message.header
        space = int(old["encoding_space_ref"])
        ratio = ratios[space] if space < len(ratios) else ratios[0]
        if ratio == 1 or int(old["flags"]) & _NOISE:
            yield message
            continue
        size = int(int(old["number_of_samples"]) / ratio)
        changed = old.copy()
        changed["number_of_samples"] = size
        for name in ("center_sample", "discard_pre", "discard_post"):
            changed[name] = int(int(old[name]) / ratio)
        # The middle of the field of view is sampled at every ratio-th position of the trajectory.
        positions = np.minimum((np.arange(size) * ratio).astype(int), len(message.trajectory) - 1)
        trajectory = message.trajectory[positions] if message.trajectory.size else np.empty((size, 0), np.float32)
        samples = _tensor(message)
        if not white:
            discarded = int(old["discard_pre"]) + int(old["discard_post"])
            header.air.add(samples[None], size, samples.shape[-1] - discarded)
        yield Acquisition(changed, trajectory, remove(samples, size).numpy())


def accumulate_trigger(messages: Iterator[Message], _header: Header, settings: TriggerSettings) -> Iterator[Message]:
    """Collect readouts, and send buckets whenever the trigger dimension changes, and at the end.

    As AcquisitionAccumulateTriggerGadget; besides its noise readouts and phase corrections, everything else that is
    neither image nor calibration (navigators, feedback, dummies) stays out too.
    """
    buckets: dict[int, list[Acquisition]] = {}
    waveforms: list[Waveform] = []
    previous: int | None = None
    for message in messages:
        if isinstance(message, Waveform):
            waveforms.append(message)
            continue
        if not isinstance(message, Acquisition):
            yield message
            continue
        if int(message.header["flags"]) & _NOT_IMAGING:
            continue
        counters = message.header["idx"]
        if settings.trigger_dimension:
            current = int(counters[settings.trigger_dimension])
            if previous is not None and current != previous:
                yield from _buckets(buckets, waveforms)
            previous = current
        key = int(counters[settings.sorting_dimension]) if settings.sorting_dimension else 0
        buckets.setdefault(key, []).append(message)
    yield from _buckets(buckets, waveforms)


def _buckets(buckets: dict[int, list[Acquisition]], waveforms: list[Waveform]) -> Iterator[AcquisitionBucket]:
    full = [buckets[key] for key in sorted(buckets)]
    buckets.clear()
    while full:
        # Nothing here may hold the readouts on while those downstream work on them, or wait.
        yield _bucket(full.pop(0), waveforms)
        # The waveforms of the time since the last trigger belong to no bucket in particular: the first takes them.
        waveforms.clear()


def _bucket(readouts: list[Acquisition], waveforms: list[Waveform]) -> AcquisitionBucket:
    flags = [int(readout.header["flags"]) for readout in readouts]
    both = _CALIBRATION | _CALIBRATION_AND_IMAGING
    data = [readout for readout, flag in zip(readouts, flags, strict=True) if not flag & _CALIBRATION]
    reference = [readout for readout, flag in zip(readouts, flags, strict=True) if flag & both]
    return AcquisitionBucket(data, reference, _statistics(data), _statistics(reference), tuple(waveforms))


def _statistics(readouts: Sequence[Acquisition]) -> Statistics:
    headers = np.array([readout.header for readout in readouts], ACQUISITION_HEADER)
    spaces = headers["encoding_space_ref"]
    return tuple(
        tuple(np.unique(headers["idx"][name][spaces == space]) for name in COUNTERS)
        for space in range(int(spaces.max()) + 1 if len(spaces) else 0)
    )
