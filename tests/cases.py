"""What several tests share."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from melcore.io.mrd_types import ACQUISITION_HEADER, Acquisition

_OVERRIDES = {"data": "MEL_DATA", "gadgetron": "MEL_GADGETRON_TRACES"}


def shared(path: str) -> Path:
    """A file of the material for development beside the repository; the test is skipped where it is absent."""
    kind, _, rest = path.partition("/")
    root = os.environ.get(_OVERRIDES.get(kind, ""))
    found = Path(root) / rest if root else Path(__file__).parents[2] / "shared" / path
    if not found.exists():
        pytest.skip(f"{found} is absent (set {_OVERRIDES.get(kind, 'nothing')} to where it is)")
    return found


def header_xml(
    matrix: tuple[int, int, int], coils: int, *, oversampling: int = 2, centre: tuple[int, int] | None = None
) -> str:
    """Header of a Cartesian scan of `matrix` (z, y, x), 2 mm voxels; `centre` is that of the lines (z, y)."""
    z, y, x = matrix
    centre_z, centre_y = centre or (z // 2, y // 2)

    def space(name: str, samples: int) -> str:
        return (
            f"<{name}><matrixSize><x>{samples}</x><y>{y}</y><z>{z}</z></matrixSize><fieldOfView_mm><x>{2 * samples}</x>"
            f"<y>{2 * y}</y><z>{2 * z}</z></fieldOfView_mm></{name}>"
        )

    def limit(step: int, size: int, middle: int) -> str:
        name = f"kspace_encoding_step_{step}"
        return f"<{name}><minimum>0</minimum><maximum>{size - 1}</maximum><center>{middle}</center></{name}>"

    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><acquisitionSystemInformation>'
        f"<systemFieldStrength_T>3</systemFieldStrength_T><receiverChannels>{coils}</receiverChannels>"
        "</acquisitionSystemInformation><experimentalConditions><H1resonanceFrequency_Hz>123000000"
        "</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
        f"{space('encodedSpace', x * oversampling)}{space('reconSpace', x)}<encodingLimits>{limit(1, y, centre_y)}"
        f"{limit(2, z, centre_z)}</encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
    )


def readout(
    data: npt.NDArray[np.complex64], *, flags: Iterable[int] = (), centre: int | None = None, **counters: int
) -> Acquisition:
    """An acquisition of `data` (coil, samples), with flags by their numbers and counters by their names."""
    head = np.zeros((), ACQUISITION_HEADER)
    head["version"], head["flags"] = 1, sum(1 << (flag - 1) for flag in flags)
    head["active_channels"] = head["available_channels"] = data.shape[0]
    head["number_of_samples"] = data.shape[1]
    head["center_sample"] = data.shape[1] // 2 if centre is None else centre
    head["sample_time_us"] = 5
    head["read_dir"], head["phase_dir"], head["slice_dir"] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    for name, value in counters.items():
        head["idx"][name] = value
    return Acquisition(head[()], np.zeros((data.shape[1], 0), np.float32), data.astype(np.complex64))


def random_complex(shape: Sequence[int], seed: int = 0) -> npt.NDArray[np.complex64]:
    """Complex Gaussian numbers of variance 2."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(np.complex64)


def coil_images(coils: int, matrix: tuple[int, int, int]) -> npt.NDArray[np.complex64]:
    """Images (coil, z, y, x) of an ellipsoid with a hole, seen by smooth sensitivities around it."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / max(n / 2, 1) for n in matrix], indexing="ij")
    radius = (x / 0.75) ** 2 + (y / 0.8) ** 2 + (z / 0.9) ** 2
    angles = 2 * np.pi * np.arange(coils) / coils
    image = ((radius < 1) - 0.6 * (((x - 0.2) / 0.25) ** 2 + (y / 0.3) ** 2 < 1)) * np.exp(1j * (x - 0.5 * y * y))
    sensitivities = [
        np.exp(1j * (a + x * np.cos(a)))
        / ((x - 1.4 * np.cos(a)) ** 2 + (y - 1.4 * np.sin(a)) ** 2 + (z - 0.1 * k) ** 2)
        for k, a in enumerate(angles)
    ]
    return (image * np.stack(sensitivities)).astype(np.complex64)


def centred_fft(array: npt.NDArray[Any], axes: Sequence[int]) -> npt.NDArray[np.complex64]:
    """The house's Fourier transform as textbooks write it."""
    shifted = np.fft.ifftshift(array, axes=axes)
    return np.fft.fftshift(np.fft.fftn(shifted, axes=axes, norm="ortho"), axes=axes).astype(np.complex64)
