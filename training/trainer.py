"""The training loop. Every step is a function of the configuration and its number, so that it resumes exactly."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melcore.bundle import Bundle
from melcore.errors import ConfigError, DataError, MelError
from melcore.memory import MemoryPlan, retrying
from melcore.unrolled import Unrolled, build
from training import checkpoint, schedule, weights
from training.config import Config
from training.example import Example
from training.objective import Objective, finite
from training.parallel import Team, choose_device
from training.problem import Problem, check_layout, crop
from training.schedule import learning_rate, step_seed
from training.validation import Metrics, evaluate


def _ignore(_step: int, _figures: object) -> None:
    pass


class InterruptedTrainingError(MelError):
    """The training was asked to stop; its checkpoint is saved."""


class DivergedError(MelError):
    """The loss or its gradient is not finite."""


@dataclass
class Trainer:
    """Trains the model of a configuration.

    Parameters
    ----------
    config
        The configuration.
    examples
        Prepared examples, loaded when indexed: a list, or a stream without a length, whose n-th example is due at step
        ``n // batch``.
    validation
        A short list.
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
    seconds: float = field(init=False, default=0.0)  #: of work, over all sessions
    history: list[dict[str, float]] = field(init=False, default_factory=list)
    metrics: Metrics = field(init=False, default_factory=dict)  #: of the last validation
    origin: dict[str, Any] | None = field(init=False, default=None)  #: the bundle that the training began from

    def __post_init__(self) -> None:
        settings = self.config.training
        for split, examples in (("training", self.examples), ("validation", self.validation)):
            if schedule.length(examples) == 0:
                raise DataError(f"there is no example for {split}: prepare some, or let data.sources simulate them.")
        self.device = choose_device(settings.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        torch.manual_seed(settings.seed)
        self.model: Unrolled = build(self.config.model).to(self.device)
        self.memory: MemoryPlan | None = self.config.to_memory_plan(self.model, self.device)
        options = self.config.optimiser
        self.optimiser = torch.optim.AdamW(
            weights.groups(self.model, options),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        self.average = weights.Average(self.model, settings.ema) if settings.ema else None
        self.objective = Objective(self.config, self.device)
        self._stop: str | None = None
        self._agreed: str | None = None
        self._elapsed = 0.0  # part of the time limit, as all processes know it
        self._spent_on_validation = 0.0
        self._suspect: int | None = None

    @property
    def checkpoint(self) -> Path:
        """Where checkpoints go."""
        return self.config.output.directory / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or the time is up."""
        steps = self.config.training.steps
        return (steps is not None and self.step >= steps) or self._elapsed >= 1

    def stop(self, reason: str) -> None:
        """Ask `run` to save a checkpoint after the step in progress, and to end."""
        self._stop = reason

    def begin_from(self, bundle: Bundle) -> None:
        """Begin with a bundle's weights instead of random ones; `ConfigError` if they do not fit."""
        weights.begin_from(self.model, self.config.model, bundle)
        if self.average is not None:
            self.average = weights.Average(self.model, self.average.decay)
        self.origin = {"name": bundle.name, "digest": bundle.digest, "card": dict(bundle.card)}

    def result(self) -> Unrolled:
        """The trained model for a bundle, with the averaged weights where there is an average."""
        with self._averaged():
            return copy.deepcopy(self.model).cpu().eval()

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied(self.model)

    def resume(self) -> None:
        """Continue from the checkpoint; steps and hours may be more than they were.

        Raises
        ------
        DataError
            If there is none, or it is damaged.
        ConfigError
            If it was made by another configuration.
        """
        _, _, progress = checkpoint.read(self.checkpoint)
        differences = checkpoint.differences(self.config.to_dict(), progress.config)
        if differences:
            raise ConfigError(
                f"the checkpoint {self.checkpoint} was made with other settings ({', '.join(differences)}): "
                "resume with the same ones, or start in another output.directory."
            )
        steps = self.config.training.steps
        if steps is not None and steps < progress.step:
            raise ConfigError(f"{progress.step} steps are done already: set training.steps to more, not to {steps}.")
        progress = checkpoint.restore(self.checkpoint, self.model, self.optimiser, self.average)
        self.step, self.history = progress.step, [dict(h) for h in progress.history]
        self.seconds += progress.seconds
        self.origin = None if progress.origin is None else dict(progress.origin)
        # Trainings end a little before their limit, so that the last validation fits in: that is not to be made up for.
        up = progress.time_up and progress.config["training"]["max_hours"] == self.config.training.max_hours
        self._elapsed = 1.0 if up else min(self._part_of_time(), 1 - 1e-9)
        if progress.memory is not None and progress.config["memory"] == self.config.to_dict()["memory"]:
            # Not planned anew: a plan depends on a probe of the device, and another one would round differently.
            self.memory = MemoryPlan.from_dict(progress.memory)

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        if not self.team.leads:
            return
        memory = self.memory.to_dict() if self.memory else None
        history = tuple(self.history)
        progress = checkpoint.Progress(
            self.step, self.seconds, self.config.to_dict(), history, memory, self.origin, time_up=self._elapsed >= 1
        )
        checkpoint.save(self.checkpoint, self.model, self.optimiser, progress, self.average)

    def run(self) -> None:
        """Train from the present step to the last one, or until the time is up.

        Raises
        ------
        DivergedError
            If the loss or the gradient is not finite; the last checkpoint stays as it is.
        InterruptedTrainingError
            After `stop`, with the checkpoint saved.
        """
        settings = self.config.training
        while not self.finished:
            begin = time.perf_counter()
            figures = self.train_step()
            self.step += 1
            if self.average is not None:
                self.average.update(self.model, self.step)
            elapsed = time.perf_counter() - begin
            self.seconds += elapsed
            self.report(self.step, {**figures, "seconds": elapsed})
            last, begin = self.finished, time.perf_counter()
            if self.team.leads and (last or self.step % settings.validation_interval == 0):
                self.validate()
                self._spent_on_validation = time.perf_counter() - begin
                self.seconds += self._spent_on_validation
            # Processes that train together stop after the same step, one alone at once.
            stop = self._stop if self.team.size == 1 else self._agreed
            if last or stop or self.step % settings.checkpoint_interval == 0:
                self.save()
            if stop and not last:
                of = "" if settings.steps is None else f" of {settings.steps}"
                raise InterruptedTrainingError(
                    f"{stop} at step {self.step}{of}; {self.checkpoint} is saved: continue with --resume."
                )

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser on the examples that are due."""
        settings = self.config.optimiser
        self.model.train()
        members = schedule.members(self.step, self.examples, self.config)
        share = self.team.share(range(len(members)))
        # What is random in the network depends on the step and the process, so that it can be repeated.
        torch.manual_seed((step_seed(self.step, self.config) * 64 + self.team.rank) % (1 << 63))
        forget = lambda: self.optimiser.zero_grad(set_to_none=True)  # noqa: E731
        total, self.memory = retrying(self.memory, lambda plan: self._accumulate(members, share, plan), forget)
        self.team.add_gradients(self.model)
        time_over = self._part_of_time() if self.team.leads else 0.0
        total, stops, time_over = self.team.add(total, float(self._stop is not None), time_over, device=self.device)
        self._agreed = self._stop or "stopped by another process" if stops else None
        if self.step < settings.frozen_steps:
            for name, parameter in self.model.named_parameters():
                if ".regulariser." not in name:
                    parameter.grad = None
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise self._diverged(total, norm, members)
        rate = learning_rate(self.step, self.config, time_over)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimiser.step()
        self._elapsed = time_over
        return {"loss": total, "gradient": norm, "learning_rate": rate}

    def _check(self, example: Example, number: int) -> None:
        regulariser = self.model.iterations[0].regulariser
        name = schedule.describe(self.examples, number)
        check_layout(example, regulariser.dimensions, regulariser.sets, name)

    def _part_of_time(self) -> float:
        """Part of the time limit that is over, but for what the last validation will take."""
        hours = self.config.training.max_hours
        if hours is None:
            return 0.0
        return self.seconds / max(3600 * hours - self._spent_on_validation, 1e-3)

    def _diverged(self, loss: float, norm: float, members: Sequence[int]) -> DivergedError:
        saved = f"{self.checkpoint} keeps the last good state" if self.checkpoint.is_file() else "nothing was saved yet"
        which, advice = f"examples {members}", "Lower optimiser.learning_rate or optimiser.clip."
        if self._suspect is not None:
            which = f"example {schedule.describe(self.examples, self._suspect)}"
            if not finite(self.examples[self._suspect]):
                which, advice = f"{which}, whose data are not finite", "Remove or prepare it again."
        return DivergedError(
            f"step {self.step + 1} ({which}): the loss is {loss:g} and its gradient {norm:g}; {saved}. {advice}"
        )

    def _accumulate(self, members: Sequence[int], share: Sequence[int], plan: MemoryPlan | None) -> float:
        """Gradients of the mean loss of a batch, as far as the members in these places contribute, and that loss."""
        self.optimiser.zero_grad(set_to_none=True)
        total, seed, settings = 0.0, step_seed(self.step, self.config), self.config.training
        stage = schedule.stage(self.step, self.config)
        window = settings.readout_window if stage is None else stage.readout_window or settings.readout_window
        for position in share:
            generator = torch.Generator().manual_seed(seed * 64 + position)
            example = self.examples[members[position]]
            self._check(example, members[position])
            example = crop(example, window, generator)
            problem = self.objective.problem(example, generator, jitter=True)
            del example
            loss = self._loss(problem, plan, None if stage is None else stage.iterations) / len(members)
            loss.backward()  # type: ignore[no-untyped-call]
            value = float(loss.detach())
            if self._suspect is None and not math.isfinite(value):
                self._suspect = members[position]
            total += value
        return total

    def _loss(self, problem: Problem, plan: MemoryPlan | None, iterations: int | None = None) -> Tensor:
        """Loss of the model, or of its first iterations alone."""
        divisors = self.objective.divisors(problem)
        model = self.model
        if iterations is not None and iterations < len(model.order):
            model = copy.copy(model)  # the same parameters
            model.order = model.order[:iterations]
            plan = None if plan is None else replace(plan, iterations=plan.iterations[:iterations])
        with self._autocast():
            image = model.refine(problem.encoding, problem.initial, memory=plan)
        return self.objective.loss(image, problem, divisors)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Lower precision for the network; complex numbers, and with them all physics, stay as they are."""
        if self.config.training.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def validate(self) -> Metrics:
        """Judge the model on the held-out examples, beside the conventional methods."""
        conventional = {name: value for name, value in self.metrics.items() if name != "learned"}
        with self._averaged():
            self.metrics = evaluate(self.model, self.objective.problems(self.validation), conventional)
            self.history.append({"step": self.step, **self.metrics["learned"]})
            self.on_validation(self.step, self.metrics)
        return self.metrics
