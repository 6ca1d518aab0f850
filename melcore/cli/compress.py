"""Reduce the coils of raw data to fewer virtual ones.

By singular value decomposition of the image lines, or geometrically, with a matrix for each position along the readout,
which keeps more. Whiten first. The file is streamed: its size does not matter.

    mel compress white.h5 -o small.h5 --coils 8
    mel compress white.h5 -o small.h5 --coils 6 --method geometric
    mel compress exam.h5 -o some.h5 --keep 0-5,8
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel compress``."""
    parser.add_argument("raw", type=Path, metavar="RAW.h5", help="ISMRMRD raw file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.h5", help="file to write")
    parser.add_argument("--coils", type=int, metavar="N", help="virtual coils")
    parser.add_argument("--keep", type=_numbers, metavar="0-5,8", help="use these coils only, counted from 0")
    parser.add_argument("--method", choices=("svd", "geometric"), default="svd", help="default: svd")


def run(arguments: argparse.Namespace) -> None:
    """Compress and write."""
    from melcore.errors import ConfigError
    from melcore.io.transform import compress_file

    if arguments.coils is None and arguments.keep is None:
        raise ConfigError("nothing to do: give --coils, --keep, or both.")
    done = compress_file(
        arguments.raw, arguments.output, coils=arguments.coils, keep=arguments.keep, method=arguments.method
    )
    print(f"{arguments.output}: {done.coils} coils to {done.virtual}, {100 * done.energy:.2f} % of the energy kept")


def _numbers(text: str) -> list[int]:
    """Read ``0-5,8``."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected numbers and ranges such as 0-5,8, but got {text!r}")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
