"""Train a model bundle, as a configuration says: on prepared folders of one's own, on simulation, or on a mixture.

Examples are drawn anew at every step. Trains with validation, TensorBoard scalars and images, and checkpoints in
output.directory, and writes a bundle with a card at the end. Interrupt it as you like (Ctrl-C, SIGTERM: the checkpoint
is saved first; kill -9: the last one stays), and --resume continues bit by bit; training.steps may have grown since.
With --max-hours the learning rate falls so that it has come to its end at the limit; such a training depends on the
machine's speed, and cannot be repeated bit by bit.

Example:
  mel fit primal_dual_2d                                 # a configuration that ships, by name
  mel fit my.yaml training.steps=5000 optimiser.learning_rate=1e-3
  mel fit my.yaml --max-hours 8
  mel fit my.yaml --from primal_dual_2d                  # begin with the weights of a bundle
  mel fit my.yaml --resume training.steps=20000
  torchrun --nproc-per-node 2 training/fit.py my.yaml training.batch=2
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from melcore.bundle import Bundle
from melcore.errors import ConfigError, DataError, MissingDependencyError
from melcore.units import format_bytes

if TYPE_CHECKING:
    from training.config import Config
    from training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mel fit``."""
    from training.plan_command import allow_settings_anywhere

    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of one that ships (training/configs)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, dotted: training.steps=500"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in output.directory")
    parser.add_argument("--from", dest="begin", metavar="BUNDLE", help="begin with a bundle's weights (path or name)")
    parser.add_argument("--max-hours", type=float, metavar="H", help="end, with a finished bundle, after so long")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    allow_settings_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when the bundle is written, 128 + the signal's number when a signal ended it."""
    begin = time.perf_counter()
    _require("pydantic", "tensorboard")
    from training import board, card, checkpoint, directory
    from training.config import load
    from training.data import Stream
    from training.parallel import join, leave
    from training.trainer import InterruptedTrainingError, Trainer

    hours = [] if arguments.max_hours is None else [f"training.max_hours={arguments.max_hours}"]
    config = load(arguments.config, [*arguments.overrides, *hours])
    if arguments.resume and arguments.begin:
        raise ConfigError("--resume continues a training that --from began: give one of them.")
    bundle = Bundle.load(arguments.begin) if arguments.begin else None
    folder = config.output.directory
    if not arguments.resume:
        checkpoint.check_fresh(folder / "checkpoint.safetensors")
    team = join(config.training.device)
    quiet = arguments.quiet or not team.leads
    with ExitStack() as stack:
        stack.callback(leave, team)
        if team.leads:
            stack.enter_context(directory.claimed(folder))
            directory.check_target(config.bundle)
        shares = team.size if config.training.batch % team.size == 0 else 1
        preparation = config.to_preparation()
        examples = stack.enter_context(
            Stream(config.data, preparation, "train", step=shares, window=config.training.widest_window)
        )
        validation = stack.enter_context(Stream(config.data, preparation, "validation"))
        trainer = Trainer(config, examples, validation, team=team)  # type: ignore[arg-type]
        if bundle is not None:
            trainer.begin_from(bundle)
        if arguments.resume:
            trainer.resume()
        if team.leads:
            tqdm.write(_outline(config, trainer), file=sys.stderr)
            with _bar(len(validation), "validation examples", quiet) as bar:
                for _ in validation:
                    bar.update()
        trainer.seconds += time.perf_counter() - begin
        bar = stack.enter_context(_bar(config.training.steps, "training", quiet, initial=trainer.step))
        if team.leads:
            shown = board.Board(folder / "tensorboard", trainer.step)
            stack.callback(shown.close)
            board.observe(trainer, shown, bar)
        received = stack.enter_context(_signals(trainer))
        try:
            trainer.run()
        except InterruptedTrainingError as stop:
            bar.close()
            if team.leads:
                tqdm.write(f"mel fit: {stop}", file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGTERM)
        if team.leads:
            bar.close()
            metrics = trainer.metrics or trainer.validate()
            result = Bundle(trainer.result(), config.model, preparation, card.make_card(config, trainer, metrics))
            path = _write(result, config.bundle)
            tqdm.write(f"{path} ({path.stat().st_size / 1e3:.0f} kB)\n{board.table(metrics)}")
    return 0


def _write(bundle: Bundle, path: Path) -> Path:
    try:
        return bundle.save(path)
    except OSError as error:
        raise DataError(
            f"the bundle {path} cannot be written: {error.strerror or error}; the checkpoint is complete: make room, "
            "and run again with --resume."
        ) from error


def _outline(config: "Config", trainer: "Trainer") -> str:
    """What will be done, how, and where results go."""
    settings, parameters = config.training, sum(parameter.numel() for parameter in trainer.model.parameters())
    ends = [] if settings.steps is None else [f"{settings.steps} steps"]
    ends += [] if settings.max_hours is None else [f"{settings.max_hours:g} h"]
    begun = f", from step {trainer.step}" if trainer.step else ""
    memory = trainer.memory
    executors = ["plain"] if memory is None else dict.fromkeys(entry.describe()[0] for entry in memory.iterations)
    peak = None if memory is None else memory.predicted_peak_bytes
    plan = f"{', '.join(executors)}; predicted peak {'unknown' if peak is None else format_bytes(peak)}"
    board = config.output.directory / "tensorboard"
    return "\n".join(
        [
            f"{config.name}: {parameters} parameters, {' or '.join(ends)}{begun}, on {trainer.device}",
            f"memory plan: {plan}",
            f"watch it: tensorboard --logdir {board}",
            f"results: {config.bundle} (bundle), {trainer.checkpoint} (mel fit --resume continues)",
        ]
    )


def _require(*packages: str) -> None:
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"training needs {package}: pip install 'melcore[train]'.")


def _bar(total: int | None, what: str, quiet: bool, initial: int = 0) -> "tqdm[Any]":
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


if __name__ == "__main__":
    from melcore.cli import main

    sys.exit(main(["fit", *sys.argv[1:]]))
