"""Whiten the noise of raw data.

By the noise scan in the file, or in another one, exactly as Gadgetron's NoiseAdjust does. The result holds no noise
readouts, and its header says that it is white. The file is streamed: its size does not matter.

    mel whiten exam.h5 -o white.h5
    mel whiten exam.h5 -o white.h5 --noise noise.h5
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel whiten``."""
    parser.add_argument("raw", type=Path, metavar="RAW.h5", help="ISMRMRD raw file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="WHITE.h5", help="file to write")
    parser.add_argument("--noise", type=Path, metavar="NOISE.h5", help="raw file with the noise scan to whiten by")


def run(arguments: argparse.Namespace) -> None:
    """Whiten and write."""
    from melcore.io.transform import whiten_file

    words = whiten_file(arguments.raw, arguments.output, arguments.noise)
    print(f"{arguments.output}: whitened {words}")
