"""States that are computed back: certified, within a bound or not at all."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from laws import random
from memory_cases import distance, encoding, gradients, model
from test_memory_laws import Noisy
from test_memory_parallel import Loss
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from melcore.errors import ConfigError
from melcore.memory import IterationPlan, MemoryPlan
from melcore.memory.certificate import PROJECTIONS, SAFETY, Certificate
from melcore.memory.meter import Meter
from melcore.memory.reversal import Report, ReversalWarning, invert, reports
from melcore.networks import CouplingCNN, Regulariser, ResidualCNN
from melcore.physics import Sense
from melcore.unrolled import ADMM, Encoding, Iteration, MoDL, ProximalGradient, Unrolled, VarNet

MATRIX = (1, 3, 4, 5)


def coupling() -> Regulariser:
    return CouplingCNN(3, channels=3, blocks=2, layers=2)


def residual(scale: float = 0.5) -> Regulariser:
    """A residual CNN whose residual is small, so that it has a convergent fixed point."""
    made = ResidualCNN(3, channels=3, layers=3)
    with torch.no_grad():
        for layer in made.layers:
            layer.weight.mul_(scale)
    return made


def converged(network: Callable[[], Regulariser], mu: float = 0.5) -> Callable[[], Iteration]:
    return lambda: MoDL(network(), mu=mu, cg_iterations=100, relative_tolerance=1e-13)


def make(
    iteration: Callable[[], Iteration], count: int = 4, *, shared: bool = True, dtype: torch.dtype = torch.float64
) -> Unrolled:
    torch.manual_seed(5)
    made = Unrolled.repeat(iteration, count, shared=shared).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.05)
    return made


def plan(executor: str, count: int = 4, **options: Any) -> MemoryPlan:
    return MemoryPlan.uniform(executor, count, states="reverse", **options)  # type: ignore[arg-type]


@contextmanager
def warned(match: str) -> Iterator[None]:
    """Exactly one warning about states, which says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(one.message) for one in caught if one.category is ReversalWarning]
    assert len(texts) == 1, texts
    assert match in texts[0]


def recovered(made: Unrolled) -> int:
    return sum(report.recovered for report in reports(made.iterations))


SCHEMES: dict[str, Callable[[], Iteration]] = {
    "modl": converged(coupling),
    "modl-implicit": lambda: MoDL(coupling(), mu=0.5, cg_iterations=100, relative_tolerance=1e-13, gradient="implicit"),
    "modl-residual": converged(residual),
    "proximal-gradient": lambda: ProximalGradient(coupling(), step=0.5),
}


# -- certificates


@pytest.mark.parametrize("kind", ["everywhere", "a voxel", "a plane", "a constant", "the smaller element"])
def test_a_certificate_bounds_every_error_and_not_by_much(kind: str) -> None:
    shape = (2, 1, 3, 5, 17, 33)
    original, other = random(shape, seed=1), random(shape, seed=2)
    for tensor in (original, other):
        tensor[1] *= 1e-3
    certificate = Certificate.of((original, other))
    for seed in range(20):
        noise = random(shape, seed=10 + seed)
        error = torch.zeros_like(noise)
        if kind == "everywhere":
            error = 1e-5 * noise
        elif kind == "a voxel":
            error[:, 0, seed % 3, seed % 5, seed % 17, seed % 33] = 1e-5 * noise[0, 0, 0, 0, 0, 0]
        elif kind == "a plane":
            error[..., seed] = noise[..., seed]
        elif kind == "a constant":
            error += noise[0, 0, 0, 0, 0, 0]
        else:
            error[1] = 1e-8 * noise[1]
        true = [
            float(error[b].norm() / torch.stack((original[b], other[b])).norm()) if float(error[b].norm()) else 0.0
            for b in range(2)
        ]
        found = float(certificate.error((original + error, other)))
        assert max(true) <= found <= 2 * SAFETY * max(true)


def test_a_certificate_sees_nan_and_zeros_and_ignores_the_layout() -> None:
    x = random((1, 1, 2, 3, 4, 50), dtype=torch.complex64)
    certificate = Certificate.of((x,))
    assert certificate.projections.shape == (1, PROJECTIONS)
    assert float(certificate.error((x,))) == 0
    assert float(certificate.error((x.transpose(3, 5).contiguous().transpose(3, 5),))) == 0
    assert torch.isnan(certificate.error((torch.where(x.real > 2, float("nan"), x),)))
    nothing = torch.zeros_like(x)
    assert float(Certificate.of((nothing,)).error((nothing,))) == 0
    assert float(Certificate.of((nothing,)).error((x,))) == float("inf")


def test_a_certificate_needs_no_volume_and_no_random_numbers_of_the_training() -> None:
    x = random((1, 1, 1, 48, 64, 96), dtype=torch.complex64)
    state = torch.get_rng_state()
    with Meter() as meter, torch.autocast("cpu", dtype=torch.bfloat16):
        Certificate.of((x,))
    assert meter.peak < x.numel() * x.element_size()
    assert torch.equal(torch.get_rng_state(), state)
    # The sum over pieces is the sum over one piece.
    with pytest.MonkeyPatch.context() as patch:
        whole = Certificate.of((x[..., :2, :].contiguous(),))
        patch.setattr("melcore.memory.certificate._PIECE", 512)
        torch.testing.assert_close(Certificate.of((x[..., :2, :].contiguous(),)).projections, whole.projections)


# -- states that are recovered


@pytest.mark.parametrize(
    ("scheme", "executor", "shared"),
    [
        ("modl", "checkpoint", True),
        ("modl", "store", False),
        ("modl", "reverse", True),
        ("modl-implicit", "reverse", False),
        ("modl-residual", "checkpoint", False),
        ("modl-residual", "nested", True),
        ("modl-residual", "tile", True),
        ("modl-residual", "stream", False),
        ("proximal-gradient", "store", True),
        ("proximal-gradient", "reverse", False),
    ],
)
def test_certified_states_give_the_gradients_of_autograd(scheme: str, executor: str, shared: bool) -> None:
    made, problem = make(SCHEMES[scheme], shared=shared), encoding(MATRIX, batch=2)
    expected = gradients(made, problem, None)
    assert distance(gradients(made, problem, plan(executor, chunk=3)), expected) < 1e-8
    found = reports(made.iterations)
    assert recovered(made) == 3
    assert all(report.reach is None and report.worst < 1.5e-8 for report in found)
    assert len(found) == (1 if shared else 4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_recovered_states_are_within_the_bound(dtype: torch.dtype) -> None:
    """The bound is of the states themselves, so they are looked at themselves."""
    seen: list[Tensor] = []

    class Watched(MoDL):
        def after(self, regularised: Tensor, carry: Any, encoding: Any) -> Any:
            seen.append(regularised.detach().clone())
            return super().after(regularised, carry, encoding)

    iteration = lambda: Watched(coupling(), mu=0.3, cg_iterations=60, relative_tolerance=1e-14)  # noqa: E731
    made, problem = make(iteration, dtype=dtype.to_real()), encoding(MATRIX, dtype=dtype)
    loss = made.refine(problem, problem.adjoint_data, memory=plan("store")).abs().square().sum()
    states = seen[:3]  # what the data consistency before each regulariser but the first starts from
    seen.clear()
    loss.backward()
    assert recovered(made) == 3
    bound = torch.finfo(dtype).eps ** 0.5
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(reversed(seen), states, strict=True)]
    assert 0 < max(errors) <= reports(made.iterations)[0].worst <= bound


def test_single_precision_is_as_exact_as_the_states() -> None:
    problem = encoding(MATRIX, dtype=torch.complex64)
    made = make(converged(coupling), dtype=torch.float32)
    expected = gradients(made, problem, None)
    assert distance(gradients(made, problem, plan("store")), expected) < 3e-4
    assert recovered(made) == 3


def test_dropout_is_the_same_noise_on_the_way_back() -> None:
    def quiet() -> Regulariser:
        noisy = Noisy()
        with torch.no_grad():
            noisy.second.weight.mul_(0.3)
        return noisy

    made = make(converged(quiet), dtype=torch.float32)
    problem = encoding((1, 1, 6, 7), dtype=torch.complex64)
    results = []
    for memory in (None, plan("store"), plan("checkpoint")):
        torch.manual_seed(3)
        results.append(gradients(made, problem, memory) | {"next random number": torch.rand(1)})
    assert recovered(made) == 6
    assert max(distance(found, results[0]) for found in results[1:]) < 1e-3


def test_memory_does_not_grow_with_the_iterations() -> None:
    matrix = (20, 22, 24)

    def peak(count: int, states: Any) -> int:
        network = lambda: CouplingCNN(3, channels=4, blocks=1, layers=2)  # noqa: E731
        options: dict[str, Any] = {"cg_iterations": 60, "relative_tolerance": 1e-6, "gradient": "implicit"}
        made = Unrolled.repeat(lambda: MoDL(network(), mu=4.0, **options), count)
        with Meter() as meter:
            maps = random((1, 1, 2, 1, *matrix), torch.complex64) / 2
            operator = Sense(maps, random((1, 1, 1, *matrix[:2], 1), seed=1).real > 0)
            data = random(operator.domain, torch.complex64)
            meter.hold(*made.parameters())
            entry = MemoryPlan.uniform("reverse", count, states=states)
            meter.restart()
            made.refine(Encoding(operator, data, torch.tensor([0.1])), data, memory=entry).abs().square().sum().backward()
        assert recovered(made) == (count - 1 if states == "reverse" else 0)
        return meter.peak

    image = 8 * matrix[0] * matrix[1] * matrix[2]
    peaks = {states: [peak(count, states) for count in (2, 6)] for states in ("device", "reverse")}
    assert peaks["device"][1] - peaks["device"][0] >= 3.9 * image
    assert peaks["reverse"][1] - peaks["reverse"][0] <= 4 * 2048  # certificates: two of 65 numbers each
    assert peaks["reverse"][1] <= peaks["device"][1] - 2.9 * image


def test_reverse_stands_beside_every_other_way_to_keep_states() -> None:
    made, problem = make(converged(coupling), 9, shared=False), encoding(MATRIX)
    expected = gradients(made, problem, None)
    entries = [
        *(IterationPlan("store", states="slots"),) * 2,
        IterationPlan("store", states="reverse"),  # behind slots: keeps its own inputs
        IterationPlan("tile", chunk=3, states="reverse"),
        IterationPlan("store", states="host"),
        IterationPlan("reverse", states="reverse"),
        IterationPlan("store", keep_input=True),
        IterationPlan("checkpoint", states="reverse"),
        IterationPlan("plain"),
    ]
    assert distance(gradients(made, problem, MemoryPlan(tuple(entries), slots=1)), expected) < 1e-9
    assert [report.recovered for report in reports(made.iterations) if report.recovered] == [1, 1, 1]
    for last in ("reverse", "device"):  # the same where everything fails: the exact ones before are of any kind
        failing = [
            IterationPlan(e.executor, chunk=3, keep_input=e.keep_input, states=e.states, reversal_bound=1e-300)
            for e in (*entries[:8], IterationPlan("store", states=last))  # type: ignore[arg-type]
        ]
        other = make(converged(coupling), 9, shared=False)
        with warned("could not be computed back"):
            found = gradients(other, problem, MemoryPlan(tuple(failing), slots=1))
        assert distance(found, expected) < 1e-12
        assert recovered(other) == 0


def test_a_retained_graph_goes_back_twice_and_leaves_nothing_behind() -> None:
    made, problem = make(converged(coupling), 6), encoding(MATRIX)
    parameters = list(made.parameters())
    for bound in (None, 1e-13, 1e-300):
        entry = IterationPlan("store", states="reverse", reversal_bound=bound)
        both = MemoryPlan((entry,) * 3 + (IterationPlan("store", states="host"),) + (entry,) * 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReversalWarning)
            loss = made.refine(problem, problem.adjoint_data, memory=both).abs().sum()
            first = torch.autograd.grad(loss, parameters, retain_graph=True)
            second = torch.autograd.grad(loss, parameters)
        assert distance(dict(enumerate(second)), dict(enumerate(first))) < 1e-10  # type: ignore[arg-type]
    gc.collect()
    gc.disable()  # states must go with the graph, not with the next collection
    try:
        with Meter() as meter:
            made.refine(problem, problem.adjoint_data).abs().sum().backward()
            assert meter.live <= sum(p.numel() * p.element_size() for p in parameters) + 64
    finally:
        gc.enable()


# -- states that are not


def test_truncated_conjugate_gradients_are_found_out() -> None:
    truncated = lambda: MoDL(coupling(), mu=0.05, cg_iterations=5)  # noqa: E731
    for shared in (True, False):
        made, problem = make(truncated, shared=shared), encoding(MATRIX)
        expected = gradients(made, problem, None)
        with warned("input of iteration 4 could not be computed back: the 1. state in a row was off by up to"):
            found = gradients(made, problem, plan("store"))
        assert distance(found, expected) < 1e-12
        # Later steps do not try again, and say nothing.
        before = [str(report) for report in reports(made.iterations)]
        assert distance(gradients(made, problem, plan("store")), expected) < 1e-12
        assert [str(report) for report in reports(made.iterations)] == before
        assert recovered(made) == 0
        (report, *_) = reversed(reports(made.iterations))
        assert report.reach == 0
        assert "behind the physics" in str(report)


@pytest.mark.parametrize("executor", ["checkpoint", "store", "stream"])
def test_networks_without_a_fixed_point_are_found_out(executor: str) -> None:
    made, problem = make(converged(lambda: residual(2.5))), encoding(MATRIX)
    expected = gradients(made, problem, None)
    with warned("behind the network. It is computed forward again, and from now on states are kept"):
        found = gradients(made, problem, plan(executor, chunk=3))
    assert distance(found, expected) < 1e-12
    assert distance(gradients(made, problem, plan(executor, chunk=3)), expected) < 1e-12
    assert reports(made.iterations)[0].reach == 0


def test_only_the_iteration_that_cannot_be_undone_keeps_its_state() -> None:
    made, problem = make(converged(residual), 5, shared=False), encoding(MATRIX)
    with torch.no_grad():
        for parameter in made.distinct[2].regulariser.parameters():
            parameter.mul_(4)
    expected = gradients(made, problem, None)
    with warned("input of iteration 3"):
        assert distance(gradients(made, problem, plan("stream", 5)), expected) < 1e-8
    assert [report.reach for report in reports(made.iterations)] == [None, None, 2, None, None]
    assert [report.recovered for report in reports(made.iterations)] == [0, 1, 0, 1, 1]
    assert distance(gradients(made, problem, plan("stream", 5)), expected) < 1e-8
    assert [report.recovered for report in reports(made.iterations)] == [0, 2, 0, 2, 2]


def test_errors_that_grow_are_stopped_by_a_state_now_and_then() -> None:
    """Weak data consistency contracts what was measured by mu, so the way back multiplies errors by 1 / mu."""
    made, problem = make(converged(coupling, mu=0.03), 7), encoding(MATRIX)
    expected = gradients(made, problem, None)
    with warned("state in a row"):
        assert distance(gradients(made, problem, plan("store", 7)), expected) < 1e-8
    (report,) = reports(made.iterations)
    assert report.reach is not None
    assert 1 <= report.reach < 6
    assert report.worst <= 1.5e-8
    known = report.recovered
    assert distance(gradients(made, problem, plan("store", 7)), expected) < 1e-8
    (again,) = reports(made.iterations)
    assert again.reach == report.reach
    assert again.recovered - known == 6 - 6 // (report.reach + 1)


def test_nan_on_the_way_back_is_no_state() -> None:
    class Odd(MoDL):
        def undo_after(self, state: Any, encoding: Any) -> Any:
            return super().undo_after(state, encoding)[0] * float("nan"), ()

    made = make(lambda: Odd(coupling(), mu=0.5, cg_iterations=50, relative_tolerance=1e-14))
    problem = encoding(MATRIX)
    expected = gradients(made, problem, None)
    with warned("off by up to nan"):
        assert distance(gradients(made, problem, plan("store")), expected) < 1e-12


class Homemade(MoDL):
    irreversible = "nobody wrote it"


@pytest.mark.parametrize(
    ("iteration", "reason"),
    [
        (lambda: ADMM(coupling(), cg_iterations=3), "ADMM cannot be undone: image and dual variable leave as their"),
        (lambda: VarNet(coupling()), "VarNet cannot be undone: network and data step start from one image"),
        (lambda: Homemade(coupling(), cg_iterations=3), "Homemade cannot be undone: nobody wrote it"),
    ],
)
def test_schemes_without_a_way_back_keep_their_states_and_say_why(
    iteration: Callable[[], Iteration], reason: str
) -> None:
    made, problem = make(iteration), encoding(MATRIX)
    expected = gradients(made, problem, None)
    with warned(reason):
        found = gradients(made, problem, plan("store"))
    assert distance(found, expected) < 1e-12
    assert distance(gradients(made, problem, plan("store")), expected) < 1e-12
    assert reason in str(reports(made.iterations)[0])
    with pytest.raises(ConfigError, match=r"cannot be undone"):
        made.iterations[0].undo_after((problem.adjoint_data,), problem) if "Homemade" not in reason else (
            Iteration.undo_before(made.iterations[0], problem.adjoint_data, (), problem)
        )


def test_a_proximal_step_of_one_leaves_no_trace_to_recover() -> None:
    made, problem = make(lambda: ProximalGradient(coupling(), step=1.0)), encoding(MATRIX)
    operator = problem.operator
    assert isinstance(operator, Sense)
    flat = Sense(torch.ones(1, 1, 1, 1, *MATRIX[1:], dtype=torch.complex128), operator.mask)
    problem = Encoding(flat, problem.adjoint_data, problem.sigma)
    expected = gradients(made, problem, None)
    with warned("behind the physics"):
        assert distance(gradients(made, problem, plan("store")), expected) < 1e-12


# -- and everything else stays as it is


def test_inference_frozen_parameters_and_hooks_are_unaffected() -> None:
    made, problem = make(converged(coupling)), encoding(MATRIX)
    frozen, *others = made.parameters()
    frozen.requires_grad_(False)
    expected = gradients(made, problem, None)
    made.zero_grad()
    with torch.no_grad():
        assert torch.equal(made.refine(problem, problem.adjoint_data, memory=plan("reverse")), expected["image"])
    assert reports(made.iterations) == []
    calls: list[int] = []
    for index, parameter in enumerate(others):
        parameter.register_hook(lambda _, index=index: calls.append(index))
    loss = made.refine(problem, problem.adjoint_data, memory=plan("reverse")).abs().square().sum()  # whose start needs no gradient
    loss.backward()
    assert sorted(calls) == list(range(len(others)))
    assert recovered(made) == 3
    assert frozen.grad is None
    # Iterations that need no gradient at all come before the first that is differentiated.
    separate = make(converged(coupling), shared=False)
    for parameter in separate.distinct[:2].parameters():
        parameter.requires_grad_(False)
    results = []
    for memory in (None, plan("store")):
        separate.zero_grad()
        separate.refine(problem, problem.adjoint_data, memory=memory).abs().square().sum().backward()
        results.append({n: p.grad.clone() for n, p in separate.named_parameters() if p.grad is not None})
    assert distance(results[1], results[0]) < 1e-9


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        made = make(converged(coupling))
        calls: list[str] = []
        for name, parameter in made.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
        wrapped = DistributedDataParallel(Loss(made))
        wrapped(rank).backward()
        if rank == 0:
            gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
            torch.save({"gradients": gradients, "calls": calls, "recovered": recovered(made)}, f"{folder}/result.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    result = torch.load(tmp_path / "result.pt")
    made = make(converged(coupling))
    ((Loss(made)(0) + Loss(made)(1)) / 2).backward()
    expected = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert distance(result["gradients"], expected) < 1e-9  # type: ignore[arg-type]
    assert sorted(result["calls"]) == sorted(expected)
    assert result["recovered"] == 3


def test_an_inverse_is_preferred_to_a_fixed_point() -> None:
    network = model(coupling, count=1).iterations[0].regulariser
    x = random((1, 1, *MATRIX))
    with torch.no_grad():
        output = network(x)
        assert float((invert(lambda _: pytest.fail("evaluated"), network, output) - x).norm() / x.norm()) < 1e-13
        plain = residual(0.2).double()
        assert float((invert(plain, plain, plain(x)) - x).norm() / x.norm()) < 1e-11


def test_plans_that_contradict_themselves_are_refused() -> None:
    for options in ({"executor": "plain"}, {"executor": "keep"}, {"executor": "store", "keep_input": True}):
        with pytest.raises(ConfigError, match=r"computed back are kept nowhere, but .* is to keep"):
            IterationPlan(states="reverse", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        IterationPlan("store", states="reverse", reversal_bound=2)
    with pytest.raises(ConfigError, match="before all others"):
        MemoryPlan((IterationPlan("store", states="reverse"), IterationPlan("store", states="slots")))


def test_plans_and_reports_say_it_in_words() -> None:
    text = str(plan("stream", chunk=8))
    assert "stream 8" in text
    assert "certificate" in text
    assert "computed back" in text
    assert plan("store").to_dict()["iterations"][0]["where"] == "nowhere, computed back"
    report = Report((1, 2, 3), 63, 2.1e-5, 2, "the 3. state in a row was off")
    assert str(report) == (
        "iteration 1-3: 63 states recovered, errors up to 2.1e-05; at most 2 iterations in a row: "
        "the 3. state in a row was off"
    )
