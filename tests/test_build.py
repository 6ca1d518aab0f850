"""Models from descriptions: right ones are built, wrong ones are explained."""

from typing import Any

import pytest
import torch

from melcore.errors import ConfigError
from melcore.networks import SpaceTimeCNN
from melcore.networks.noise_curve import weight_of
from melcore.unrolled import MoDL, build

RESNET: dict[str, Any] = {"name": "resnet", "dimensions": 3, "channels": 4, "layers": 3}


def test_shared_and_separate_weights() -> None:
    shared = build({"iterations": 4, "regulariser": RESNET})
    separate = build({"iterations": 4, "shared": False, "regulariser": RESNET})
    assert len(shared.iterations) == len(separate.iterations) == 4
    count = [sum(p.numel() for p in model.parameters()) for model in (shared, separate)]
    assert count[1] == 4 * count[0]


def test_options_reach_their_parts() -> None:
    model = build(
        {
            "scheme": "modl",
            "iterations": 1,
            "mu": 20.0,
            "cg_iterations": 7,
            "regulariser": {"name": "spacetime", "dimensions": 2, "channels": 6, "time_padding": "circular"},
        }
    )
    (iteration,) = model.iterations
    assert isinstance(iteration, MoDL)
    assert isinstance(iteration.regulariser, SpaceTimeCNN)
    assert float(weight_of(iteration.mu, torch.tensor([0.1])).detach()) == pytest.approx(0.2)
    assert iteration.cg_iterations == 7
    assert iteration.regulariser.layers[1].padding == "circular"


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"scheme": "model", "regulariser": RESNET}, "no scheme 'model': did you mean 'modl'"),
        ({"regulariser": {**RESNET, "name": "resnt"}}, "no regulariser 'resnt': did you mean 'resnet'"),
        ({"regulariser": {**RESNET, "chanels": 3}}, "'chanels': did you mean 'channels'"),
        ({"regulariser": RESNET, "cg_iteration": 3}, "'cg_iteration': did you mean 'cg_iterations'"),
        ({"regulariser": {"name": "resnet"}}, "dimensions"),
        ({"iterations": 0, "regulariser": RESNET}, "at least 1, but is 0"),
        ({"iterations": 2.5, "regulariser": RESNET}, r"at least 1, but is 2\.5"),
        ({"mu": -1, "regulariser": RESNET}, "mu > 0"),
        ({}, "needs a regulariser"),
    ],
)
def test_wrong_descriptions_are_explained(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(architecture)
