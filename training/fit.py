"""Train a model bundle on simulated data, as a configuration says.

Simulates and prepares the examples (once: they are cached), trains with validation, TensorBoard scalars and images, and
checkpoints in output.directory, and writes output.bundle at the end, with a card. Interrupt it as you like (Ctrl-C,
SIGTERM): the checkpoint is saved first, and --resume continues bit by bit.

Example:
  mel fit training/configs/modl_2d.yaml
  python training/fit.py training/configs/modl_2d.yaml training.steps=500 optimiser.learning_rate=1e-3 --resume
  torchrun --nproc-per-node 2 training/fit.py training/configs/modl_2d.yaml training.batch=2
"""

import argparse
import datetime
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from melcore import __version__
from melcore.bundle import Bundle
from melcore.errors import MissingDependencyError

if TYPE_CHECKING:
    from training.config import Config
    from training.trainer import Trainer
    from training.validation import Metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mel fit``."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see training/configs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, dotted: training.steps=500"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in output.directory")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when the bundle is written, 128 + the signal's number when a signal ended it."""
    _require("pydantic", "tensorboard")
    from training.config import load
    from training.data import prepare_examples
    from training.parallel import join, leave
    from training.trainer import InterruptedTrainingError, Trainer, check_fresh

    config = load(arguments.config, arguments.overrides)
    directory = config.output.directory
    if not arguments.resume:
        check_fresh(directory / "checkpoint.safetensors")
    team = join(config.training.device)
    quiet = arguments.quiet or not team.leads
    settings = config.data
    if not team.leads:
        team.wait()  # then the examples are there
    with _bar(settings.examples + settings.validation, "examples", quiet) as bar:
        training, validation = prepare_examples(settings, config.to_preparation(), bar.update)
    if team.leads:
        team.wait()
    trainer = Trainer(config, training, validation, team=team)
    if arguments.resume:
        trainer.resume()
    with (
        _board(directory, trainer) as board,
        _bar(config.training.steps, "training", quiet, initial=trainer.step) as bar,
        _signals(trainer) as received,
    ):
        if board is not None:
            _observe(trainer, board, bar)
        try:
            trainer.run()
        except InterruptedTrainingError as stop:
            bar.close()
            if team.leads:
                tqdm.write(f"mel fit: {stop}", file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGTERM)
        finally:
            leave(team)
        if not team.leads:
            return 0
        metrics = trainer.metrics or trainer.validate()
    bundle = Bundle(
        trainer.model.cpu().eval(), config.model, config.to_preparation(), make_card(config, trainer, metrics)
    )
    path = bundle.save(config.output.bundle)
    tqdm.write(f"{path} ({path.stat().st_size / 1e3:.0f} kB)\n{_table(metrics)}")
    return 0


@contextmanager
def _board(directory: Path, trainer: "Trainer") -> Iterator[Any]:
    """TensorBoard's writer, in the process that reports."""
    if not trainer.team.leads:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard"), purge_step=trainer.step) as board:
        yield board


def make_card(config: "Config", trainer: "Trainer", metrics: "Metrics") -> dict[str, Any]:
    """What a bundle says about its training."""
    settings = config.data
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "name": config.name,
        "notes": config.output.notes,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data": f"simulated {settings.dimensions}: {settings.examples} examples, {settings.validation} for validation",
        "seed": {"data": settings.seed, "training": config.training.seed},
        "steps": trainer.step,
        "parameters": parameters,
        "machine": _machine(trainer.device),
        "seconds": round(trainer.seconds),
        "metrics": {name: {key: round(value, 4) for key, value in m.items()} for name, m in metrics.items()},
        "metrics_meaning": "means over the validation examples, in the support of the maps: complex NRMSE and PSNR "
        "in dB, SSIM of the magnitude; start is the image that the network begins from",
        "target": "noise-free, fully sampled coil images, combined with the maps that were estimated from the data",
        "versions": {"melcore": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "config": config.to_dict(),
    }


def _machine(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{threads} of {os.cpu_count()} CPU cores ({model})"


def _table(metrics: "Metrics") -> str:
    lines = [f"{'':12}{'NRMSE dB':>10}{'PSNR dB':>10}{'SSIM':>8}"]
    lines += [f"{n:12}{m['nrmse_db']:10.2f}{m['psnr_db']:10.2f}{m['ssim']:8.4f}" for n, m in metrics.items()]
    return "\n".join(lines)


def _require(*packages: str) -> None:
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"training needs {package}: pip install 'melcore[train]'.")


def _bar(total: int, what: str, quiet: bool, initial: int = 0) -> "tqdm[Any]":
    # disable=None: no bar where the output is a file.
    return tqdm(total=total, desc=what, initial=initial, disable=True if quiet else None, smoothing=0.05)


@contextmanager
def _signals(trainer: "Trainer") -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM end the training after the step in progress; a second one ends it at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    watched: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        trainer.stop(f"stopped by {signal.Signals(number).name}")
        signal.signal(number, previous[number])

    for number in watched:
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _observe(trainer: "Trainer", board: Any, bar: "tqdm[Any]") -> None:
    """Connect the trainer with TensorBoard and the progress bar."""
    from training.problem import place
    from training.validation import learned, live_channels, zero_filled

    smooth: dict[str, float] = {}

    def report(step: int, figures: dict[str, float]) -> None:
        loss = smooth["loss"] = 0.98 * smooth.get("loss", figures["loss"]) + 0.02 * figures["loss"]
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        if step % 10 == 0:
            for name, value in figures.items():
                board.add_scalar(f"training/{name}", value, step)

    def on_validation(step: int, metrics: "Metrics") -> None:
        for name, values in metrics.items():
            for key, value in values.items():
                board.add_scalar(f"validation/{key}/{name}", value, step)
        problem = place(trainer.validation[0], trainer.device)
        alive = live_channels(trainer.model, problem)
        board.add_scalar("training/live_channels", alive, step)
        if alive < 0.5:
            bar.write(f"step {step}: only {alive:.0%} of the channels are alive: lower the learning rate", sys.stderr)
        with torch.no_grad():
            shown = [problem.truth, zero_filled(problem), learned(trainer.model)(problem)]
        error = 5 * (shown[2] - shown[0]).abs()
        rows = torch.cat([_slice(image) for image in (*shown, error)], dim=1)
        board.add_image("validation/truth, zero-filled, learned, error x 5", rows.clamp(max=1)[None], step)
        ours, sense = metrics["learned"], metrics["cg_sense"]
        bar.write(
            f"step {step}: loss {smooth.get('loss', 0):.4f}, validation NRMSE {ours['nrmse_db']:.2f} dB, SSIM "
            f"{ours['ssim']:.4f} (CG-SENSE {sense['nrmse_db']:.2f} dB, {sense['ssim']:.4f}), live channels {alive:.0%}",
            sys.stderr,
        )

    trainer.report, trainer.on_validation = report, on_validation


def _slice(image: torch.Tensor) -> torch.Tensor:
    """Middle frame and slice of the magnitude of the first example, ``(y, x)``."""
    frame = image[0, 0, image.shape[2] // 2].abs().cpu()
    return frame[frame.shape[0] // 2]


if __name__ == "__main__":
    from melcore.cli import main

    sys.exit(main(["fit", *sys.argv[1:]]))
