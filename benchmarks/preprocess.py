"""From raw data to an image, stage by stage: time and memory, against BART doing the same in the same run.

Stages: read the file (against a loop of `read_acquisition`), whiten, compress the coils, estimate maps, adjoint,
CG-SENSE. One core for both sides, in turn and, where it is quick, several times, of which the fastest counts. Data are
simulated; BART's side works on files in memory (/dev/shm) that are written before its clock starts, and its start-up
counts. Memory is what is needed beyond the stage's input and output.

With --data, also: maps of the reduced grid against those of the full one on measured and real scans, by CG-SENSE and by
the bundles that ship.

    python benchmarks/preprocess.py --small
    python benchmarks/preprocess.py --data ../shared/data --output benchmarks/results/preprocess.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melcore import layout
from melcore.data import KSpace, ScanInfo
from melcore.io.bart import MapSettings, estimate_maps, executable, read_cfl, scratch_folder, version, write_cfl
from melcore.io.mrd import Acquisition, open_raw, write_raw
from melcore.io.mrd_types import ACQUISITION_HEADER
from melcore.physics import Sense, conjugate_gradient
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.compression import coil_compression_matrix, compress_coils
from melcore.preprocess.masks import k_space_mask, poisson_disc, variable_density_kt
from melcore.preprocess.whitening import noise_covariance, whiten, whitening_matrix
from melcore.simulate import mrd_text
from melcore.simulate.coils import coil_maps
from melcore.simulate.heart import random_cine
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.protocol import Protocol

# Matrix (z, y, x), frames, coils, virtual coils.
CASES = {
    "2D 256x256x32": ((1, 256, 256), 1, 32, 12),
    "3D 256x256x160x12": ((160, 256, 256), 1, 12, 8),
    "cine 192x192x30x20": ((1, 192, 192), 30, 20, 10),
}
SMALL = {"2D 96x96x12": ((1, 96, 96), 1, 12, 6), "3D 64x60x56x6": ((56, 60, 64), 1, 6, 4)}
_ITERATIONS, _WEIGHT = 10, 0.01
_REPEATS, _ENOUGH_S = 3, 20.0  # of a stage, as long as all of them together take less than that


class Peak:
    """Highest resident memory of a process while the block runs, in MiB, above what it had before."""

    def __init__(self, process: int | None = None) -> None:
        self.process, self.mebibytes, self._done = process or os.getpid(), 0.0, threading.Event()

    def __enter__(self) -> "Peak":
        self._before = 0.0 if self.process != os.getpid() else self._resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.mebibytes = max(self.mebibytes, self._resident() - self._before)

    def _resident(self) -> float:
        """Of the process and of the programs that it has started."""
        total = 0
        try:
            root = Path(f"/proc/{self.process}")
            children = [
                Path("/proc") / child for file in root.glob("task/*/children") for child in file.read_text().split()
            ]
            # Between its birth and its own program, a child shows the memory of its parent.
            program = (root / "exe").readlink()
            children = [child for child in children if (child / "exe").readlink() != program]
            for one in (root, *children):
                total += int((one / "statm").read_text().split()[1])
        except (OSError, IndexError):
            pass  # it has just ended
        return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(stage: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Time (wall and processor, children included) and memory of a call; and its result."""
    before, wall = _processor(), time.perf_counter()
    with Peak() as peak:
        result = stage()
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": _processor() - before}
    return {**seconds, "mib": peak.mebibytes}, result


def _processor() -> float:
    return sum(os.times()[:4])


def barts(folder: Path, *command: str) -> dict[str, float]:
    """The same of a command of BART."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    before, wall = _processor(), time.perf_counter()
    process = subprocess.Popen(
        [executable(), *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    with Peak(process.pid) as peak:
        code = process.wait()
    if code:
        raise SystemExit(f"bart {' '.join(command)} failed ({code})")
    return {"wall_s": time.perf_counter() - wall, "cpu_s": _processor() - before, "mib": peak.mebibytes}


def simulate(
    matrix: tuple[int, int, int], frames: int, coils: int
) -> tuple[KSpace, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undersampled noisy k-space with correlated noise, its noise scan ``(coil, samples)``, true maps and image."""
    if frames > 1:
        image = random_cine((frames, *matrix), seed=1).reshape(1, 1, frames, *matrix)
        mask = k_space_mask(variable_density_kt(frames, matrix[1], 6, 24, seed=1), ("time", "y"))
    else:
        image = random_anatomy(matrix, seed=1).reshape(1, 1, 1, *matrix)
        mask = k_space_mask(
            poisson_disc(matrix[:2] if matrix[0] > 1 else matrix[1:], 4, calibration=(24, 24), seed=1),
            ("z", "y") if matrix[0] > 1 else ("y", "x"),
        )
    maps = coil_maps(matrix, coils, seed=1).reshape(1, coils, 1, *matrix)
    data = torch.cat([fft(maps[:, coil : coil + 1] * image) * mask for coil in range(coils)], dim=1)
    generator = torch.Generator().manual_seed(1)
    level = 0.02 * float(image.abs().max())
    mixing = torch.eye(coils) + 0.2 * torch.randn(coils, coils, generator=generator, dtype=torch.complex64)
    for frame in range(frames):  # frame by frame, so that the noise of a volume does not exist twice
        noise = torch.randn(coils, *matrix, generator=generator, dtype=torch.complex64)
        data[0, :, frame] += (
            level * (mixing @ noise.flatten(1)).view_as(noise) * mask[0, :, min(frame, mask.shape[2] - 1)]
        )
    scan = level * mixing @ torch.randn(coils, 8192, generator=generator, dtype=torch.complex64)
    return KSpace(data, mask, ScanInfo(matrix, matrix)), scan, maps, image


def reading(k_space: KSpace, folder: Path) -> dict[str, Any]:
    """Read a file of the sampled lines, and read it as the `ismrmrd` package does, line by line."""
    path = folder / "exam.h5"
    data = k_space.data.numpy()[0]
    frames, z, y = np.nonzero(k_space.mask[0, 0].any(-1).expand(data.shape[1:4]).numpy())
    header = np.zeros((), ACQUISITION_HEADER)
    header["version"], header["active_channels"], header["number_of_samples"] = 1, data.shape[0], data.shape[-1]
    empty = np.zeros((data.shape[-1], 0), np.float32)
    lines = (Acquisition(header[()], empty, data[:, f, a, b]) for f, a, b in zip(frames, z, y, strict=True))
    protocol = Protocol(shape=data.shape[2:], coils=data.shape[0], oversampling=1)
    write_raw(path, mrd_text.header(protocol), lines)

    def bulk() -> int:
        with open_raw(path) as raw:
            return sum(1 for _ in raw.acquisitions())

    figures, count = ours(bulk)
    with warnings.catch_warnings():
        import ismrmrd
    some = min(count, 200)
    with ismrmrd.Dataset(path, mode="r") as dataset:
        begin = time.perf_counter()
        for index in range(some):
            dataset.read_acquisition(index)
        loop = (time.perf_counter() - begin) / some * count
    size = path.stat().st_size / 2**20
    path.unlink()
    return {
        "mel": figures,
        "loop_of_read_acquisition_s": loop,
        "times_faster": loop / figures["wall_s"],
        "file_mib": size,
    }


def measure(
    name: str, matrix: tuple[int, int, int], frames: int, coils: int, virtual: int, folder: Path
) -> dict[str, Any]:
    """All stages of one case."""
    k_space, scan, true_maps, image = simulate(matrix, frames, coils)
    result: dict[str, Any] = {"read": reading(k_space, folder)}

    def compare(stage: str, mel: Callable[[], Any], bart: tuple[str, ...], sizes: tuple[float, float]) -> Any:
        """Run both sides in turn; `sizes` of input and output in MiB. Our result."""
        found: Any = None
        runs: list[tuple[dict[str, float], dict[str, float]]] = []
        begin = time.perf_counter()
        while not runs or (len(runs) < _REPEATS and time.perf_counter() - begin < _ENOUGH_S):
            found = None
            one, found = ours(mel)
            one["mib"] = max(0.0, one["mib"] - sizes[1])
            other = barts(folder, *bart)
            other["mib"] = max(0.0, other["mib"] - sum(sizes))
            runs.append((one, other))
        best = [{key: round(min(run[side][key] for run in runs), 3) for key in runs[0][0]} for side in (0, 1)]
        for side in (0, 1):
            best[side]["mib"] = round(max(run[side]["mib"] for run in runs))
        result[stage] = {"mel": best[0], "bart": best[1], "input_mib": sizes[0], "output_mib": sizes[1]}
        print(
            f"{name:20}{stage:10} mel {best[0]['cpu_s']:8.2f} s {best[0]['mib']:6.0f} MiB   "
            f"bart {best[1]['cpu_s']:8.2f} s {best[1]['mib']:6.0f} MiB",
            flush=True,
        )
        return found

    whole = k_space.data.numel() * 8 / 2**20
    one_image = whole / coils
    write_cfl(folder / "k", layout.k_space_to_bart(k_space.data.numpy()))
    write_cfl(folder / "noise", scan.numpy().T.reshape(-1, 1, 1, coils))

    def whitening() -> torch.Tensor:
        matrix = whitening_matrix(noise_covariance(scan, 1e-6), 1e-6)
        return whiten(k_space.data.flatten(2), matrix).view_as(k_space.data)

    white = compare("whiten", whitening, ("whiten", "k", "noise", "white"), (whole, whole))
    k_space = KSpace(white, k_space.mask, k_space.info)
    del white

    def compression() -> torch.Tensor:
        return compress_coils(k_space.data, coil_compression_matrix(k_space.data, virtual)[0])

    write_cfl(folder / "white", layout.k_space_to_bart(k_space.data.numpy()))
    command = ("cc", "-p", str(virtual), "-S", "white", "compressed")
    compare("compress", compression, command, (whole, whole * virtual / coils))

    scale = float(k_space.data.abs().max())
    k_space = KSpace(k_space.data / scale, k_space.mask, k_space.info)
    averaged = k_space.data.sum(2, keepdim=True) / k_space.mask.sum(2, keepdim=True).clamp(min=1)
    write_cfl(folder / "average", layout.k_space_to_bart(averaged.numpy()))
    del averaged
    one_frame = whole / frames
    estimate = compare(
        "maps", lambda: estimate_maps(k_space, MapSettings()), ("ecalib", "-m1", "average", "maps"), (one_frame,) * 2
    )
    same, full = ours(lambda: estimate_maps(k_space, MapSettings(grid="full")))
    matrix_of_noise = whitening_matrix(noise_covariance(scan, 1e-6), 1e-6) / scale
    errors = {
        grid: _error(k_space, found.coil_maps.data, matrix_of_noise, true_maps, image)
        for grid, found in (("reduced", estimate), ("full", full))
    }
    result["maps"] |= {"full_grid_cpu_s": same["cpu_s"], "cg_sense_nrmse": errors}
    del full

    maps = estimate.coil_maps.data
    write_cfl(folder / "maps", layout.coil_maps_to_bart(maps.numpy()))
    write_cfl(folder / "k", layout.k_space_to_bart(k_space.data.numpy()))
    operator = Sense(maps, k_space.mask, time=frames, coil_batch=4)
    into = (whole + one_frame, one_image)
    compare("adjoint", lambda: operator.adjoint(k_space.data), ("pics", "-i0", "k", "maps", "image"), into)
    command = ("pics", "-l2", f"-r{_WEIGHT}", f"-i{_ITERATIONS}", "-w1", "k", "maps", "image")
    compare("cg-sense", lambda: _cg(operator, k_space.data), command, into)
    if not read_cfl(folder / "image").any():
        raise SystemExit("bart pics gave a zero image")
    return result


def real_maps(data: Path) -> dict[str, Any]:
    """Error of the coil images, relative to the complete data, with maps of either grid: CG-SENSE and network."""
    from benchmarks.real_scans import beating_heart, head, measured_brains
    from melcore.bundle import Bundle
    from melcore.reconstruct import Reconstructor

    cases = [(scan, "primal_dual_2d") for scan in measured_brains(data)]
    cases += [
        (beating_heart(data, 8), "primal_dual_2dt"),
        (head(data, 8), "primal_dual_3d"),
        (head(data, 8, "spm152"), "primal_dual_3d"),
    ]
    table: dict[str, Any] = {}
    for scan, name in cases:
        scale = float(scan.k_space.data.abs().max())
        k_space = KSpace(scan.k_space.data / scale, scan.k_space.mask, scan.k_space.info)
        truth, bundle = ifft(scan.complete / scale), Bundle.load(name)
        chosen = bundle.preparation
        row: dict[str, Any] = {}
        for grid in ("full", "reduced"):
            settings = MapSettings(
                chosen.map_method, chosen.map_sets, None, chosen.calibration_size, chosen.map_crop, grid
            )
            maps = estimate_maps(k_space, settings).coil_maps
            for way, model in (("cg-sense", "cg-sense"), (name, bundle)):
                image = Reconstructor(model, "cpu")(k_space, maps).image.data
                error = (maps.data * image[:, :, None]).sum(1) - truth
                row.setdefault(way, {})[grid] = round(float(error.norm() / truth.norm()), 5)
        table[scan.name] = row
        print(scan.name, row, flush=True)
    return table


def _cg(operator: Sense, data: torch.Tensor) -> torch.Tensor:
    return conjugate_gradient(
        lambda v: operator.normal(v) + _WEIGHT * v,
        operator.adjoint(data),
        relative_tolerance=0,
        max_iterations=_ITERATIONS,
    ).value


def _error(
    k_space: KSpace, maps: torch.Tensor, whitening: torch.Tensor, true_maps: torch.Tensor, image: torch.Tensor
) -> float:
    """NRMSE of the coil images of CG-SENSE, which does not depend on the maps' gauge."""
    found = _cg(Sense(maps, k_space.mask, time=k_space.data.shape[2], coil_batch=4), k_space.data)
    difference = energy = 0.0
    for coil in range(maps.shape[2]):
        truth = sum(whitening[coil, c] * true_maps[:, c : c + 1] for c in range(coil + 1)) * image
        difference += float((maps[:, :, coil] * found - truth).norm() ** 2)
        energy += float(truth.norm() ** 2)
    return (difference / energy) ** 0.5


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes, for a look")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--data", type=Path, help="folder of measured scans")
    parser.add_argument("--output", type=Path, help="JSON file to write (what it holds of other cases stays), and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("MEL_CACHE", None)
    # What is loaded once for all is no part of any stage.
    estimate_maps(simulate((1, 64, 64), 1, 4)[0])
    coil_compression_matrix(torch.ones(1, 4, 1, 1, 8, 8, dtype=torch.complex64), 2)
    results: dict[str, Any] = {"cases": {}, "real_maps": {}}
    if arguments.output and arguments.output.exists():
        results |= json.loads(arguments.output.read_text())
    for name, case in (SMALL if arguments.small else CASES).items():
        if arguments.only in name:
            needed = 8 * 8 * case[1] * case[2] * int(np.prod(case[0]))
            with tempfile.TemporaryDirectory(prefix="mel-benchmark-", dir=scratch_folder(needed)) as folder:
                found = measure(name, *case, Path(folder))
            found["load"] = os.getloadavg()[2]
            results["cases"][name] = found
            print(f"{name:20}read       {found['read']['times_faster']:.0f} times a loop of read_acquisition")
            _write(arguments.output, results)
    if arguments.data:
        results["real_maps"] = real_maps(arguments.data)
        _write(arguments.output, results)


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is None:
        return
    versions = {"torch": torch.__version__, "bart": version(), "python": platform.python_version()}
    about = {
        "command": "python benchmarks/preprocess.py --data ../shared/data --output benchmarks/results/preprocess.json",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_processor_name()}, one thread for either side",
        "versions": versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | results, indent=1) + "\n")
    path.with_suffix(".md").write_text(_table(about, results))


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def _table(about: dict[str, Any], results: dict[str, Any]) -> str:
    rows = [
        "# Preprocessing, against BART",
        "",
        f"`{about['command']}`, {about['date']}, {about['machine']}, BART {about['versions']['bart']}, torch "
        f"{about['versions']['torch']}.",
        "",
        "Processor seconds (wall seconds in brackets), and MiB beyond input and output. Other work shared the cores, "
        "which processor seconds hardly feel and wall seconds do.",
        "",
        "| case | stage | MEL | BART | MEL, MiB | BART, MiB | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stages in results["cases"].items():
        for stage, row in stages.items():
            if stage in ("read", "load", "note"):
                continue
            mel, bart = row["mel"], row["bart"]
            rows.append(
                f"| {name} | {stage} | {mel['cpu_s']:.2f} ({mel['wall_s']:.2f}) | {bart['cpu_s']:.2f} "
                f"({bart['wall_s']:.2f}) | {mel['mib']:.0f} | {bart['mib']:.0f} | "
                f"{bart['cpu_s'] / max(mel['cpu_s'], 0.01):.1f} |"
            )
    rows += ["", *(f"{name}: {stages['note']}." for name, stages in results["cases"].items() if "note" in stages)]
    rows += ["", "| case | file | read | times a loop of `read_acquisition` |", "|---|---|---|---|"]
    for name, stages in results["cases"].items():
        read = stages["read"]
        rows.append(
            f"| {name} | {read['file_mib']:.0f} MiB | {read['mel']['wall_s']:.2f} s | {read['times_faster']:.0f} |"
        )
    rows += [
        "",
        "Maps of the reduced grid against those of the full one (the same kernel and region), relative error of the "
        "coil images:",
        "",
        "| data | method | full grid | reduced grid |",
        "|---|---|---|---|",
    ]
    for name, stages in results["cases"].items():
        errors = stages["maps"]["cg_sense_nrmse"]
        rows.append(f"| {name} | cg-sense | {errors['full']:.4f} | {errors['reduced']:.4f} |")
    for name, ways in results["real_maps"].items():
        rows += [f"| {name} | {way} | {row['full']:.4f} | {row['reduced']:.4f} |" for way, row in ways.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
