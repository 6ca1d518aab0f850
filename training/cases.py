"""Test cases: a fully sampled exam, sampled again with a stated mask and with noise added on top.

A reconstruction that keeps the sampled noise agrees with a reference that has the same noise, and is flattered. So
noise is added, which makes the reference cleaner than the exam, and how clean it is travels with every case.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from melcore.data import KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, DataError, unknown
from melcore.physics.fourier import ifft
from melcore.preprocess.noise_level import whitened_by_estimate
from melcore.simulate.noise import complex_noise
from training.case_masks import MASKS, draw_mask

MaskKind = Literal["auto", "poisson", "lines", "uniform-lines", "grid", "time-lines"]

_WHITE = math.sqrt(2)  # standard deviation of the complex noise of whitened samples
_MOST_MISSING = 0.02  # of the samples of an exam that counts as fully sampled


@dataclass(frozen=True)
class Exam:
    """What cases are made from.

    Attributes
    ----------
    name, subject
        Exams of one subject are not independent: intervals are drawn over subjects.
    complete
        Fully sampled k-space of one slice, volume or series, ``(1, coil, time, z, y, x)``, its noise white.
    noise
        Standard deviation of the complex noise of a sample of `complete`; 0 where it is simulated without noise.
    taken
        Boolean, broadcastable to `complete` with one coil: what was really measured of it.
    origin
        Where it comes from, for the record.
    """

    name: str
    subject: str
    complete: Tensor
    noise: float
    info: ScanInfo
    taken: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool))
    origin: str = ""

    @property
    def dimensions(self) -> str:
        """``2d``, ``3d``, ``2d+t`` or ``3d+t``."""
        _, _, frames, z, _, _ = self.complete.shape
        return ("3d" if z > 1 else "2d") + ("+t" if frames > 1 else "")

    @property
    def signal(self) -> float:
        """Mean magnitude of the coils' sum of squares where it is above a tenth of its maximum."""
        magnitude = ifft(self.complete).abs().square().sum(1).sqrt()
        return float(magnitude[magnitude > 0.1 * magnitude.max()].mean())

    @property
    def snr(self) -> float:
        """Of the fully sampled image: `signal` over the noise of one part (real or imaginary); maybe infinite."""
        return self.signal / (self.noise / _WHITE) if self.noise > 0 else math.inf


@dataclass(frozen=True)
class Case:
    """One exam to reconstruct, and what it comes from.

    Attributes
    ----------
    k_space
        Undersampled and white.
    complete
        Fully sampled data of the same coils in the same units, cleaner than `k_space` where `reference_noise` is small
        beside the root of 2.
    reference_noise
        Standard deviation of the complex noise of a sample of `complete`.
    acceleration, snr, mask
        As asked for; the SNR of the fully sampled image would be `snr`.
    remarks
        What a reader of its figures should know.
    """

    name: str
    exam: str
    subject: str
    k_space: KSpace
    complete: Tensor
    reference_noise: float
    acceleration: float
    snr: float
    mask: str
    remarks: tuple[str, ...] = ()
    origin: str = ""

    @property
    def dimensions(self) -> str:
        """``2d``, ``3d``, ``2d+t`` or ``3d+t``."""
        _, _, frames, z, _, _ = self.k_space.data.shape
        return ("3d" if z > 1 else "2d") + ("+t" if frames > 1 else "")

    @property
    def digest(self) -> str:
        """Of all that its reconstruction and its figures depend on."""
        digest = hashlib.sha256(repr((self.reference_noise, self.k_space.noise)).encode())
        for tensor in (self.k_space.data, self.k_space.mask, self.complete):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def exam_of(name: str, k_space: KSpace, *, subject: str = "", origin: str = "") -> Exam:
    """Make an exam of fully sampled k-space of one element of the batch; whitened by its own noise if it is not white.

    Raises
    ------
    DataError
        If samples are missing.
    """
    data, mask = k_space.data, k_space.mask
    if data.shape[-1] == 1 and data.shape[-3] > 1:  # a plane of two phase-encoding directions, as BART stores it
        data, mask = (part.movedim(-1, -3) for part in (data, mask))
        matrix = (1, data.shape[-2], data.shape[-1])
        k_space = replace(k_space, data=data, mask=mask, info=replace(k_space.info, recon_matrix=matrix))
    missing = 1 - float(mask.float().mean())
    if missing > _MOST_MISSING:
        raise DataError(
            f"{name}: {missing:.0%} of its k-space {tuple(data.shape)} was not sampled, but a test exam must be fully "
            "sampled: there is no truth to judge by. Leave it out."
        )
    white = whitened_by_estimate(k_space)[0]
    level = white.noise.level[0]
    return Exam(name, subject or name, white.data, level, k_space.info, white.mask, origin)


def make_case(
    exam: Exam,
    *,
    acceleration: float = 1.0,
    snr: float | None = None,
    mask: MaskKind | Tensor = "auto",
    seed: int = 0,
    noise_known: bool = True,
    label: str = "",
) -> Case:
    """Undersample an exam, with noise added.

    Parameters
    ----------
    exam
        Fully sampled.
    acceleration
        Positions of the grid for each that is sampled, calibration included; of `mask` where that is a tensor.
    snr
        Of the fully sampled image; None adds no noise, and the reference then has the noise of the exam.
    mask
        Kind, or the mask itself, six axes.
    seed
        Of masks and noise; every exam, acceleration and SNR draws its own.
    noise_known
        False hides the noise from the reconstruction, which then estimates it.
    label
        What the mask is called where it is given as a tensor.

    Raises
    ------
    ConfigError
        If the exam has less than this SNR, or the mask is impossible.
    """
    if snr is not None and not 0 < snr < exam.snr:
        raise ConfigError(f"{exam.name} has an SNR of {exam.snr:.3g}: noise can only be added, so ask for less.")
    if isinstance(mask, Tensor):
        kind, taken = label or "given", mask
        acceleration = 1 / float(mask.float().mean())
    else:
        kind = _kind(mask, exam)
        taken = draw_mask(kind, tuple(exam.complete.shape), acceleration, _seed(seed, exam.name, kind, acceleration))
    taken = taken & exam.taken
    # In units in which the noise of the case has the standard deviation of whitened data.
    wanted = exam.noise if snr is None else _WHITE * exam.signal / snr
    if wanted <= 0:
        raise ConfigError(f"{exam.name} has no noise of its own: state an SNR.")
    complete, measured = exam.complete / (wanted / _WHITE), exam.complete
    if snr is not None:
        # The same noise for every mask and, scaled, for every SNR: what differs then is what was asked for.
        generator = torch.Generator().manual_seed(_seed(seed, exam.name))
        added = math.sqrt(max(wanted**2 - exam.noise**2, 0.0)) / _WHITE
        measured = measured + added * complex_noise(tuple(measured.shape), generator)
    data = measured / (wanted / _WHITE) * taken
    own = exam.noise / wanted * _WHITE
    remarks = []
    if own > 0.3 * _WHITE:
        remarks.append(
            f"the reference has {own / _WHITE:.0%} of the exam's noise: who keeps the sampled noise is flattered"
        )
    noise = Noise(whitened=True, source="simulated") if noise_known else Noise()
    level = exam.snr if snr is None else snr
    name = f"{exam.name}, {kind} R={acceleration:.3g}, SNR {level:.3g}"
    info = replace(exam.info, provenance={**exam.info.provenance, "sampled_again": name})
    return Case(
        name,
        exam.name,
        exam.subject,
        KSpace(data.contiguous(), taken, info, noise),
        complete,
        own,
        round(acceleration, 3),
        round(level, 3),
        kind,
        tuple(remarks),
        exam.origin,
    )


def _kind(kind: str, exam: Exam) -> str:
    if kind not in MASKS:
        raise unknown("mask", kind, MASKS)
    if kind != "auto":
        return kind
    return "time-lines" if exam.dimensions.endswith("+t") else "poisson" if exam.dimensions == "3d" else "lines"


def _seed(*words: object) -> int:
    return zlib.crc32(repr(words).encode())
