"""What happens to weights beside the steps of the optimiser: groups of them, their running average, a warm start."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from melcore.bundle import Bundle
from melcore.errors import ConfigError, unknown
from melcore.networks.shrinkage import shrinkages
from melcore.unrolled import Unrolled
from melcore.unrolled.build import REGULARISERS, SCHEMES
from training.config import OptimiserSettings


def groups(model: Unrolled, settings: OptimiserSettings) -> list[dict[str, Any]]:
    """Parameter groups for the optimiser, each with the ``factor`` by which its learning rate is multiplied.

    Raises
    ------
    ConfigError
        If a key of ``optimiser.factors`` is in no parameter's name.
    """
    proposed: dict[str, float] = {}
    for iteration in model.distinct:
        declared = getattr(iteration, "learning_rates", None)
        proposed |= {} if declared is None else dict(declared())
    names = [name for name, _ in model.named_parameters()]
    for key in settings.factors:
        if not any(key in name for name in names):
            raise unknown("parameter for optimiser.factors", key, {name.rsplit(".", 1)[-1] for name in names})
    factors = {**settings.factors, **{key: value for key, value in proposed.items() if key not in settings.factors}}
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = next((value for key, value in factors.items() if key in name), 1.0)
        found.setdefault(float(factor), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in sorted(found.items())]


class Average:
    """Running average of a model's weights, which generalises better than the last ones.

    Parameters
    ----------
    model
        Whose weights.
    decay
        Part of the average that a step keeps; less in the first steps, in which it would hold untrained weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after step `step`, counted from 1, into account."""
        part = 1 - min(self.decay, step / (step + 9))
        for name, value in model.state_dict().items():
            mean = self.values[name]
            if value.is_floating_point() or value.is_complex():
                mean.lerp_(value.to(mean), part)
            else:
                mean.copy_(value)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take an average over from a checkpoint; `KeyError` if it lacks a part."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the average be the model's weights for a while."""
        present = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(present)


# What may differ between a bundle and the model that begins from it, beside iterations that share their weights.
_OPTIONS = {"iterations", "mu", "rho", "step", "relaxation", "cg_iterations", "relative_tolerance", "gradient"}


def begin_from(model: Unrolled, architecture: Mapping[str, Any], bundle: Bundle) -> None:
    """Copy a bundle's weights into a model.

    Raises
    ------
    ConfigError
        If they are of another architecture; other numbers of iterations will do where all share their weights.
    """
    differences = _differences(_plain(architecture), _plain(bundle.architecture))
    if differences:
        raise ConfigError(
            f"the bundle {bundle.name} has another architecture ({'; '.join(differences)}): set the same in the "
            "configuration, or train without --from."
        )
    weights, own = bundle.model.state_dict(), model.state_dict()
    fitting = all(name in weights and weights[name].shape == value.shape for name, value in own.items())
    if not fitting or weights.keys() != own.keys():
        theirs, ours = len(bundle.model.order), len(model.order)
        raise ConfigError(
            f"the bundle {bundle.name} has {theirs} iterations with weights of their own, and this model {ours}: set "
            f"model.iterations={theirs}."
        )
    model.load_state_dict(weights)


def _plain(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture with its defaults written out, without what `begin_from` allows to differ."""
    scheme = SCHEMES[architecture.get("scheme", "modl")]
    regulariser = dict(architecture["regulariser"])
    regulariser = {**_defaults(REGULARISERS.get(regulariser["name"], shrinkages)), **regulariser}
    regulariser.pop("dropout", None)
    content = {"scheme": "modl", "shared": True, **_defaults(scheme), **architecture, "regulariser": regulariser}
    return {key: value for key, value in content.items() if key not in _OPTIONS}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = sorted({*ours, *theirs})
        return [d for name in names for d in _differences(ours.get(name), theirs.get(name), f"{prefix}{name}.")]
    if ours == theirs:
        return []
    words = ["left out" if value is None else repr(value) for value in (theirs, ours)]
    return [f"model.{prefix.rstrip('.')} is {words[0]} there, {words[1]} here"]
