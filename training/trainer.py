"""The training loop. Every step is a function of the configuration and its number, so that it resumes exactly."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melcore.errors import ConfigError, DataError, MelError
from melcore.learning import ReconstructionLoss
from melcore.memory import MemoryPlan, retrying
from melcore.unrolled import Unrolled, build
from training import checkpoint
from training.config import Config
from training.data import Example, window_readout
from training.parallel import Team
from training.problem import Problem, place
from training.validation import Metrics, evaluate


def _ignore(_step: int, _figures: object) -> None:
    pass


class InterruptedTrainingError(MelError):
    """The training was asked to stop; its checkpoint is saved."""


class DivergedError(MelError):
    """The loss or its gradient is not finite."""


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {name!r} cannot be used here: {' '.join(str(error).split())}") from None
    return torch.device(name)


def learning_rate(step: int, config: Config) -> float:
    """Of step `step`, counted from 0: linear rise, then half a cosine down to the final fraction."""
    settings, steps = config.optimiser, config.training.steps
    if step < settings.warm_up:
        return settings.learning_rate * (step + 1) / (settings.warm_up + 1)
    progress = (step - settings.warm_up) / max(steps - settings.warm_up, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * cosine)


def order(step: int, count: int, config: Config) -> list[int]:
    """Examples of step `step`: every epoch is a permutation of all `count` that depends on the seed and the epoch."""
    batch, chosen = config.training.batch, []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, count)
        generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + epoch)
        chosen.append(int(torch.randperm(count, generator=generator)[index]))
    return chosen


def step_seed(step: int, config: Config) -> int:
    """Seed of what is random in a step."""
    return config.training.seed * 1_000_003 + step


def random_factor(scale_jitter: float, generator: torch.Generator) -> complex:
    """Random global phase and a little scale, by which the k-space, start image and truth of an example are multiplied.

    The phase of an image is arbitrary (receiver, coil gauge), and so is the last tenth of its scale.
    """
    phase, scale = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    magnitude = 1 + scale_jitter * (2 * scale - 1)
    return complex(magnitude * math.cos(2 * math.pi * phase), magnitude * math.sin(2 * math.pi * phase))


def crop(example: Example, window: int | None, generator: torch.Generator | None = None) -> Example:
    """A window of the readout, at a random place or, without a generator, in the middle; all of it if None or short."""
    size = example.truth.shape[-1]
    if window is None or window >= size:
        return example
    rest = size - window
    start = rest // 2 if generator is None else int(torch.randint(rest + 1, (), generator=generator))
    return window_readout(example, start, window)


@dataclass
class Trainer:
    """Trains the model of a configuration.

    Parameters
    ----------
    config
        The configuration.
    examples, validation
        Prepared examples, loaded when indexed.
    report
        Called after every step with its number and figures: ``loss``, ``gradient``, ``learning_rate``, ``seconds``.
    on_validation
        Called with the step and the metrics of all methods.
    team
        The processes that train together; the first one alone validates and saves.
    """

    config: Config
    examples: Sequence[Example]
    validation: Sequence[Example]
    report: Callable[[int, dict[str, float]], None] = _ignore
    on_validation: Callable[[int, Metrics], None] = _ignore
    team: Team = field(default_factory=Team)
    step: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    history: list[dict[str, float]] = field(init=False, default_factory=list)
    metrics: Metrics = field(init=False, default_factory=dict)  #: of the last validation

    def __post_init__(self) -> None:
        self.device = choose_device(self.config.training.device)
        window = self.config.training.readout_window
        if window is not None:
            self.validation = [crop(example, window) for example in self.validation]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.config.training.tf32
        torch.manual_seed(self.config.training.seed)
        self.model: Unrolled = build(self.config.model).to(self.device)
        self.model.memory = self.config.to_memory_plan(self.model, self.device)
        settings = self.config.optimiser
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        loss = self.config.loss
        volume = self.config.data.dimensions.startswith("3d")
        self.loss = ReconstructionLoss(loss.l1, loss.l2, loss.ssim, dimensions=3 if volume else 2)
        self._stop: str | None = None
        self._agreed: str | None = None

    @property
    def checkpoint(self) -> Path:
        """Where checkpoints go."""
        return self.config.output.directory / "checkpoint.safetensors"

    def stop(self, reason: str) -> None:
        """Ask `run` to save a checkpoint after the step in progress, and to end."""
        self._stop = reason

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises
        ------
        DataError
            If there is none, or it is damaged.
        ConfigError
            If it was made by another configuration.
        """
        _, _, progress = checkpoint.read(self.checkpoint)
        differences = _differences(self.config.to_dict(), progress.config)
        if differences:
            raise ConfigError(
                f"the checkpoint {self.checkpoint} was made with other settings ({', '.join(differences)}): "
                "resume with the same ones, or start in another output.directory."
            )
        progress = checkpoint.restore(self.checkpoint, self.model, self.optimiser)
        self.step, self.seconds, self.history = progress.step, progress.seconds, [dict(h) for h in progress.history]
        if progress.memory is not None and progress.config["memory"] == self.config.to_dict()["memory"]:
            # Not planned anew: a plan depends on a probe of the device, and another one would round differently.
            self.model.memory = MemoryPlan.from_dict(progress.memory)

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        if not self.team.leads:
            return
        memory = self.model.memory.to_dict() if self.model.memory else None
        progress = checkpoint.Progress(self.step, self.seconds, self.config.to_dict(), tuple(self.history), memory)
        checkpoint.save(self.checkpoint, self.model, self.optimiser, progress)

    def run(self) -> None:
        """Train from the present step to the last one.

        Raises
        ------
        DivergedError
            If the loss or the gradient is not finite; the last checkpoint stays as it is.
        InterruptedTrainingError
            After `stop`, with the checkpoint saved.
        """
        settings = self.config.training
        while self.step < settings.steps:
            begin = time.perf_counter()
            figures = self.train_step()
            elapsed = time.perf_counter() - begin
            self.step += 1
            self.seconds += elapsed
            self.report(self.step, {**figures, "seconds": elapsed})
            last = self.step == settings.steps
            if self.team.leads and (last or self.step % settings.validation_interval == 0):
                self.validate()
            # Processes that train together stop after the same step, one alone at once.
            stop = self._stop if self.team.size == 1 else self._agreed
            if last or stop or self.step % settings.checkpoint_interval == 0:
                self.save()
            if stop and not last:
                raise InterruptedTrainingError(
                    f"{stop} at step {self.step} of {settings.steps}; {self.checkpoint} is saved: "
                    "continue with --resume."
                )

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser on the examples that are due."""
        settings = self.config.optimiser
        self.model.train()
        members = order(self.step, len(self.examples), self.config)
        share = self.team.share(range(len(members)))
        # What is random in the network depends on the step and the process, so that it can be repeated.
        torch.manual_seed((step_seed(self.step, self.config) * 64 + self.team.rank) % (1 << 63))
        total = retrying(self.model, lambda: self._accumulate(members, share))
        self.team.add_gradients(self.model)
        total, stops = self.team.add(total, float(self._stop is not None), device=self.device)
        self._agreed = self._stop or "stopped by another process" if stops else None
        if self.step < settings.frozen_steps:
            for name, parameter in self.model.named_parameters():
                if ".regulariser." not in name:
                    parameter.grad = None
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            saved = (
                f"{self.checkpoint} keeps the last good state" if self.checkpoint.is_file() else "nothing was saved yet"
            )
            raise DivergedError(
                f"step {self.step + 1} (examples {members}): the loss is {total:g} and its gradient {norm:g}; {saved}. "
                "Lower optimiser.learning_rate or optimiser.clip."
            )
        rate = learning_rate(self.step, self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return {"loss": total, "gradient": norm, "learning_rate": rate}

    def _accumulate(self, members: Sequence[int], share: Sequence[int]) -> float:
        """Gradients of the mean loss of a batch, as far as the members in these places contribute, and that loss."""
        self.optimiser.zero_grad(set_to_none=True)
        total, seed = 0.0, step_seed(self.step, self.config)
        for position in share:
            generator = torch.Generator().manual_seed(seed * 64 + position)
            example = crop(self.examples[members[position]], self.config.training.readout_window, generator)
            problem = place(example, self.device, random_factor(self.config.training.scale_jitter, generator))
            del example
            loss = self._loss(problem) / len(members)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _loss(self, problem: Problem) -> Tensor:
        image = self.model.refine(problem.encoding, problem.initial)
        loss = self.loss(image, problem.truth, problem.support)
        if self.config.loss.relative_to_start:
            loss = loss / self.loss(problem.initial, problem.truth, problem.support)
        return loss

    def validate(self) -> Metrics:
        """Judge the model on the held-out examples, beside the conventional methods."""
        conventional = {name: value for name, value in self.metrics.items() if name != "learned"}
        self.metrics = evaluate(self.model, self.validation, self.device, conventional)
        self.history.append({"step": self.step, **self.metrics["learned"]})
        self.on_validation(self.step, self.metrics)
        return self.metrics


# What may differ between the sessions of one training.
_FREE = {
    "output.bundle",
    "output.notes",
    "training.device",
    "training.checkpoint_interval",
    "data.workers",
    "data.cache",
}


def _differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    if isinstance(new, dict) and isinstance(old, dict):
        names = sorted({*new, *old})
        return [d for name in names for d in _differences(new.get(name), old.get(name), f"{prefix}{name}.")]
    name = prefix.rstrip(".")
    return [] if new == old or name in _FREE or name.startswith("memory") else [name]


def check_fresh(path: Path) -> None:
    """Raise `DataError` if a training without ``--resume`` would overwrite a checkpoint."""
    if path.is_file():
        raise DataError(f"{path} exists: continue that training with --resume, or set another output.directory.")
