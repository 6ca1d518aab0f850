"""Training steps on a GPU: allocated and reserved memory, time against plain, and the floor. See benchmarks/gpu.sh.

sh benchmarks/gpu.sh              measures, and writes benchmarks/results/memory_gpu.json and .md
sh benchmarks/gpu.sh --dry-run    the same at toy sizes on the CPU, to see that it runs; writes nothing
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from melcore.memory import MemoryPlan, calibrate
from melcore.networks import ResidualCNN
from melcore.physics import Sense
from melcore.unrolled import Encoding, MoDL, Unrolled, plan

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "tf32", "bfloat16")
LIMIT = 12e9


@dataclass(frozen=True)
class Sizes:
    """What is measured: a volume that fits as a whole, and one that does not."""

    device: str
    small: tuple[int, int, int]
    full: tuple[int, int, int]
    coils: int
    channels: int
    iterations: int
    budget: int  #: for the full volume's plan; the rest of the limit is the context's and the allocator's


GPU = Sizes("cuda", (96, 128, 128), (256, 320, 320), 8, 64, 10, int(11.2e9))
TOY = Sizes("cpu", (6, 8, 10), (12, 10, 14), 2, 4, 3, 700_000)


def model(count: int, channels: int) -> Unrolled:
    """MoDL with a residual 3D CNN of 5 layers."""
    return Unrolled.repeat(lambda: MoDL(ResidualCNN(3, channels=channels, layers=5)), count)


def problem(shape: tuple[int, int, int], coils: int, device: str) -> Encoding:
    """Random maps and mask of the right sizes, made on the host as in training; values do not matter for time."""
    maps = torch.randn(1, 1, coils, 1, *shape, dtype=torch.complex64)
    maps /= maps.abs().square().sum(2, keepdim=True).sqrt()
    operator = Sense(maps, torch.rand(1, 1, 1, *shape[:2], 1) > 0.8).to(device)
    data = torch.randn(operator.domain, dtype=torch.complex64, device=device)
    return Encoding(operator, data, torch.tensor([0.05], device=device))


def use(precision: str) -> None:
    """Let float32 mean itself, or tf32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def floor(shape: tuple[int, int, int], count: int, sizes: Sizes, precision: str) -> float:
    """Seconds that the convolutions of forward and backward take at the device's measured peak rate."""
    use(precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    channels, edge = sizes.channels, min(64, 2 * sizes.small[0])
    best = float("inf")
    for stored in (torch.contiguous_format, torch.channels_last_3d):
        features = torch.randn(1, channels, edge, 2 * edge, 2 * edge, device=sizes.device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, 3, device=sizes.device, dtype=dtype)
        features, weight = (tensor.contiguous(memory_format=stored) for tensor in (features, weight))
        best = min(best, timed(lambda f=features, w=weight: F.conv3d(f, w, padding=1), sizes.device))
    per_voxel = best / (4 * edge**3) / channels**2
    voxels = shape[0] * shape[1] * shape[2]
    return 3 * count * voxels * (3 * channels**2 + 4 * channels) * per_voxel


def timed(run: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The fastest of some runs, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    made: Unrolled, encoding: Encoding, memory: MemoryPlan | None, precision: str, device: str, repeats: int = 3
) -> dict[str, Any]:
    """Time and memory of a training step, optimiser included; or why there are none."""
    use(precision)
    optimiser = torch.optim.Adam(made.parameters(), 1e-4)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            image = made.refine(encoding, encoding.adjoint_data, memory=memory)
        image.abs().square().mean().backward()
        optimiser.step()

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = timed(step, device, repeats)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    if device != "cuda":
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """All measurements, one after the other."""
    known = {precision: _known(precision, sizes) for precision in PRECISIONS}
    for precision, found in known.items():
        yield {"problem": "probe", "precision": precision, "convolution": found.convolution, **found.seconds}
    yield from _executors(sizes, {precision: found.convolution for precision, found in known.items()})
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.get_device_properties(0).total_memory)
    made = model(sizes.iterations, sizes.channels)
    for precision in PRECISIONS:
        found = known[precision]
        chosen = plan(
            made,
            sizes.full,
            sizes.coils,
            sizes.budget,
            fourier_cost=found.fourier_cost,
            convolution=found.convolution,
        )
        placed, encoding = made.to(sizes.device), problem(sizes.full, sizes.coils, sizes.device)
        yield {
            "problem": f"{_name(sizes.full)}, {sizes.coils} coils, N={sizes.iterations}, within {LIMIT / 1e9:g} GB",
            "precision": precision,
            "executor": ", ".join(dict.fromkeys(entry.describe()[0] for entry in chosen.iterations)),
            "states": chosen.iterations[0].states,
            "predicted_gb": (chosen.predicted_peak_bytes or 0) / 1e9,
            "predicted_time": chosen.relative_time,
            "floor": floor(sizes.full, sizes.iterations, sizes, precision),
            **measure(placed, encoding, chosen, precision, sizes.device, repeats=1),
        }
        made = placed.cpu()
        del encoding


def _known(precision: str, sizes: Sizes) -> Any:
    use(precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return calibrate(sizes.device, channels=sizes.channels, size=min(64, 2 * sizes.small[0]), dtype=dtype)


def _executors(sizes: Sizes, ways: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every executor on the small volume."""
    count = 4
    made = model(count, sizes.channels).to(sizes.device)
    encoding = problem(sizes.small, sizes.coils, sizes.device)
    for precision in PRECISIONS:
        about = {"problem": _name(sizes.small), "precision": precision}
        yield {**about, "executor": "floor", "seconds": floor(sizes.small, count, sizes, precision)}
        choices: dict[str, MemoryPlan | None] = {"plain": None}
        for name in ("checkpoint", "store", "nested"):
            choices[name] = MemoryPlan.uniform(name, count)  # type: ignore[arg-type]
        way = {"convolution": ways[precision]}
        for chunk in (4, 8, 16, 32):
            choices[f"stream {chunk}"] = MemoryPlan.uniform("stream", count, chunk=chunk, **way)
        choices["stream 16, host"] = MemoryPlan.uniform("stream", count, chunk=16, states="host", **way)
        choices["keep 16"] = MemoryPlan.uniform("keep", count, chunk=16, **way)
        plain = None
        for name, memory in choices.items():
            found = measure(made, encoding, memory, precision, sizes.device)
            plain = plain or found.get("seconds")
            ratio = found["seconds"] / plain if plain and "seconds" in found else None
            yield {**about, "executor": name, "time": ratio, **found}


def _name(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; writes nothing")
    if parser.parse_args().dry_run:
        for row in rows(TOY):
            print(row, flush=True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is at hand: nothing was measured.")
    found = []
    for row in rows(GPU):
        found.append(row)
        print(row, flush=True)
    about = {
        "command": "sh benchmarks/gpu.sh",
        "machine": f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_gpu.json").write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    lines = [f"`{about['command']}`, {about['date']}, {about['machine']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in row.items()) for row in found]
    (RESULTS / "memory_gpu.md").write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
