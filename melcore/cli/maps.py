"""Estimate coil sensitivity maps from raw data with BART.

The input is an ISMRMRD raw file, which is whitened and freed of readout oversampling first, or a k-space in BART's
format. The maps are written in BART's format (NAME.cfl and NAME.hdr), or as a numpy array with the axes
(batch, set, coil, 1, z, y, x).

    mel maps exam.h5 --output maps.cfl
    mel maps kspace.cfl --output maps.npy --sets 2
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second to import, which `mel maps --help` should not
    import torch

    from melcore.data import KSpace


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
    parser.add_argument("--timeout", type=float, help="give up after so many seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of BART (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    """Estimate and write the maps."""
    import numpy as np

    from melcore import layout
    from melcore.errors import ConfigError
    from melcore.io.atomic import replacing
    from melcore.io.bart import estimate_coil_maps, write_cfl

    if arguments.output.suffix not in (".cfl", ".npy"):
        raise ConfigError(f"--output must end in .cfl or .npy, but is {arguments.output}.")
    if not arguments.output.parent.is_dir():
        raise ConfigError(
            f"--output names the folder {arguments.output.parent}, which does not exist: create it first."
        )
    k_space, calibration = _load(arguments.input)
    maps = estimate_coil_maps(
        k_space,
        calibration=calibration,
        method=arguments.method,
        sets=arguments.sets,
        kernel=arguments.kernel,
        calibration_size=arguments.calibration_size,
        crop=arguments.crop,
        timeout=arguments.timeout,
        threads=arguments.threads,
    )
    array = maps.data.numpy()
    if arguments.output.suffix == ".cfl":
        write_cfl(arguments.output, layout.coil_maps_to_bart(array))
    else:
        with replacing(arguments.output) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    print(f"{arguments.output}: {' x '.join(map(str, array.shape))} (batch, set, coil, 1, z, y, x), by {maps.source}")


def _load(path: Path) -> "tuple[torch.Tensor | KSpace, KSpace | None]":
    import numpy as np
    import torch

    from melcore import layout
    from melcore.io.bart import read_cfl
    from melcore.io.load import load_k_space

    if path.suffix in (".cfl", ".hdr"):
        return torch.from_numpy(np.ascontiguousarray(layout.k_space_from_bart(read_cfl(path)))), None
    return load_k_space(path)
