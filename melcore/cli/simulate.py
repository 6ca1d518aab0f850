"""Simulate an exam and write it as an ISMRMRD file.

A random head (or, with --time, a beating heart) is scanned by simulated coils: noise scan, oversampled readout,
undersampled phase encoding with a fully sampled centre. The true images lie in the same file, in the group "truth".

    mel simulate -o exam.h5
    mel simulate -o cine.h5 --shape 1,128,128 --time 20
    mel simulate -o slices.h5 --shape 12,192,160 --slices
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mel simulate`."""
    parser.add_argument("-o", "--output", required=True, help="ISMRMRD file to write; replaced if it exists")
    parser.add_argument(
        "--shape", type=_sizes(3), default=(96, 112, 96), metavar="Z,Y,X", help="image; x is the readout (96,112,96)"
    )
    parser.add_argument("--slices", action="store_true", help="z counts 2D slices instead of encoding a volume")
    parser.add_argument("--time", type=int, default=1, metavar="T", help="cardiac phases of a cine (1: a head at rest)")
    parser.add_argument("--coils", type=int, default=8, help="number of coils (8)")
    parser.add_argument("--acceleration", type=float, help="calibration included (8; of 2D images 3)")
    parser.add_argument(
        "--calibration",
        type=_sizes(2),
        metavar="Z,Y",
        help="fully sampled centre; 0,0 for none (24,24; of a 2D cine 8 lines)",
    )
    parser.add_argument("--snr", type=float, default=30.0, help="of the fully sampled image (30)")
    parser.add_argument("--oversampling", type=int, default=2, help="of the readout (2)")
    parser.add_argument("--no-noise-scan", action="store_true", help="leave the noise scan out")
    parser.add_argument("--voxel", type=float, default=2.0, metavar="MM", help="size of the cubic voxels (2)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same exam (0)")


def run(arguments: argparse.Namespace) -> None:
    """Simulate and write."""
    from melcore.simulate.exam import write_exam
    from melcore.simulate.protocol import Protocol

    flat = arguments.slices or arguments.shape[0] == 1
    cine = arguments.time > 1
    protocol = Protocol(
        shape=arguments.shape,
        slices=arguments.slices,
        time=arguments.time,
        coils=arguments.coils,
        acceleration=arguments.acceleration or (3.0 if flat and not cine else 8.0),
        calibration=arguments.calibration or ((8, 8) if flat and cine else (24, 24)),
        snr=arguments.snr,
        oversampling=arguments.oversampling,
        noise_scan=not arguments.no_noise_scan,
        voxel=(arguments.voxel * 1e-3,) * 3,
        seed=arguments.seed,
    )
    write_exam(arguments.output, protocol)
    size = "x".join(map(str, arguments.shape))
    kind = "2D slices" if flat else "3D"
    frames = f", {arguments.time} phases" if cine else ""
    print(f"{arguments.output}: {kind} {size}{frames}, {protocol.coils} coils, R = {protocol.acceleration:g}")


class _sizes:  # noqa: N801 (argparse prints this name)
    """Reads ``96,112,96``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, text: str) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in text.split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != self.count or min(sizes) < 0:
            raise argparse.ArgumentTypeError(f"expected {self.count} whole numbers with commas, but got {text!r}")
        return sizes
