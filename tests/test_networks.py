"""The regularisers: shapes, receptive fields, exact inverses, and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import random
from memory_cases import distance, encoding, gradients, model

from melcore.errors import ConfigError, ShapeError
from melcore.memory import IterationPlan, MemoryPlan, verify
from melcore.memory.executors.reverse import Reverse
from melcore.networks import CouplingCNN, LocalRegulariser, Regulariser, ResidualCNN, SpaceTimeCNN, UNet
from melcore.networks.layers import SpatialConvolution

NETWORKS: dict[str, Callable[[], Regulariser]] = {
    "resnet-2d": lambda: ResidualCNN(2, channels=3, layers=3),
    "resnet-3d-two-sets": lambda: ResidualCNN(3, channels=3, layers=3, sets=2, padding="reflect"),
    "spacetime": lambda: SpaceTimeCNN(2, channels=3, stages=2, padding="circular"),
    "coupling-2d": lambda: CouplingCNN(2, channels=3, blocks=3),
    "coupling-3d-two-sets": lambda: CouplingCNN(3, channels=3, blocks=2, sets=2),
    "unet-2d": lambda: UNet(2, channels=3, levels=2),
    "unet-3d-two-sets": lambda: UNet(3, channels=3, levels=1, sets=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_images_keep_their_shape_and_batches_their_independence(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    x = random((3, network.sets, 2, 3, 5, 9))
    with torch.no_grad():
        y = network(x)
        single = network(x[1:2])
    assert y.shape == x.shape
    torch.testing.assert_close(single, y[1:2], rtol=1e-12, atol=1e-12)
    assert 0 < float((y - x).norm()) < 10 * float(x.norm())


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("unet")])
def test_the_declared_halo_is_the_receptive_field(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    assert network.halo is not None
    sizes = [2 * halo + 3 for halo in network.halo]
    x = random((1, network.sets, *sizes))
    middle = tuple(size // 2 for size in sizes)
    leaf = x.clone().requires_grad_()
    network(leaf)[(0, 0, *middle)].abs().backward()
    assert leaf.grad is not None
    touched = leaf.grad[0].abs().sum(0) > 0
    for axis, (halo, size) in enumerate(zip(network.halo, sizes, strict=True)):
        reached = touched.any(dim=tuple(other for other in range(4) if other != axis)).nonzero().flatten()
        assert int(reached.min()) == size // 2 - halo
        assert int(reached.max()) == size // 2 + halo


@pytest.mark.parametrize("name", ["coupling-2d", "coupling-3d-two-sets"])
def test_coupling_networks_are_inverted_exactly(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    x = random((2, network.sets, 2, 3, 5, 9))
    assert isinstance(network, CouplingCNN)
    with torch.no_grad():
        torch.testing.assert_close(network.inverse(network(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", ["modl", "varnet"])
def test_reversing_coupling_networks_gives_the_gradients_of_autograd(scheme: str) -> None:
    made, problem = model(NETWORKS["coupling-2d"], scheme=scheme), encoding((1, 2, 6, 7))
    expected = gradients(made, problem, None)
    assert distance(gradients(made, problem, MemoryPlan.uniform("reverse", 3)), expected) < 1e-10
    verify(NETWORKS["coupling-2d"](), IterationPlan("reverse"))


def test_an_inverse_that_is_not_certified_falls_back_and_says_so() -> None:
    torch.manual_seed(0)
    network = CouplingCNN(2, channels=3, blocks=2).double()
    x, gradient = random((1, 1, 1, 1, 6, 7), seed=1), random((1, 1, 1, 1, 6, 7), seed=2)
    parameters = list(network.parameters())
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(network(leaf), [leaf, *parameters], gradient)
    network.blocks[0].inverse = lambda y: 1.1 * y  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="computed back through CouplingCNN was off by"):
        first, others = Reverse().vjp(network, x, gradient, (), parameters)
    for found, value in zip((first, *others), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, value)


def test_reversal_of_other_networks_falls_back() -> None:
    made, problem = model(NETWORKS["resnet-2d"]), encoding((1, 1, 6, 7))
    with pytest.warns(UserWarning, match="not made of invertible blocks"):
        gradients(made, problem, MemoryPlan.uniform("reverse", 3))


@pytest.mark.parametrize("executor", ["store", "checkpoint"])
def test_a_u_net_has_the_gradients_of_autograd(executor: Any) -> None:
    made, problem = model(NETWORKS["unet-2d"]), encoding((1, 1, 6, 7))
    expected = gradients(made, problem, None)
    assert distance(gradients(made, problem, MemoryPlan.uniform(executor, 3)), expected) < 1e-12


def test_wrong_settings_and_images_are_explained() -> None:
    with pytest.raises(ConfigError, match="at least 2 layers"):
        ResidualCNN(3, layers=1)
    with pytest.raises(ConfigError, match="at least 2 stages"):
        SpaceTimeCNN(2, stages=1)
    with pytest.raises(ConfigError, match="2 layers in it"):
        CouplingCNN(2, layers=1)
    with pytest.raises(ConfigError, match="at least 1 level"):
        UNet(2, levels=0)
    with pytest.raises(ConfigError, match="odd sizes"):
        SpatialConvolution(2, 2, dimensions=2, kernel=4)
    with pytest.raises(ConfigError, match="padding must be one of"):
        SpatialConvolution(2, 2, dimensions=2, padding="mirror")  # type: ignore[arg-type]
    for network in (ResidualCNN(2, channels=2, layers=2), UNet(2, channels=2, levels=1)):
        with pytest.raises(ShapeError, match="expects a complex image"):
            network(random((1, 2, 1, 1, 4, 4)))
    with pytest.raises(ConfigError, match="reflect padding by 1 needs more than 1"):
        ResidualCNN(2, channels=2, layers=2, padding="reflect").double()(random((1, 1, 1, 1, 4, 1)))


def test_features_and_images_convert_without_loss() -> None:
    x = random((2, 3, 2, 1, 4, 5))
    torch.testing.assert_close(LocalRegulariser.from_features(LocalRegulariser.to_features(x)), x, rtol=0, atol=0)
