"""Estimate coil sensitivity maps from raw data with BART.

The input is an ISMRMRD raw file, which is whitened and freed of readout oversampling first, or a k-space in BART's
format. Of a radial, spiral or other non-Cartesian file, the samples around the centre are brought to a grid. The maps
are written in BART's format (NAME.cfl and NAME.hdr), or as a numpy array with the axes
(batch, set, coil, 1, z, y, x).

    mel maps exam.h5 --output maps.cfl
    mel maps kspace.cfl --output maps.npy --sets 2
    mel maps exam.h5 -o maps.cfl --noise noise.h5 --eigenvalues trust.cfl --cache ~/.cache/mel
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second to import, which `mel maps --help` should not
    from collections.abc import Callable

    import torch

    from melcore.data import KSpace
    from melcore.layout import Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel maps``."""
    parser.add_argument("input", type=Path, metavar="RAW.h5|KSPACE.cfl", help="what to estimate the maps from")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MAPS.cfl|MAPS.npy", help="file to write")
    parser.add_argument("--method", choices=("espirit", "caldir"), default="espirit", help="default: espirit")
    parser.add_argument("--sets", type=int, default=1, help="map sets; 2 for soft SENSE (default: 1)")
    parser.add_argument("--kernel", type=int, help="ESPIRiT kernel size (default: 6 in 2D, 4 in 3D)")
    parser.add_argument(
        "--calibration-size", type=int, help="use at most so much of the centre (default: 24 in 2D, 20 in 3D)"
    )
    parser.add_argument(
        "--crop", type=float, default=0.8, help="maps are 0 where their eigenvalue is below this (default: 0.8)"
    )
    parser.add_argument(
        "--grid",
        choices=("full", "reduced"),
        help="reduced: estimate on a coarse grid and interpolate (default: reduced for one set)",
    )
    parser.add_argument(
        "--eigenvalues", type=Path, metavar="FILE", help="also write the eigenvalues, near 1 where maps can be trusted"
    )
    parser.add_argument("--noise", type=Path, metavar="NOISE.h5", help="raw file with the noise scan to whiten by")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep BART's answers here for the next time (default: MEL_CACHE, or none)",
    )
    parser.add_argument("--timeout", type=float, help="give up after so many seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of BART (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    """Estimate and write the maps."""
    from melcore import layout
    from melcore.errors import ConfigError
    from melcore.io.bart import MapSettings, estimate_maps

    for option, path in (("--output", arguments.output), ("--eigenvalues", arguments.eigenvalues)):
        if path is None:
            continue
        if path.suffix not in (".cfl", ".npy"):
            raise ConfigError(f"{option} must end in .cfl or .npy, but is {path}.")
        if not path.parent.is_dir():
            raise ConfigError(f"{option} names the folder {path.parent}, which does not exist: create it first.")
    settings = MapSettings(
        arguments.method, arguments.sets, arguments.kernel, arguments.calibration_size, arguments.crop, arguments.grid
    )
    if arguments.eigenvalues is not None and settings.method != "espirit":
        raise ConfigError(f"{settings.method} has no eigenvalues: leave --eigenvalues out, or use espirit.")
    k_space, calibration = _load(arguments.input, arguments.noise, arguments.calibration_size)
    estimate = estimate_maps(
        k_space,
        settings,
        calibration=calibration,
        timeout=arguments.timeout,
        threads=arguments.threads,
        cache=None if arguments.cache is None else arguments.cache.expanduser(),
    )
    maps = estimate.coil_maps
    _write(arguments.output, maps.data, layout.coil_maps_to_bart)
    if arguments.eigenvalues is not None and estimate.eigenvalues is not None:
        _write(arguments.eigenvalues, estimate.eigenvalues, layout.image_to_bart)
    shape = " x ".join(map(str, maps.data.shape))
    print(f"{arguments.output}: {shape} (batch, set, coil, 1, z, y, x), by {maps.source}")


def _write(path: Path, data: "torch.Tensor", to_bart: "Callable[[Array], Array]") -> None:
    import numpy as np

    from melcore.io.atomic import replacing
    from melcore.io.bart import write_cfl

    if path.suffix == ".cfl":
        write_cfl(path, to_bart(data.numpy()))
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, data.numpy())


def _load(path: Path, noise: Path | None, size: int | None) -> "tuple[torch.Tensor | KSpace, KSpace | None]":
    import numpy as np
    import torch

    from melcore import layout
    from melcore.data import KSpace
    from melcore.errors import ConfigError
    from melcore.io.bart import read_cfl
    from melcore.io.load import load_k_space
    from melcore.io.load_samples import load_samples
    from melcore.io.mrd import open_raw
    from melcore.io.mrd_header import is_nonuniform
    from melcore.preprocess.gridding import calibration_from_samples

    if path.suffix in (".cfl", ".hdr"):
        if noise is not None:
            raise ConfigError(
                f"{path} is in BART's format, which --noise cannot whiten: whiten the raw file (mel whiten)."
            )
        return torch.from_numpy(np.ascontiguousarray(layout.k_space_from_bart(read_cfl(path)))), None
    with open_raw(path) as raw:
        nonuniform = is_nonuniform(raw.header)
    if not nonuniform:
        return load_k_space(path, noise=noise, centre=size or 24)
    regions = [calibration_from_samples(one, size or 24) for one in load_samples(path, noise=noise)]
    data = torch.cat([one.data for one in regions])
    return KSpace(data, regions[0].mask, regions[0].info, regions[0].noise), None
