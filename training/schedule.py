"""What is due at a step: examples, seeds, learning rate and stage, all of it a function of the step and the settings.

Only a training with a time limit depends on the clock too.
"""

import math
from collections.abc import Sequence

import torch

from training.config import Config, Stage
from training.example import Example


def learning_rate(step: int, config: Config, elapsed: float = 0.0) -> float:
    """Of step `step`, counted from 0: linear rise, then half a cosine down to the final fraction.

    Parameters
    ----------
    step, config
        Which step of which training.
    elapsed
        Part of `training.max_hours` that is over. The cosine follows it or the steps, whichever are further: so it has
        come to its end when the training does, for either reason.
    """
    settings, steps = config.optimiser, config.training.steps
    if step < settings.warm_up:
        return settings.learning_rate * (step + 1) / (settings.warm_up + 1)
    done = 0.0 if steps is None else (step - settings.warm_up) / max(steps - settings.warm_up, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(done, elapsed), 1.0)))
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * cosine)


def order(step: int, count: int, config: Config) -> list[int]:
    """Examples of step `step`: every epoch is a permutation of all `count` that depends on the seed and the epoch."""
    batch, chosen = config.training.batch, []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, count)
        generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + epoch)
        chosen.append(int(torch.randperm(count, generator=generator)[index]))
    return chosen


def members(step: int, examples: Sequence[Example], config: Config) -> list[int]:
    """Numbers of the examples of a step: in any order of a list, and the next ones of a stream, which has no end."""
    count = length(examples)
    if count is not None:
        return order(step, count, config)
    batch = config.training.batch
    return list(range(step * batch, (step + 1) * batch))


def length(examples: Sequence[Example]) -> int | None:
    """How many there are; None for streams without end."""
    try:
        return len(examples)
    except TypeError:
        return None


def describe(examples: Sequence[Example], number: int) -> str:
    """An example's number, and what or where it is, as far as its list knows."""
    paths, words = getattr(examples, "paths", None), getattr(examples, "describe", None)
    if words is not None:
        return f"{number} ({words(number)})"
    return f"{number} ({paths[number]})" if paths else str(number)


def stage(step: int, config: Config) -> Stage | None:
    """The part of the curriculum that a step belongs to; None behind the last one."""
    return next((part for part in config.training.curriculum if step < part.until_step), None)


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


def sigma_factor(sigma_jitter: float, generator: torch.Generator) -> float:
    """Factor by which the noise level that a model is told is wrong; estimates are, where there is no noise scan."""
    exponent = 2 * float(torch.rand((), generator=generator, dtype=torch.float64)) - 1
    return (1 + sigma_jitter) ** exponent
