"""Predictions on tensors without memory agree with real runs, and plans keep to their budget."""

import itertools
from typing import Any

import pytest
import torch
from memory_cases import NETWORKS, distance, encoding, gradients, model
from test_memory_pieces import Opaque

from melcore.errors import ConfigError, MemoryBudgetError
from melcore.memory import IterationPlan, MemoryPlan, calibrate, demoted, retrying, verify
from melcore.memory.meter import Meter, fake_tensors
from melcore.networks import ResidualCNN, SpaceTimeCNN
from melcore.physics import Sense
from melcore.unrolled import Encoding, MoDL, Unrolled, VarNet, plan
from melcore.unrolled.planning import costs

MATRIX = (24, 26, 32)
COILS = 3


def make(scheme: Any = MoDL, count: int = 4) -> Unrolled:
    torch.manual_seed(0)
    options = {"cg_iterations": 3} if scheme is MoDL else {}
    return Unrolled.repeat(lambda: scheme(ResidualCNN(3, channels=8, layers=5), **options), count)


def measured_peak(made: Unrolled, memory: MemoryPlan, *, time: int = 1, matrix: tuple[int, ...] = MATRIX) -> int:
    """Largest number of live bytes in a real training step, everything that training holds included."""
    with Meter() as meter:
        maps = torch.randn(1, 1, COILS, 1, *matrix, dtype=torch.complex64) / COILS
        mask = (torch.rand(1, 1, time, *matrix[:2], 1) > 0.5).float()
        operator = Sense(maps, mask, time=time)
        del maps
        data = torch.randn(operator.domain, dtype=torch.complex64)
        target = torch.randn_like(data)
        held = list(made.parameters())
        meter.hold(*held)
        moments = [torch.zeros_like(p) for p in held for _ in range(2)]
        made.zero_grad()
        meter.restart()
        image = made.refine(Encoding(operator, data, torch.tensor([0.1])), data, memory=memory)
        (image - target).abs().square().sum().backward()
        assert moments
        return meter.peak


PLANS = [
    IterationPlan("plain"),
    IterationPlan("checkpoint"),
    IterationPlan("store"),
    IterationPlan("nested"),
    IterationPlan("keep", keep_input=True),
    IterationPlan("stream", chunk=4),
    IterationPlan("stream", chunk=8, hold_physics=False),
    IterationPlan("stream", chunk=8, keep_input=True),
    IterationPlan("tile", chunk=16),
]


@pytest.mark.parametrize("entry", PLANS, ids=lambda entry: "-".join(entry.describe()[:2]))
@pytest.mark.parametrize("scheme", [MoDL, VarNet])
def test_the_predicted_peak_is_the_measured_one_within_a_tenth(entry: IterationPlan, scheme: Any) -> None:
    made = make(scheme)
    memory = MemoryPlan((entry,) * 4)
    with fake_tensors():
        predicted = costs(made, MATRIX, COILS).peak(memory)
    assert predicted == pytest.approx(measured_peak(made, memory), rel=0.1)


def test_the_prediction_holds_for_mixed_plans_and_for_time() -> None:
    torch.manual_seed(0)
    made = Unrolled.repeat(lambda: MoDL(SpaceTimeCNN(2, channels=8, stages=2), cg_iterations=4), 3)
    memory = MemoryPlan((IterationPlan("stream", chunk=4), IterationPlan("stream", chunk=4), IterationPlan("keep")))
    with fake_tensors():
        predicted = costs(made, (1, 40, 48), COILS, time=6).peak(memory)
    assert predicted == pytest.approx(measured_peak(made, memory, time=6, matrix=(1, 40, 48)), rel=0.1)


@pytest.mark.parametrize("executor", ["stream", "keep"])
def test_the_prediction_holds_along_time(executor: Any) -> None:
    torch.manual_seed(0)
    made = Unrolled.repeat(lambda: MoDL(SpaceTimeCNN(2, channels=8, stages=2), cg_iterations=4), 3)
    memory = MemoryPlan((IterationPlan(executor, chunk=2, axis="time"),) * 3)
    with fake_tensors():
        predicted = costs(made, (1, 20, 24), COILS, time=40).peak(memory)
    assert predicted == pytest.approx(measured_peak(made, memory, time=40, matrix=(1, 20, 24)), rel=0.1)


def test_a_long_series_is_streamed_along_time() -> None:
    made = Unrolled.repeat(lambda: MoDL(SpaceTimeCNN(2, channels=32, stages=2), cg_iterations=1), 2)
    with fake_tensors():
        measured = costs(made, (1, 16, 18), 2, time=300)
        least = [measured.peak(MemoryPlan.uniform("stream", 2, chunk=2, axis=axis)) for axis in ("readout", "time")]
    assert least[1] < 0.8 * least[0]
    found = plan(made, (1, 16, 18), 2, round(1.1 * least[1]), time=300, host=False)
    assert {entry.axis for entry in found.iterations} == {"time"}


def test_memory_grows_by_one_image_an_iteration_or_not_at_all() -> None:
    image = 8 * MATRIX[0] * MATRIX[1] * MATRIX[2]
    stream = IterationPlan("stream", chunk=4)
    peaks = [measured_peak(make(count=count), MemoryPlan((stream,) * count)) for count in (2, 5)]
    assert (peaks[1] - peaks[0]) / 3 <= 1.001 * image
    slots = IterationPlan("stream", chunk=4, states="slots")
    peaks = [measured_peak(make(count=count), MemoryPlan((slots,) * count, slots=1)) for count in (3, 5)]
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.mark.parametrize("part", [0.9, 0.35])
def test_a_plan_keeps_to_its_budget_and_wastes_no_time(part: float) -> None:
    made = make()
    with fake_tensors():
        measured = costs(made, MATRIX, COILS)
        plain = measured.peak(MemoryPlan.uniform("plain", 4))
        slowest = measured.work(MemoryPlan.uniform("store", 4)) / measured.work(MemoryPlan.uniform("plain", 4))
    budget = int(part * plain)
    found = plan(made, MATRIX, COILS, budget, host=False)  # on a CPU the host's memory is the device's
    assert found.predicted_peak_bytes is not None
    assert found.predicted_peak_bytes <= budget
    assert measured_peak(made, found) <= budget
    assert found.relative_time is not None
    assert found.relative_time <= slowest + 0.15


def test_more_memory_is_never_slower() -> None:
    made = make()
    times = [plan(made, MATRIX, COILS, budget).relative_time for budget in (9 << 20, 15 << 20, 1 << 30)]
    assert all(a is not None and b is not None and a >= b for a, b in itertools.pairwise(times))
    assert times[-1] == 1


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    made = make()
    with pytest.raises(MemoryBudgetError, match=r"least that would do is .* \((\d+) bytes\)") as caught:
        plan(made, MATRIX, COILS, 1 << 20)
    least = int(str(caught.value).split("(")[1].split(" bytes")[0])
    found = plan(made, MATRIX, COILS, least)
    assert found.predicted_peak_bytes is not None
    assert found.predicted_peak_bytes <= least


def test_planning_leaves_the_model_alone() -> None:
    network = NETWORKS[1]
    made, problem = model(network.make), encoding(network.matrix)
    before = gradients(made, problem, None)
    found = plan(made, (64, 64, 64), 4, 1 << 40)
    assert distance(gradients(made, problem, found), before) < 1e-12
    assert all(type(p) is torch.nn.Parameter for p in made.parameters())


def test_every_cheaper_plan_is_lighter_until_there_is_none() -> None:
    made = make()
    memory: MemoryPlan | None = MemoryPlan(
        (IterationPlan("stream", chunk=16),) * 2 + (IterationPlan("stream", chunk=16, keep_input=True), IterationPlan())
    )
    peaks = []
    with fake_tensors():
        measured = costs(made, MATRIX, COILS)
        while memory is not None:
            peaks.append(measured.peak(memory))
            assert len(peaks) < 30
            memory = demoted(memory)
    assert len(peaks) > 5
    assert all(later <= 1.001 * earlier for earlier, later in itertools.pairwise(peaks))


def test_running_out_of_memory_takes_the_next_cheaper_plan() -> None:
    plan = MemoryPlan((IterationPlan("stream", chunk=16),) * 2 + (IterationPlan("keep"),) * 2)
    tried, cleared = [], []

    def step(plan: MemoryPlan | None) -> float:
        assert plan is not None
        tried.append(plan.iterations)
        if len(tried) < 4:
            raise torch.OutOfMemoryError("not enough")
        return 1.0

    result, found = retrying(plan, step, lambda: cleared.append(1))
    assert result == 1.0
    assert found is not None
    assert found.iterations == tried[-1]
    assert len(cleared) == 3
    assert [entries[-1].executor for entries in tried] == ["keep", "stream", "stream", "stream"]
    assert tried[-1] != tried[-2]
    smallest = MemoryPlan((IterationPlan("stream", chunk=1, hold_physics=False, states="host"),) * 2)
    assert demoted(smallest) is None
    with pytest.raises(MemoryBudgetError, match="even with the cheapest plan"):
        retrying(smallest, lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("no")), lambda: None)


@pytest.mark.parametrize("entry", PLANS, ids=lambda entry: "-".join(entry.describe()[:2]))
def test_honest_regularisers_pass_the_self_check(entry: IterationPlan) -> None:
    verify(ResidualCNN(3, channels=3, layers=3), entry)
    verify(SpaceTimeCNN(2, channels=3, stages=2, sets=2), MemoryPlan((entry,) * 2))


class Liar(Opaque):
    halo = (0, 0, 1, 1)


class Rescaled(ResidualCNN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def test_a_wrong_receptive_field_is_caught() -> None:
    verify(Opaque(), IterationPlan("tile", chunk=3), time=1)
    with pytest.raises(ConfigError, match=r"Liar executed as tile differs .* declared halo \(0, 0, 1, 1\)"):
        verify(Liar(), IterationPlan("tile", chunk=3), time=1)
    with pytest.raises(ConfigError, match="Rescaled executed as stream differs"):
        verify(Rescaled(3, channels=3, layers=3), IterationPlan("stream"))


def test_a_device_is_probed_in_a_moment() -> None:
    found = calibrate("cpu", size=12, channels=8)
    assert 0.01 < found.fourier_cost < 1e4
    assert found.convolution in found.seconds
    assert found.seconds[found.convolution] <= found.seconds["channels_last"]
