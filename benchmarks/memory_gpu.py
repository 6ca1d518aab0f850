"""Training steps on a GPU: allocated and reserved memory, time against plain, and the floor. See benchmarks/gpu.sh."""

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from melcore.memory import MemoryPlan
from melcore.networks import ResidualCNN
from melcore.physics import Sense
from melcore.unrolled import Encoding, MoDL, Unrolled, plan

RESULTS = Path(__file__).parent / "results"
SMALL = (96, 128, 128)
FULL = (256, 320, 320)
PRECISIONS = ("float32", "tf32", "bfloat16")


def problem(shape: tuple[int, int, int], coils: int) -> Encoding:
    """Random maps and mask of the right sizes; values do not matter for time."""
    maps = torch.randn(1, 1, coils, 1, *shape, dtype=torch.complex64, device="cuda")
    maps /= maps.abs().square().sum(2, keepdim=True).sqrt()
    operator = Sense(maps, torch.rand(1, 1, 1, *shape[:2], 1, device="cuda") > 0.8)
    del maps
    data = operator.adjoint(operator(torch.randn(operator.domain, dtype=torch.complex64, device="cuda")))
    return Encoding(operator, data)


def floor(shape: tuple[int, int, int], count: int, channels: int, precision: str) -> float:
    """Seconds that the convolutions of forward and backward take at the device's measured peak rate."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    features = torch.randn(1, channels, 64, 128, 128, device="cuda", dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, 3, device="cuda", dtype=dtype)
    seconds = timed(lambda: F.conv3d(features, weight, padding=1))
    per_voxel = seconds / features[0, 0].numel() / channels**2
    voxels = shape[0] * shape[1] * shape[2]
    return 3 * count * voxels * (3 * channels**2 + 4 * channels) * per_voxel


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of some runs, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def measure(
    made: Unrolled, encoding: Encoding, memory: MemoryPlan | None, precision: str, repeats: int = 3
) -> dict[str, Any]:
    """Time and memory of a training step, optimiser included; or why there are none."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    optimiser = torch.optim.Adam(made.parameters(), 1e-4)
    made.memory = memory

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            image = made.refine(encoding, encoding.adjoint_data)
        image.abs().square().mean().backward()
        optimiser.step()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        seconds = timed(step, repeats)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {
        "seconds": seconds,
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def main() -> None:
    """Measure, print, and write the results."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is at hand: nothing was measured.")
    device = torch.cuda.get_device_properties(0)
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        print(row, flush=True)

    count = 4
    made = Unrolled.repeat(lambda: MoDL(ResidualCNN(3, channels=64, layers=5)), count).cuda()
    encoding = problem(SMALL, 8)
    for precision in PRECISIONS:
        least = floor(SMALL, count, 64, precision)
        note(problem="x".join(map(str, SMALL)), precision=precision, executor="floor", seconds=least)
        choices: dict[str, MemoryPlan | None] = {"plain": None}
        for name in ("checkpoint", "store", "nested"):
            choices[name] = MemoryPlan.uniform(name, count)  # type: ignore[arg-type]
        for chunk in (4, 8, 16, 32):
            choices[f"stream {chunk}"] = MemoryPlan.uniform("stream", count, chunk=chunk)
        choices["stream 16, host"] = MemoryPlan.uniform("stream", count, chunk=16, states="host")
        choices["keep 16"] = MemoryPlan.uniform("keep", count, chunk=16)
        plain = None
        for name, memory in choices.items():
            found = measure(made, encoding, memory, precision)
            plain = plain or found.get("seconds")
            ratio = found["seconds"] / plain if plain and "seconds" in found else None
            note(problem="x".join(map(str, SMALL)), precision=precision, executor=name, time=ratio, **found)
    del encoding
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(12e9 / device.total_memory)
    made = Unrolled.repeat(lambda: MoDL(ResidualCNN(3, channels=64, layers=5)), 10)
    chosen = plan(made, FULL, 8, int(11.5e9))
    made = made.cuda()
    encoding = problem(FULL, 8)
    for precision in PRECISIONS:
        found = measure(made, encoding, chosen, precision, repeats=1)
        note(
            problem="256x320x320, 8 coils, N=10, within 12 GB",
            precision=precision,
            executor=str(chosen.iterations[0].describe()[0]),
            predicted_gb=(chosen.predicted_peak_bytes or 0) / 1e9,
            floor=floor(FULL, 10, 64, precision),
            **found,
        )
    about = {
        "command": "sh benchmarks/gpu.sh",
        "machine": f"{device.name}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_gpu.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines = [f"`{about['command']}`, {about['date']}, {about['machine']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in row.items()) for row in rows]
    (RESULTS / "memory_gpu.md").write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
