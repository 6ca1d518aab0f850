"""The executors that take a regulariser to pieces: boxes with a halo, and single layers."""

from typing import Any, get_args

import pytest
import torch
from memory_cases import NETWORKS, distance, encoding, gradients, model
from test_memory_stream import MODES, assert_exact, prepared
from torch import nn

from melcore.memory import MemoryPlan
from melcore.memory.executors.nested import Nested
from melcore.memory.executors.tile import Tile
from melcore.memory.plan import Way
from melcore.memory.streaming.convolution import convolve, weight_gradients
from melcore.networks import CouplingCNN, LocalRegulariser, Regulariser, ResidualCNN, SpaceTimeCNN
from melcore.networks.layers import SpatialConvolution


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("mode", MODES)
def test_boxes_are_exact_at_the_faces_and_inside(mode: Any, chunk: int) -> None:
    regulariser = prepared(ResidualCNN(3, channels=3, layers=3, padding=mode))
    for shape in [(1, 1, 1, 3, 2, 9), (2, 1, 2, 7, 8, 2), (1, 1, 1, 9, 10, 3)]:
        assert_exact(Tile(chunk), regulariser, shape)


@pytest.mark.parametrize("mode", MODES)
def test_boxes_of_space_time_networks_keep_time_whole(mode: Any) -> None:
    regulariser = prepared(SpaceTimeCNN(2, channels=3, stages=2, padding=mode, time_padding="circular"))
    assert_exact(Tile(3), regulariser, (1, 1, 4, 2, 8, 9))


@pytest.mark.parametrize("mode", MODES)
def test_boxes_of_coupling_networks_continue_as_their_layers_do(mode: Any) -> None:
    regulariser = CouplingCNN(3, channels=3, blocks=1, layers=2, padding=mode)
    assert_exact(Tile(3), prepared(regulariser), (1, 1, 1, 9, 10, 11))


def test_an_axis_that_continues_in_two_ways_is_not_cut() -> None:
    layers = [
        SpatialConvolution(2, 3, dimensions=3, padding="circular"),
        SpatialConvolution(3, 2, dimensions=3, slope=1.0),
    ]
    assert_exact(Tile(2), prepared(LocalRegulariser(layers, dimensions="3d", sets=1)), (1, 1, 1, 3, 4, 7))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_single_layers_are_exact(network: Any) -> None:
    regulariser = prepared(network.make())
    assert_exact(Nested(), regulariser, (2, 1, *network.matrix))


class Opaque(Regulariser):
    """A regulariser that only declares its halo."""

    dimensions, sets = "2d", 1
    halo = (0, 0, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.view_as_real(x[:, 0, 0, 0]).permute(0, 3, 1, 2)
        features = self.second(torch.tanh(self.first(features)))
        return x + torch.view_as_complex(features.permute(0, 2, 3, 1).contiguous())[:, None, None, None]


def test_an_opaque_module_runs_in_boxes_if_it_declares_its_halo() -> None:
    made, problem = model(Opaque), encoding((1, 1, 9, 11))
    expected = gradients(made, problem, None)
    assert distance(gradients(made, problem, MemoryPlan.uniform("tile", 3, chunk=3)), expected) < 1e-12


@pytest.mark.parametrize("executor", ["stream", "nested"])
def test_an_opaque_module_falls_back_with_the_reason(executor: Any) -> None:
    made, problem = model(Opaque), encoding((1, 1, 9, 11))
    expected = gradients(made, problem, None)
    with pytest.warns(UserWarning, match=rf"cannot be executed as {executor}: Opaque is not .*; store it is"):
        found = gradients(made, problem, MemoryPlan.uniform(executor, 3))
    assert distance(found, expected) < 1e-12


def test_a_layered_module_that_cannot_stream_falls_back_to_single_layers() -> None:
    def make() -> LocalRegulariser:
        layers = [
            SpatialConvolution(2, 3, dimensions=3, padding="circular"),
            SpatialConvolution(3, 2, dimensions=3, slope=1.0),
        ]
        return LocalRegulariser(layers, dimensions="3d", sets=1)

    made, problem = model(make), encoding((1, 3, 4, 5))
    expected = gradients(made, problem, None)
    with pytest.warns(UserWarning, match="different ways along the readout; nested it is"):
        found = gradients(made, problem, MemoryPlan.uniform("stream", 3))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("way", get_args(Way))
@pytest.mark.parametrize("halo", [[0, 1, 1], [1, 1, 1], [2, 0, 2]])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_of_convolving_is_the_same(way: Way, halo: list[int], batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    planes = torch.randn(batch, 6, 5, 7, 3, dtype=dtype, generator=generator).movedim(-1, 1)
    weight = torch.randn(4, 3, 3, 3, 3, dtype=dtype, generator=generator)
    bias = torch.randn(4, dtype=dtype, generator=generator)
    expected = torch.nn.functional.conv3d(planes.double(), weight.double(), bias.double(), padding=halo)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    found = convolve(planes, weight, bias, halo, way)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    leaves = [tensor.double().requires_grad_() for tensor in (weight, bias)]
    upstream = torch.randn(expected.shape, dtype=dtype, generator=generator)
    output = torch.nn.functional.conv3d(planes.double(), *leaves, padding=halo)
    gradients = torch.autograd.grad(output, leaves, upstream.double())
    for ours, reference in zip(weight_gradients(upstream, planes, weight, halo, way), gradients, strict=True):
        torch.testing.assert_close(ours.double(), reference, **tolerance)


@pytest.mark.parametrize("way", get_args(Way))
def test_every_way_convolves_slices(way: Way) -> None:
    generator = torch.Generator().manual_seed(4)
    planes, weight = torch.randn(2, 3, 6, 5, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)
    expected = torch.nn.functional.conv2d(planes, weight, padding=(0, 1))
    torch.testing.assert_close(convolve(planes, weight, None, [0, 1], way), expected)
