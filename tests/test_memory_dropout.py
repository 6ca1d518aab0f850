"""Dropout: noise that depends on the place alone, so that every way to execute a network meets the same."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import random
from memory_cases import distance, encoding, gradients, model
from test_memory_stream import MODES, prepared
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.memory import MemoryPlan
from melcore.memory.executors import why_not
from melcore.memory.executors.nested import Nested
from melcore.memory.executors.stream import Keep, Stream
from melcore.memory.executors.tile import Tile
from melcore.memory.executors.whole import Whole
from melcore.memory.meter import Meter, fake_tensors
from melcore.memory.protocols import ExecutorLike
from melcore.networks import CouplingCNN, LocalRegulariser, ResidualCNN, SpaceTimeCNN
from melcore.networks.dropout import Noise
from melcore.unrolled import build
from melcore.unrolled.planning import costs

RATE = 0.3
Make = Callable[[Any], LocalRegulariser]
# What is made for a way to continue the volume, and (time, z, y, x) of images for it.
CASES: dict[str, tuple[Make, tuple[int, int, int, int]]] = {
    "2d": (lambda mode: ResidualCNN(2, channels=4, layers=4, padding=mode, dropout=RATE), (2, 2, 5, 7)),
    "3d": (lambda mode: ResidualCNN(3, channels=3, layers=3, padding=mode, dropout=RATE), (1, 4, 3, 8)),
    "2d+t": (
        lambda mode: SpaceTimeCNN(2, channels=3, stages=2, padding=mode, time_padding=mode, dropout=RATE),
        (5, 1, 4, 6),
    ),
    "3d+t": (
        lambda mode: SpaceTimeCNN(3, channels=3, stages=2, padding=mode, time_padding=mode, dropout=RATE),
        (4, 3, 2, 5),
    ),
}
EXECUTORS: dict[str, list[ExecutorLike]] = {
    "store": [Whole()],
    "nested": [Nested()],
    "tile": [Tile(3)],
    "stream": [Stream(1), Stream(3)],
    "stream-time": [Stream(2, "time")],
    "keep": [Keep(2), Keep(3, 1, None, "time")],
}


def by_autograd(network: LocalRegulariser, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    output = network(leaf)
    found = torch.autograd.grad(output, [leaf, *network.parameters()], gradient)
    return {"output": output.detach(), "next": torch.rand(1), **{str(i): value for i, value in enumerate(found)}}


def by_executor(executor: ExecutorLike, network: LocalRegulariser, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        torch.manual_seed(7)
        output, kept = executor.forward(network, x)
        following = torch.rand(1)
        torch.manual_seed(7)
        first, others = executor.vjp(network, x, gradient, kept, list(network.parameters()))
    found = {str(i): value for i, value in enumerate((first, *others)) if value is not None}
    return {"output": output, "next": following, **found}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_executor_meets_the_noise_of_autograd(case: str, mode: Any, executor: str) -> None:
    make, matrix = CASES[case]
    network = prepared(make(mode))
    x, gradient = (random((2, 1, *matrix), seed=seed) for seed in (1, 2))
    expected = by_autograd(network, x, gradient)
    for one in EXECUTORS[executor]:
        assert distance(by_executor(one, network, x, gradient), expected) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_noise_wraps_around_short_circles(size: int) -> None:
    network = prepared(ResidualCNN(3, channels=3, layers=5, padding="circular", dropout=RATE))
    x, gradient = (random((1, 1, 1, 2, 3, size), seed=seed) for seed in (1, 2))
    expected = by_autograd(network, x, gradient)
    for executor in (Stream(1), Stream(4), Tile(3)):
        assert distance(by_executor(executor, network, x, gradient), expected) < 1e-12


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("checkpoint", {}),
    ("store", {"keep_input": True, "states": "host"}),
    ("keep", {"chunk": 3}),
    ("nested", {}),
    ("tile", {"chunk": 3}),
    ("stream", {"chunk": 3, "hold_physics": False}),
    ("stream", {"chunk": 2, "axis": "time", "keep_input": True}),
    ("stream", {"chunk": 4, "states": "slots"}),
]


@pytest.mark.parametrize(("executor", "options"), PLANS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PLANS)])
def test_models_have_the_gradients_of_autograd(executor: Any, options: dict[str, Any]) -> None:
    make, matrix = CASES["2d+t"]
    made, problem = model(lambda: make("circular"), scheme="varnet"), encoding(matrix, batch=2)
    results = []
    for plan in (None, MemoryPlan.uniform(executor, 3, **options)):
        torch.manual_seed(11)
        results.append(gradients(made, problem, plan) | {"next random number": torch.rand(1)})
    assert distance(results[1], results[0]) < 1e-12
    torch.manual_seed(12)  # as another process of a distributed run has it
    assert distance(gradients(made, problem, plan), {k: results[0][k] for k in results[0] if "next" not in k}) > 0.1


@pytest.mark.parametrize("executor", ["store", "stream", "keep", "tile"])
def test_in_half_precision_the_noise_is_the_same(executor: Any) -> None:
    make, matrix = CASES["3d"]
    torch.manual_seed(11)
    exact = gradients(model(lambda: make("zeros")), encoding(matrix), None)
    made, problem = model(lambda: make("zeros"), dtype=torch.float32), encoding(matrix, dtype=torch.complex64)
    errors = []
    for plan in (None, MemoryPlan.uniform(executor, 3, chunk=4)):
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append(distance(gradients(made, problem, plan), exact))
    assert 1e-5 < errors[1] <= 1.5 * errors[0] + 1e-3


def test_every_iteration_draws_its_own_noise_and_a_seed_repeats_it() -> None:
    network = prepared(CASES["3d"][0]("zeros"))
    x = random((1, 1, 1, 4, 3, 8))
    with torch.no_grad():
        torch.manual_seed(3)
        first, second = network(x), network(x)
        torch.manual_seed(3)
        again = network(x)
    assert torch.equal(first, again)
    assert float((first - second).norm()) > 0.01 * float(first.norm())


def test_nothing_is_drawn_in_evaluation_or_without_dropout() -> None:
    x = random((1, 1, 1, 4, 3, 8))
    dropping = prepared(ResidualCNN(3, channels=3, layers=3, dropout=0.5)).eval()
    bare = prepared(ResidualCNN(3, channels=3, layers=3))
    bare.load_state_dict(dropping.state_dict())
    before = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(dropping(x), bare(x))
        assert torch.equal(Stream(3).forward(dropping, x)[0], Stream(3).forward(bare, x)[0])
    assert torch.equal(torch.get_rng_state(), before)


def kept(seed: int, layer: int, rate: float = RATE) -> Tensor:
    """What is kept of features (2, 3, 8, 6, 20, 24), as zeros and ones."""
    torch.manual_seed(seed)
    sizes = dict(zip("btczyx", (2, 3, 8, 6, 20, 24), strict=True))
    features = torch.ones(*sizes.values())
    return (Noise.draw(rate, sizes, features.device).layer(layer).drop_(features, tuple("btczyx")) != 0).float()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_kept_part_is_as_asked_everywhere_and_the_mean_stays(rate: float) -> None:
    mask = kept(1, 0, rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(float(mask.mean()) - (1 - rate)) < 4 * deviation / mask.numel() ** 0.5
    for axis in range(6):  # each frame, channel and plane has its share
        part = mask.movedim(axis, 0).flatten(1)
        assert float((part.mean(1) - (1 - rate)).abs().max()) < 5 * deviation / part.shape[1] ** 0.5
    features = torch.ones(1, 1, 4, 8, 16, 16)
    sizes = dict(zip("btczyx", features.shape, strict=True))
    Noise.draw(rate, sizes, features.device).drop_(features, tuple("btczyx"))
    assert set(features.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - rate)))}


def test_noise_is_uncorrelated_between_neighbours_layers_and_seeds() -> None:
    mask = kept(1, 0) - (1 - RATE)
    others: dict[str, tuple[Tensor, Tensor]] = {
        f"axis {axis}, step {step}": (
            mask.narrow(axis, 0, mask.shape[axis] - step),
            mask.narrow(axis, step, mask.shape[axis] - step),
        )
        for axis, step in itertools.product(range(6), (1, 2, 3))
        if mask.shape[axis] > step
    }
    others |= {f"layer {layer}": (mask, kept(1, layer) - (1 - RATE)) for layer in range(1, 7)}
    others |= {f"seed {seed}": (mask, kept(seed, 0) - (1 - RATE)) for seed in range(2, 10)}
    # A sum of keys could repeat its differences: four corners of a rectangle are independent too.
    corners = mask[..., :-1, :-1] * mask[..., 1:, :-1], mask[..., :-1, 1:] * mask[..., 1:, 1:]
    others["rectangles"] = corners
    for what, (a, b) in others.items():
        correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, what


def test_what_is_dropped_does_not_depend_on_layout_or_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = random((2, 3, 4, 5, 6, 7)).real.contiguous()
    noise = Noise.draw(RATE, dict(zip("btczyx", features.shape, strict=True)), features.device)
    expected = noise.drop_(features.clone(), tuple("btczyx"))
    folded = features.permute(0, 1, 3, 2, 5, 4).reshape(2 * 3 * 5, 4, 7, 6)
    monkeypatch.setattr("melcore.networks.dropout._PIECE", 10)
    found = noise.drop_(folded, ("btz", "c", "x", "y"))
    assert torch.equal(found.view(2, 3, 5, 4, 7, 6).permute(0, 1, 3, 2, 5, 4), expected)
    part = (
        noise.part("x", [6, 0, 1]).part("z", range(2, 5)).drop_(features[:, :, :, 2:5, :, [6, 0, 1]], tuple("btczyx"))
    )
    assert torch.equal(part, expected[:, :, :, 2:5, :, [6, 0, 1]])


def test_dropout_can_be_differentiated_twice_and_keeps_no_mask() -> None:
    noise = Noise.draw(RATE, dict.fromkeys("btczyx", 3), torch.device("cpu"))
    x = torch.randn(3, 3, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    y = noise.drop(x.square(), tuple("btczyx"))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second * x.detach().square() / 2, y.detach())
    held = []
    for rate in (0.0, 0.5):
        network = ResidualCNN(3, channels=16, layers=5, dropout=rate)
        image = random((1, 1, 1, 8, 16, 16), torch.complex64).requires_grad_()
        with Meter() as meter:
            output = network(image)
            held.append(meter.live)
        assert output.requires_grad
    assert held[1] < 1.01 * held[0]


def test_the_prediction_covers_dropout() -> None:
    made = model(lambda: ResidualCNN(3, channels=8, layers=4, dropout=0.2), count=2, dtype=torch.float32)
    with fake_tensors():
        predictions = [
            costs(made, (24, 20, 48), 2).network(MemoryPlan.uniform(name, 1, chunk=4).iterations[0])  # type: ignore[arg-type]
            for name in ("plain", "stream")
        ]
    x = random((1, 1, 1, 24, 20, 48), torch.complex64)
    regulariser = made.iterations[0].regulariser
    with Meter() as meter, torch.no_grad():
        Stream(4).forward(regulariser, x)
        assert meter.peak == pytest.approx(predictions[1].forward, rel=0.1)
    assert predictions[0].forward > 5 * predictions[1].forward


class Opaque(ResidualCNN):
    """With the dropout of torch besides."""

    def __init__(self) -> None:
        super().__init__(2, channels=3, layers=2)
        self.more = nn.Dropout(0.5)


def test_dropout_of_torch_is_not_cut_into_boxes() -> None:
    made, problem = model(Opaque), encoding((1, 1, 9, 11))
    with pytest.warns(UserWarning, match="Opaque has dropout of its own, which would be drawn anew for every box"):
        gradients(made, problem, MemoryPlan.uniform("tile", 3, chunk=3))
    coupling = CouplingCNN(2, channels=2, blocks=1)
    coupling.blocks.append(nn.Dropout(0.5))
    coupling.blocks[1].inverse = torch.nn.Identity()
    assert "drawn anew for every inversion" in (why_not("reverse", coupling) or "")
    assert why_not("reverse", coupling.eval()) is None


@pytest.mark.parametrize("rate", [-0.1, 1, float("nan"), "much", True])
def test_impossible_rates_are_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        ResidualCNN(2, channels=2, layers=2, dropout=rate)


def test_configurations_take_dropout_where_there_is_some() -> None:
    regulariser = {"name": "resnet", "dimensions": 2, "channels": 2, "layers": 2, "dropout": 0.1}
    made = build({"scheme": "modl", "iterations": 2, "regulariser": regulariser})
    assert made.iterations[0].regulariser.dropout == 0.1
    with pytest.raises(ConfigError, match="no regulariser option 'dropout'"):
        build({"iterations": 2, "regulariser": {"name": "coupling", "dimensions": 2, "dropout": 0.1}})
