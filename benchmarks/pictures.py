"""Every measured scan at hand, reconstructed without a network, as pictures to look at.

Cartesian slices, a spiral, dynamic radial rays, low-field scans of one coil, a volume over time, and
ISMRMRD files: each by the adjoint and by CG-SENSE, with coil maps by BART.

    python benchmarks/pictures.py --data ../shared/data --output pictures
    python benchmarks/pictures.py --data ../shared/data --output pictures --only radial
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from melcore.data import KSpace, Samples, ScanInfo
from melcore.io.cfl import read_cfl
from melcore.io.load import load_k_space
from melcore.layout import k_space_from_bart
from melcore.preprocess.field_of_view import to_recon_matrix
from melcore.reconstruct import CONVENTIONAL, Reconstruction, Reconstructor
from melcore.reconstruct_samples import reconstruct_samples

Scan = KSpace | Samples | tuple[KSpace, KSpace | None]


def scans(data: Path) -> Iterator[tuple[str, Callable[[], Scan]]]:
    """Names, and functions that read."""
    plane = data / "2d_multicoil"
    for name in ("full", "und2x2", "bartworkshop_ksp"):
        yield f"brain {name}", lambda name=name: grid(k_space_from_bart(np.asarray(read_cfl(plane / name))))
    for name in ("brain_ksp_a", "cartesian_ksp"):
        yield f"brain {name}", lambda name=name: grid(np.load(plane / f"{name}.npy")[None, :, None, None])
    yield "spiral", lambda: spiral(plane / "spiral.mat")
    yield "radial", lambda: radial(data / "2dt")
    for file in sorted((data / "lowfield").glob("*kspace.mat")):
        yield f"low field {file.stem}", lambda file=file: low_field(file)
    yield "n15urea volume over time", lambda: over_time(data / "3d" / "n15urea_3D_kspace_VFA.mat")
    for file in sorted((data / "ismrmrd").glob("*.h5")):
        yield f"ismrmrd {file.stem}", lambda file=file: load_k_space(file)


def grid(array: np.ndarray) -> KSpace:  # type: ignore[type-arg]
    """k-space ``(batch, coil, time, z, y, x)``, sampled where it is not zero, its values brought near 1."""
    values = torch.from_numpy(np.ascontiguousarray(array / np.abs(array).max(), np.complex64))
    matrix = (values.shape[3], values.shape[4], values.shape[5])
    return KSpace(values, (values != 0).any(1, keepdim=True), ScanInfo(matrix, matrix))


def spiral(path: Path) -> Samples:
    """60 spirals, 8 coils."""
    file, size = _mat(path), 400
    values = torch.from_numpy(file["data"].transpose(2, 1, 0).copy()).to(torch.complex64)
    trajectory = size * torch.view_as_real(torch.from_numpy(file["k"].T.copy()))
    return _samples(values[None, :, None, None], trajectory[None], size)


def radial(folder: Path) -> Samples:
    """Perfusion of a heart: 7 frames of 30 rays, 3 coils."""
    k_space, places = (np.load(folder / f"scgrog_{name}.npy") for name in ("kspace", "traj"))
    values = torch.from_numpy(k_space.transpose(3, 2, 1, 0).copy()).to(torch.complex64)
    trajectory = 288 * torch.view_as_real(torch.from_numpy(places.transpose(2, 1, 0).copy()))
    return _samples(values[None, :, :, None], trajectory, 288)


def _samples(values: Tensor, trajectory: Tensor, size: int) -> Samples:
    taken = torch.ones(trajectory.shape[:2], dtype=torch.bool)
    return Samples(values, trajectory, taken, ScanInfo((1, size, size), (1, size, size)))


def low_field(path: Path) -> KSpace:
    """Slices of one coil, as a batch."""
    file = _mat(path)
    array = file.get("kspace", file.get("ksp"))
    return grid(array.transpose(2, 0, 1)[:, None, None, None])


def over_time(path: Path) -> KSpace:
    """One coil; ``(y, x, z, time)``: kidneys."""
    return grid(_mat(path)["kspace_pf"].transpose(3, 2, 1, 0)[None, None])


def _mat(path: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    from scipy.io import loadmat

    found: dict[str, np.ndarray] = loadmat(path)  # type: ignore[type-arg]
    return found


def reconstruct(scan: Scan, method: str) -> Reconstruction:
    """By the way that a file of such data takes."""
    if isinstance(scan, Samples):
        return reconstruct_samples(scan, method)  # type: ignore[arg-type]
    k_space, calibration = scan if isinstance(scan, tuple) else (scan, None)
    return Reconstructor(method, "cpu", partial_fourier="pocs")(k_space, None, calibration)


def picture(path: Path, name: str, results: dict[str, Reconstruction]) -> None:
    """One row for each method: up to eight images of its batch, frames or planes; the last with phase."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    stacks = {method: to_recon_matrix(found.image).data[:, 0] for method, found in results.items()}
    count = 1
    for method, stack in stacks.items():
        if stack.shape[-1] == 1:  # a section across the readout
            stack = stack.movedim(-1, 2)
        planes = stack.flatten(0, 2)  # (batch, time, z, y, x)
        chosen = planes[torch.linspace(0, len(planes) - 1, min(8, len(planes))).round().long()]
        stacks[method], count = chosen, len(chosen)
    figure, axes = pyplot.subplots(len(stacks), count + 1, figsize=(3 * (count + 1), 3 * len(stacks)), squeeze=False)
    for row, (method, planes) in zip(axes, stacks.items(), strict=True):
        brightest = float(planes.abs().flatten().quantile(0.995)) if planes.numel() < 1 << 24 else None
        for place, plane in zip(row, planes, strict=False):
            place.imshow(plane.abs(), cmap="gray", vmin=0, vmax=brightest)
        row[count].imshow(planes[-1].angle(), cmap="twilight", vmin=-np.pi, vmax=np.pi)
        row[0].set_title(f"{name}: {method}", fontsize=8, loc="left")
    for place in axes.flat:
        place.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main() -> None:
    """Reconstruct and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured scans")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures; made if it is absent")
    parser.add_argument("--only", default="", help="scans whose name contains this")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, read in scans(arguments.data):
        if arguments.only not in name:
            continue
        scan, results = read(), {}
        for method in CONVENTIONAL:
            begin = time.perf_counter()
            results[method] = reconstruct(scan, method)
            figures = {key: round(value, 4) for key, value in results[method].quality.items()}
            print(f"{name:45} {method:9} {time.perf_counter() - begin:6.1f} s  {figures}", flush=True)
            for words in results[method].image.info.provenance.items():
                if words[0] in ("partial_fourier", "lines", "whitening"):
                    print(f"    {words[0]}: {words[1]}")
        picture(arguments.output / f"{name.replace(' ', '_')}.png", name, results)


if __name__ == "__main__":
    sys.exit(main())
