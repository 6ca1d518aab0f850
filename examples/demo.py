"""The main job, end to end: an exam, a streaming chain, images, and how good they are.

    python examples/demo.py                      an exam is simulated, 3D, 8 coils, eightfold undersampled
    python examples/demo.py --raw exam.h5        a real file, without truth to compare with

Each step is a `mel` command that can be typed as well; they are printed as they run.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from melcore.cli import main as mel
from melcore.errors import MelError
from melcore.io.images import read_images
from melcore.learning.metrics import nrmse, psnr, ssim

METHODS = {"zero-filled": "adjoint", "CG-SENSE": "cg-sense", "learned": None}  # None: the bundle for these data
Volume = npt.NDArray[np.float32]


def run(*command: str) -> None:
    """Run a `mel` command in this process; stop where it fails."""
    print(f"$ mel {shlex.join(command)}", flush=True)
    if code := mel(command):
        sys.exit(code)


def magnitude(path: Path, group: str | None = None) -> Volume:
    """Magnitude images of the first series of a file, ``(image, z, y, x)``."""
    data = read_images(path, group)[0].data
    return np.sqrt((np.abs(data) ** 2).sum(1)).astype(np.float32)


def figures(image: Volume, truth: Volume) -> tuple[Volume, dict[str, float]]:
    """Scale an image to the truth by least squares, and compare the two where the object is.

    Only magnitudes are compared: scale and phase of an image follow from the receivers, not from the object.
    """
    scaled = image * ((image * truth).sum() / (image**2).sum())
    a, b = (torch.from_numpy(volume)[None, None] for volume in (scaled, truth))
    support = b > 0.02 * b.max()
    dimensions = 3 if truth.shape[1] > 1 else 2
    return scaled, {
        "NRMSE": float(nrmse(a, b, support)),
        "PSNR": float(psnr(a, b, support)),
        "SSIM": float(ssim(a, b, support, dimensions=dimensions)),
    }


def draw(path: Path, images: dict[str, Volume], numbers: dict[str, dict[str, float]]) -> None:
    """One PNG: a slice of each image, and below it three times its difference from the truth, if there is one."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(images)
    truth = images[names[0]] if numbers else None
    planes = {name: _planes(volume) for name, volume in images.items()}
    rows = len(planes[names[0]]) * (2 if truth is not None else 1)
    figure, axes = plt.subplots(rows, len(names), figsize=(3 * len(names), 3 * rows), squeeze=False)
    top = float(np.percentile(images[names[0]], 99.8))
    for column, name in enumerate(names):
        text = "".join(f"\n{key} {value:.3f}" for key, value in numbers.get(name, {}).items())
        axes[0][column].set_title(name + text, fontsize=9)
        for index, plane in enumerate(planes[name]):
            row = index * (2 if truth is not None else 1)
            axes[row][column].imshow(plane, cmap="gray", vmin=0, vmax=top if truth is not None else None)
            if truth is not None and column:
                difference = 3 * np.abs(plane - planes[names[0]][index])
                axes[row + 1][column].imshow(difference, cmap="gray", vmin=0, vmax=top)
                axes[row + 1][column].set_title("difference x 3", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _planes(volume: Volume) -> list[Volume]:
    """Central planes of the first image: the in-plane one, and for a volume the one through the readout."""
    first = volume[len(volume) // 2]
    z, _, x = first.shape
    return [first[z // 2]] if z == 1 else [first[z // 2], first[:, :, x // 2]]


def main() -> int:
    """Run the demonstration; the exit code is that of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="ISMRMRD file to reconstruct instead of a simulated exam")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything that is made")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    raw = arguments.raw
    if raw is None:
        raw = output / "exam.h5"
        run("simulate", "-o", str(raw))
    run("info", str(raw))
    images: dict[str, Volume] = {}
    numbers: dict[str, dict[str, float]] = {}
    if arguments.raw is None:
        images["truth"] = magnitude(raw, "truth")
    for name, model in METHODS.items():
        path = output / f"{name.lower()}.h5"
        run("recon", str(raw), "-o", str(path), *(["--model", model] if model else []))
        images[name] = magnitude(path)
        if "truth" in images:
            images[name], numbers[name] = figures(images[name], images["truth"])
    try:
        draw(output / "demo.png", images, numbers)
    except MelError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if numbers:
        print(f"\n{'':12s} {'NRMSE':>8s} {'PSNR/dB':>8s} {'SSIM':>8s}   (magnitudes, where the object is)")
        for name, values in numbers.items():
            print(f"{name:12s} {values['NRMSE']:8.4f} {values['PSNR']:8.2f} {values['SSIM']:8.4f}")
    print(f"\n{output / 'demo.png'} shows them; everything is in {output}/ ({time.perf_counter() - begin:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
