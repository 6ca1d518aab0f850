"""The wavefront: exact for every shape, chunk and way to continue the volume, and what it holds is bounded."""

import copy
import itertools
from typing import Any

import pytest
import torch
from laws import random
from memory_cases import NETWORKS, distance, encoding, gradients, model
from torch import Tensor

from melcore.errors import ConfigError
from melcore.memory import IterationPlan, MemoryPlan, demoted, verify
from melcore.memory.executors.stream import Keep, Stream, why_not
from melcore.memory.meter import Meter
from melcore.memory.protocols import ExecutorLike
from melcore.memory.streaming.schedule import Wavefront, capacity
from melcore.networks import LocalRegulariser, ResidualCNN, SpaceTimeCNN
from melcore.networks.layers import SpatialConvolution, TemporalConvolution

MODES = ("zeros", "replicate", "reflect", "circular")


def prepared(regulariser: LocalRegulariser) -> LocalRegulariser:
    """The regulariser in double precision, with biases that matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in regulariser.parameters():
            parameter.normal_(std=0.3)
    return regulariser.double()


def assert_exact(
    executor: ExecutorLike, regulariser: LocalRegulariser, shape: tuple[int, ...], bound: float = 1e-12
) -> None:
    """Output and all gradients equal autograd's."""
    x, gradient = random(shape, seed=1).requires_grad_(), random(shape, seed=2)
    parameters = list(regulariser.parameters())
    expected = regulariser(x)
    expected_gradients = torch.autograd.grad(expected, [x, *parameters], gradient)
    with torch.no_grad():
        output, kept = executor.forward(regulariser, x.detach())
        first, others = executor.vjp(regulariser, x.detach(), gradient, kept, parameters)
    pairs: list[tuple[Tensor | None, Tensor]] = [(output, expected.detach())]
    pairs += zip((first, *others), expected_gradients, strict=True)
    for found, value in pairs:
        assert found is not None
        assert float((found - value).norm()) <= bound * float(value.norm())


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize(
    # Reflection needs two samples: the layers refuse it on one.
    ("mode", "size"),
    [(mode, size) for mode in MODES for size in (1, 2, 4, 7, 13) if mode != "reflect" or size > 1],
)
def test_volumes_of_every_length_are_exact(mode: Any, size: int, chunk: int) -> None:
    regulariser = prepared(ResidualCNN(3, channels=3, layers=4, padding=mode))
    assert_exact(Stream(chunk), regulariser, (1, 1, 1, 3, 2, size))


@pytest.mark.parametrize("kept", [0, 1, 2, None])
@pytest.mark.parametrize("mode", MODES)
def test_kept_activations_are_exact(mode: Any, kept: int | None) -> None:
    regulariser = prepared(ResidualCNN(3, channels=3, layers=5, padding=mode))
    for chunk, size in itertools.product((1, 3, 100), (2, 5, 12)):
        assert_exact(Keep(chunk, kept), regulariser, (1, 1, 1, 2, 3, size))


def test_activations_kept_in_half_the_bytes_are_nearly_exact() -> None:
    regulariser = ResidualCNN(3, channels=8, layers=5)
    x, gradient = (random((1, 1, 1, 5, 6, 9), torch.complex64, seed=seed) for seed in (1, 2))
    results = []
    for dtype in (None, torch.bfloat16):
        executor = Keep(4, None, dtype)
        _, kept = executor.forward(regulariser, x)
        assert all(tensor.dtype == (dtype or torch.float32) for tensor in kept)
        assert len(kept) == 3  # of the inputs of five layers: not the image, and not the first expansion
        results.append(executor.vjp(regulariser, x, gradient, kept, list(regulariser.parameters())))
    for exact, found in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        assert exact is not None
        assert found is not None
        assert float((found - exact).norm()) < 0.01 * float(exact.norm())


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_wide_kernels_are_exact(mode: Any, chunk: int) -> None:
    regulariser = prepared(ResidualCNN(2, channels=3, layers=3, kernel=5, padding=mode, sets=2))
    for size in (3, 6, 11):
        assert_exact(Stream(chunk), regulariser, (2, 2, 2, 2, 4, size))


@pytest.mark.parametrize(
    ("mode", "time_mode"), [("zeros", "circular"), ("reflect", "replicate"), ("circular", "reflect")]
)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_space_time_networks_are_exact(dimensions: int, mode: Any, time_mode: Any) -> None:
    network = SpaceTimeCNN(dimensions, channels=3, stages=2, padding=mode, time_padding=time_mode, time_kernel=5)
    for chunk, shape in itertools.product((1, 3), [(2, 1, 4, 3, 2, 5), (1, 1, 3, 2, 3, 2)]):
        assert_exact(Stream(chunk), prepared(network), shape)


@pytest.mark.parametrize(
    ("mode", "size"),
    [(mode, size) for mode in MODES for size in (1, 2, 5) if mode != "reflect" or size > 1],
)
def test_series_of_every_length_are_exact_along_time(mode: Any, size: int) -> None:
    network = prepared(SpaceTimeCNN(2, channels=3, stages=2, time_padding=mode))
    for chunk in (1, 2, 3, 100):
        assert_exact(Stream(chunk, "time"), network, (1, 1, size, 1, 3, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_long_kernels_and_batches_are_exact_along_time(dimensions: int, mode: Any) -> None:
    space: Any = MODES[(MODES.index(mode) + 1) % 4]  # not the same in space as in time
    network = SpaceTimeCNN(dimensions, channels=3, stages=2, padding=space, time_padding=mode, time_kernel=5)
    for chunk, shape in itertools.product((1, 4), [(2, 1, 6, 3, 2, 5), (1, 1, 3, 2, 3, 2)]):
        executor = Stream(chunk, "time") if chunk == 1 else Keep(chunk, 1, None, "time")
        assert_exact(executor, prepared(network), shape)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_networks_without_time_are_exact_frame_by_frame(dimensions: int) -> None:
    network = prepared(ResidualCNN(dimensions, channels=3, layers=3, padding="circular"))
    for chunk in (1, 3):
        assert_exact(Stream(chunk, "time"), network, (2, 1, 4, 3, 2, 5))


def test_single_precision_is_exact_along_time_whichever_kernel_torch_takes() -> None:
    """A small single image is cut in two for the fast kernel; frames are padded where they are cut."""
    network = SpaceTimeCNN(2, channels=4, stages=2)
    exact, x, gradient = copy.deepcopy(network).double(), *(random((1, 1, 3, 1, 7, 6), seed=seed) for seed in (1, 2))
    expected = Stream(3, "time").vjp(exact, x, gradient, (), list(exact.parameters()))
    with torch.no_grad():
        inputs = (x.to(torch.complex64), gradient.to(torch.complex64))
        found = Stream(1, "time").vjp(network, *inputs, (), list(network.parameters()))
    for value, truth in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert value is not None
        assert truth is not None
        assert float((value - truth).norm()) < 1e-5 * float(truth.norm())


def test_layers_that_differ_in_kernel_and_slope_are_exact() -> None:
    layers = [
        SpatialConvolution(2, 4, dimensions=3, kernel=1, slope=0.0),
        SpatialConvolution(4, 3, dimensions=3, kernel=5, slope=1.0),
        SpatialConvolution(3, 5, dimensions=2, kernel=3, slope=0.3),
        SpatialConvolution(5, 2, dimensions=3, kernel=3, slope=1.0),
    ]
    regulariser = prepared(LocalRegulariser(layers, dimensions="3d", sets=1))
    for chunk in (1, 3, 50):
        assert_exact(Stream(chunk), regulariser, (1, 1, 1, 4, 3, 9))


def test_what_cannot_be_streamed_says_why() -> None:
    chain = [
        SpatialConvolution(2, 4, dimensions=3, padding="circular"),
        SpatialConvolution(4, 2, dimensions=3, slope=1.0),
    ]
    mixed = LocalRegulariser(chain, dimensions="3d", sets=1)
    assert "different ways" in (why_not(mixed) or "")
    chain[1].slope, chain[0].padding = 0.1, "zeros"
    assert "last layer has an activation" in (why_not(mixed) or "")
    chain[1].slope, chain[0].slope = 1.0, -0.1
    assert "negative slope" in (why_not(mixed) or "")
    assert "not made of local layers" in (why_not(torch.nn.Identity()) or "")
    assert why_not(ResidualCNN(3)) is None
    chain = [TemporalConvolution(2, 3, padding="circular"), TemporalConvolution(3, 2, slope=1.0)]
    mixed = LocalRegulariser(chain, dimensions="2d+t", sets=1)
    assert why_not(mixed) is None
    assert "different ways along time" in (why_not(mixed, "time") or "")


def test_what_a_sweep_holds_does_not_grow_with_the_volume() -> None:
    held = [capacity(Wavefront(size, [1] * 5, 8, backward=True)) for size in (64, 640)]
    assert held[0] == held[1]
    # By hand, for chunk c and depth 5: signal i waits for the gradient of layer i, which is 2 (5 - i) planes behind.
    assert all(planes <= 8 + 2 * (5 - index) + 8 for index, planes in enumerate(held[0].signals))
    assert all(planes <= 2 * 8 + 4 for planes in held[0].gradients)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_what_a_sweep_along_time_holds_does_not_grow_with_the_frames(mode: Any, backward: bool) -> None:
    network = SpaceTimeCNN(2, channels=8, stages=2, padding="circular", time_padding=mode)
    peaks = []
    for frames in (24, 36):
        x = random((1, 1, frames, 1, 6, 7), torch.complex64)
        with Meter() as meter, torch.no_grad():
            executor = Stream(2, "time")
            result = executor.vjp(network, x, x, (), ())[0] if backward else executor.forward(network, x)[0]
            assert result is not None
            peaks.append(meter.peak - result.untyped_storage().nbytes())
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("executor", ["stream", "keep"])
def test_streams_along_time_pass_the_self_check_and_wrong_networks_do_not(executor: Any) -> None:
    plan = IterationPlan(executor, chunk=8, axis="time")
    verify(SpaceTimeCNN(2, channels=3, stages=2), plan)
    verify(ResidualCNN(2, channels=3, layers=3), plan)

    class Averaging(ResidualCNN):
        """Frames depend on each other behind the back of the layers."""

        def forward(self, x: Tensor, *noise: Any) -> Tensor:
            return super().forward(x + x.mean(2, keepdim=True), *noise)

    with pytest.raises(ConfigError, match=f"Averaging executed as {executor} along time differs"):
        verify(Averaging(2, channels=3, layers=3), plan)


def test_a_plan_says_along_what_it_streams() -> None:
    assert IterationPlan("stream", chunk=8, axis="time").describe()[0] == "stream 8 along time"
    assert IterationPlan("stream", chunk=8).describe()[0] == "stream 8"
    cheaper = demoted(MemoryPlan.uniform("keep", 2, kept_layers=1, axis="time", states="host"))
    assert cheaper is not None
    assert cheaper.iterations[0] == IterationPlan("stream", axis="time", states="host")
    with pytest.raises(ConfigError, match=r"no axis to stream along 'z': choose one of readout, time"):
        IterationPlan("stream", axis="z")  # type: ignore[arg-type]


@pytest.mark.parametrize("executor", ["stream", "keep"])
def test_in_half_precision_streams_are_as_near_to_the_truth_as_autograd(executor: Any) -> None:
    network = NETWORKS[1]
    exact = gradients(model(network.make), encoding(network.matrix), None)
    made = model(network.make, dtype=torch.float32)
    problem = encoding(network.matrix, dtype=torch.complex64)
    errors = []
    for plan in (None, MemoryPlan.uniform(executor, 3, chunk=4)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(made, problem, plan)
        assert all(value.dtype in (torch.float32, torch.complex64) for value in found.values())
        errors.append(distance(found, exact))
    assert 1e-5 < errors[1] <= 1.5 * errors[0]
