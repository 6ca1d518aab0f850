"""Image quality of the bundles that ship, beside conventional methods tuned on the very data that they are judged on.

For every scan: zero-filled, CG-SENSE (best of several weights), BART's pics (best of several weights, for each
regulariser), and the learned reconstruction, all with the same maps and scale, judged in the support of the maps
against the same truth. Writes figures to RESULTS and, with --pictures, one PNG for each scan.

Example:
  python benchmarks/quality.py --data ../shared/data --output benchmarks/results/quality.json --pictures /tmp/quality
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_scans import RealScan, beating_heart, head, measured_brains
from melcore import layout
from melcore.bundle import Bundle
from melcore.io import bart
from training.data import Example
from training.problem import Problem, place
from training.validation import cg_sense, judge, learned, zero_filled

CG_WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1)
CG_ITERATIONS = (3, 5, 8, 12, 20)
PICS_WEIGHTS = (0.003, 0.006, 0.012, 0.024)
Best = tuple[str, Tensor, dict[str, float]]


def scans(data: Path) -> Iterator[tuple[str, RealScan]]:
    """Name of the bundle, and what it is tried on."""
    yield from (("primal_dual_2d", scan) for scan in measured_brains(data))
    yield from (
        ("primal_dual_3d", head(data, acceleration, name)) for name in ("chris_t1", "spm152") for acceleration in (4, 8)
    )
    yield from (("primal_dual_2dt", beating_heart(data, acceleration)) for acceleration in (4, 8, 12))


def best(candidates: Sequence[tuple[str, Callable[[], Tensor]]], truth: Example | Problem) -> Best:
    """The candidate of the lowest NRMSE: its name, image and figures."""
    tried = []
    for name, reconstruct in candidates:
        image = reconstruct()
        tried.append((name, image, judge(image, truth)))
    return min(tried, key=lambda entry: entry[2]["nrmse_db"])


def best_cg_sense(
    problem: Problem, weights: Sequence[float] = CG_WEIGHTS, iterations: Sequence[int] = CG_ITERATIONS
) -> Best:
    """CG-SENSE with the best weight, or with the best number of iterations at a negligible weight."""
    candidates = [(f"weight {w:g}", lambda w=w: cg_sense(problem, 40, w)) for w in weights]
    candidates += [(f"{n} iterations", lambda n=n: cg_sense(problem, n, 1e-5)) for n in iterations]
    return best(candidates, problem)


def pics(example: Example, regularisers: Sequence[str], iterations: int = 100) -> Tensor:
    """BART's pics with the example's maps."""
    prepared = example.prepared
    k_space = layout.k_space_to_bart(prepared.k_space.data.numpy())
    maps = layout.coil_maps_to_bart(prepared.coil_maps.data.numpy())
    options = [part for regulariser in regularisers for part in ("-R", regulariser)]
    (result,) = bart.run(["pics", "-S", "-w1", f"-i{iterations}", *options], [k_space, maps])
    image = torch.from_numpy(np.ascontiguousarray(layout.image_from_bart(result)))
    # Where half the size of an axis is odd, BART's Fourier transform has the opposite sign.
    return image if float((image.conj() * prepared.initial).sum().real) > 0 else -image


def best_pics(example: Example, kinds: Sequence[str], weights: Sequence[float] = PICS_WEIGHTS) -> Best:
    """The best weight of the regularisers `kinds`, such as ``("W:3:0",)``; further ones get a fifth of the weight."""
    candidates = []
    for weight in weights:
        regularisers = [f"{kind}:{weight if index == 0 else weight / 5:g}" for index, kind in enumerate(kinds)]
        candidates.append((" ".join(regularisers), lambda r=regularisers: pics(example, r)))
    return best(candidates, example)


def compare(bundle: Bundle, scan: RealScan) -> tuple[Example, dict[str, Best]]:
    """All methods on one scan."""
    example = scan.example(bundle.preparation)
    problem = place(example)
    with torch.no_grad():
        image = learned(bundle.model)(problem)
        methods = {
            "zero-filled": best([("", lambda: zero_filled(problem))], problem),
            "CG-SENSE": best_cg_sense(problem),
        }
    if example.truth.shape[2] > 1:
        methods["pics temporal TV + wavelet"] = best_pics(example, ["T:1024:0", "W:3:0"], (0.01, 0.02, 0.04))
    else:
        space = 7 if example.truth.shape[3] > 1 else 3
        methods["pics wavelet"] = best_pics(example, [f"W:{space}:0"])
        methods["pics TV"] = best_pics(example, [f"T:{space}:0"])
    methods["learned"] = (bundle.digest, image, judge(image, example))
    return example, methods


def draw(path: Path, example: Example, methods: dict[str, Best], title: str) -> None:
    """Middle slices: images above, errors (times 5) below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def middle(image: Tensor) -> Tensor:
        frame = image[0, 0, image.shape[2] // 3].abs()
        return frame[frame.shape[0] // 2]

    images = {"truth": example.truth, **{name: image for name, (_, image, _) in methods.items()}}
    figure, axes = plt.subplots(2, len(images), figsize=(2.6 * len(images), 6), squeeze=False)
    top = float(middle(example.truth).flatten().quantile(0.995))
    for column, (name, image) in enumerate(images.items()):
        error = middle((image - example.truth).abs() * example.support)
        axes[0, column].imshow(middle(image * example.support), cmap="gray", vmin=0, vmax=top)
        axes[1, column].imshow(error, cmap="magma", vmin=0, vmax=top / 5)
        label = (
            "" if name == "truth" else f"\n{methods[name][2]['nrmse_db']:.1f} dB, SSIM {methods[name][2]['ssim']:.3f}"
        )
        axes[0, column].set_title(name + label, fontsize=8)
        for axis in axes[:, column]:
            axis.axis("off")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--pictures", type=Path, help="folder for PNGs")
    parser.add_argument("--only", default="", help="scans whose bundle or name contains this text")
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    for name, scan in scans(arguments.data):
        if arguments.only not in f"{name} {scan.name}":
            continue
        begin, bundle = time.perf_counter(), Bundle.load(name)
        example, methods = compare(bundle, scan)
        print(f"{scan.name} ({name}, {time.perf_counter() - begin:.0f} s)")
        for method, (setting, _, figures) in methods.items():
            nrmse, psnr, ssim = figures["nrmse_db"], figures["psnr_db"], figures["ssim"]
            print(f"  {method:28}{nrmse:8.2f} dB  PSNR {psnr:6.2f}  SSIM {ssim:.4f}  {setting}")
        results[scan.name] = {
            "bundle": f"{name}@{bundle.digest}",
            "methods": {
                m: {**{k: round(v, 4) for k, v in f.items()}, "setting": s} for m, (s, _, f) in methods.items()
            },
        }
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            draw(
                arguments.pictures / f"{scan.name.replace(' ', '_').replace(',', '')}.png", example, methods, scan.name
            )
    about = {
        "command": "python benchmarks/quality.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
        "versions": {"torch": torch.__version__, "bart": bart.version(), "python": platform.python_version()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # Scans are slow: those judged before, with --only, stay in the file.
    before = json.loads(arguments.output.read_text())["scans"] if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps({**about, "scans": {**before, **results}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
