"""From a description to a model: what a configuration file and a bundle's card hold."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from melcore.errors import ConfigError, unknown
from melcore.networks import CouplingCNN, Regulariser, ResidualCNN, SpaceTimeCNN, UNet, shrinkages
from melcore.unrolled.admm import ADMM
from melcore.unrolled.iteration import Iteration
from melcore.unrolled.model import Unrolled
from melcore.unrolled.modl import MoDL
from melcore.unrolled.primal_dual import PrimalDual
from melcore.unrolled.proximal_gradient import ProximalGradient
from melcore.unrolled.varnet import VarNet

REGULARISERS: Mapping[str, Callable[..., Regulariser]] = {
    "coupling": CouplingCNN,
    "resnet": ResidualCNN,
    "spacetime": SpaceTimeCNN,
    "unet": UNet,
}
SCHEMES: Mapping[str, Callable[..., Iteration]] = {
    "admm": ADMM,
    "modl": MoDL,
    "primal_dual": PrimalDual,
    "proximal_gradient": ProximalGradient,
    "varnet": VarNet,
}

_SHRINKAGE = "shrinkage"


def build(architecture: Mapping[str, Any]) -> Unrolled:
    """Make an untrained model from its description.

    Parameters
    ----------
    architecture
        ``scheme`` (a name in `SCHEMES`), ``iterations``, ``shared`` (one set of weights for all iterations; default
        true), ``regulariser`` with its ``name`` (in `REGULARISERS`), and whatever keyword options the scheme and the
        regulariser take. The scheme ``primal_dual`` goes with the regulariser ``shrinkage``, whose options are those of
        `melcore.networks.shrinkages`.

    Raises
    ------
    ConfigError
        On an unknown or missing entry; the message names the nearest known one.

    Examples
    --------
    >>> model = build({"scheme": "modl", "iterations": 5, "mu": 0.1,
    ...                "regulariser": {"name": "resnet", "dimensions": 3, "channels": 16, "layers": 3}})
    >>> len(model.iterations)
    5
    """
    options = dict(architecture)
    scheme = _choose(SCHEMES, options.pop("scheme", "modl"), "scheme")
    count, shared = options.pop("iterations", 5), options.pop("shared", True)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"iterations must be a whole number of at least 1, but is {count!r}.")
    description = options.pop("regulariser", None)
    if not isinstance(description, Mapping) or "name" not in description:
        raise ConfigError(f"the model needs a regulariser with a name, one of {', '.join(sorted(REGULARISERS))}.")
    inner = dict(description)
    if (scheme is PrimalDual) != (inner["name"] == _SHRINKAGE):
        raise ConfigError(
            f"the scheme primal_dual and the regulariser {_SHRINKAGE} belong together, but the model has the scheme "
            f"{architecture.get('scheme', 'modl')!r} and the regulariser {inner['name']!r}."
        )
    if scheme is PrimalDual:
        del inner["name"]
        regularisers = _call(shrinkages, inner, "regulariser option", count)
        steps = [_call(PrimalDual, options, "scheme option", step) for step in regularisers]
        # Nothing follows the last extrapolation: a gradient that never comes would stop distributed training.
        steps[-1].relaxation.requires_grad_(False)
        return Unrolled(steps)
    regulariser = _choose(REGULARISERS, inner.pop("name"), "regulariser")
    return Unrolled.repeat(
        lambda: _call(scheme, options, "scheme option", _call(regulariser, inner, "regulariser option")),
        count,
        shared=bool(shared),
    )


def _choose(registry: Mapping[str, Any], name: Any, what: str) -> Any:
    if name not in registry:
        raise unknown(what, str(name), registry)
    return registry[name]


def _call(make: Callable[..., Any], options: Mapping[str, Any], what: str, *arguments: Any) -> Any:
    parameters = list(inspect.signature(make).parameters)[len(arguments) :]
    for key in options:
        if key not in parameters:
            raise unknown(what, key, parameters)
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise ConfigError(f"the {what}s {dict(options)} do not fit: {error}.") from error
