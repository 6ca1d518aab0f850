"""What a simulated exam scans, and how."""

import math
from dataclasses import dataclass

from melcore.errors import ConfigError


@dataclass(frozen=True)
class Protocol:
    """What is scanned, and how.

    Attributes
    ----------
    shape
        ``(z, y, x)`` of the image; x is the readout.
    slices
        False: z is the second phase-encoding direction (3D). True: z counts slices that are scanned one by one (2D).
    time
        Cardiac phases; 1 is a scan of a head, more are a cine of a heart.
    coils
        Number of coils.
    acceleration
        Over phase-encoding positions, calibration included.
    calibration
        Fully sampled centre ``(z, y)``; of 2D scans y alone counts. ``(0, 0)``: none.
    snr
        Of the fully sampled image (`melcore.simulate.acquisition.scale_to_snr`).
    oversampling
        Of the readout.
    noise_scan
        Whether there is one.
    voxel
        Size of a voxel ``(z, y, x)``, in m.
    seed
        Of everything random.
    """

    shape: tuple[int, int, int] = (96, 112, 96)
    slices: bool = False
    time: int = 1
    coils: int = 8
    acceleration: float = 8.0
    calibration: tuple[int, int] = (24, 24)
    snr: float = 30.0
    oversampling: int = 2
    noise_scan: bool = True
    voxel: tuple[float, float, float] = (0.002, 0.002, 0.002)
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1 or max(self.shape[1:]) * self.oversampling > 65535:
            raise ConfigError(f"the shape must be (z, y, x) with sizes of at least 1, but is {self.shape}.")
        if min(self.shape[1:]) < 8:
            raise ConfigError(f"y and x must be at least 8, but the shape (z, y, x) is {self.shape}.")
        if self.time < 1 or self.coils < 1 or self.oversampling < 1:
            raise ConfigError("time, coils and oversampling must be at least 1.")
        if self.seed < 0:
            raise ConfigError(f"the seed must not be negative, but is {self.seed}.")
        if not all(0 < size < math.inf for size in self.voxel):
            raise ConfigError(f"voxel sizes must be positive, but are {self.voxel}.")

    @property
    def volume(self) -> bool:
        """Whether z is phase-encoded."""
        return not self.slices and self.shape[0] > 1

    @property
    def calibrated(self) -> bool:
        """Whether there are calibration lines."""
        return min(self.calibration if self.volume else self.calibration[1:]) > 0
