"""What a training can be asked for beside its steps: averages, curricula, warm starts, time limits, no truth."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from melcore.bundle import Bundle
from melcore.errors import ConfigError, DataError
from melcore.physics import data_consistency
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import build
from tests.training_cases import TINY, assert_identical, phantom, state_of, tiny
from training.config import SelfSupervisionSettings
from training.example import Example
from training.problem import place
from training.schedule import learning_rate, random_factor, sigma_factor
from training.self_supervision import divide, held_out_terms, split
from training.trainer import InterruptedTrainingError, Trainer
from training.validation import judge, learned
from training.weights import begin_from

EXAMPLES = [phantom(seed) for seed in range(3)]


class Stream:
    """Examples without end, of which each is a function of its number."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, n: int) -> Example:
        self.asked.append(n)
        return phantom(n)


def trainer(folder: Path, examples: Any = EXAMPLES, **sections: dict[str, Any]) -> Trainer:
    return Trainer(tiny(folder, **sections), examples, EXAMPLES[:1])


def test_streams_without_end_are_read_in_order_and_resumed_where_they_were(tmp_path: Path) -> None:
    settings = {"batch": 2, "steps": 4}
    whole = trainer(tmp_path / "a", Stream(), training=settings)
    whole.run()
    assert whole.examples.asked == list(range(8))
    first = trainer(tmp_path / "b", Stream(), training=settings)
    first.report = lambda step, _: first.stop("stopped by the test") if step == 2 else None
    with pytest.raises(InterruptedTrainingError):
        first.run()
    second = trainer(tmp_path / "b", Stream(), training=settings)
    second.resume()
    second.run()
    assert second.examples.asked == [4, 5, 6, 7]
    assert_identical(state_of(whole), state_of(second))


# The loss


def test_the_loss_of_cg_sense_is_one_at_every_noise_level(tmp_path: Path) -> None:
    """So all noise levels count alike; relative to the truth, what is noisy would rule."""
    for relative_to, expected in (("cg_sense", True), ("truth", False)):
        subject = trainer(tmp_path, loss={"relative_to": relative_to}).objective
        losses = []
        for sigma in (0.003, 0.03, 0.3):
            problem = place(phantom(1, sigma=sigma))
            losses.append(float(subject.loss(problem.cg_sense(), problem, subject.divisors(problem))))
        assert (losses == pytest.approx([1, 1, 1], rel=0.02)) is expected
    assert losses[0] < losses[1] < 0.5 * losses[2]


@pytest.mark.parametrize("relative_to", ["cg_sense", "start"])
def test_what_the_loss_is_divided_by(tmp_path: Path, relative_to: str) -> None:
    preparation = {"start": "time average"}  # then the start image is not CG-SENSE
    subject = trainer(tmp_path, loss={"relative_to": relative_to, "l1": 1, "nrmse": 0}, preparation=preparation)
    problem = place(phantom(2, shape=(3, 1, 18, 14)))
    problem = replace(problem, initial=problem.initial * 1.5)
    divisors = subject.objective.divisors(problem)
    reference = problem.initial if relative_to == "start" else problem.cg_sense()
    error = (reference - problem.truth).abs().sum() / problem.truth.abs().sum()
    assert divisors.keys() == {"l1"}
    assert float(divisors["l1"]) == pytest.approx(float(error), rel=0.1)  # of fewer steps


def test_the_region_of_the_loss(tmp_path: Path) -> None:
    problem = place(phantom(3))
    outside = problem.truth + ~problem.support
    for region, blind in (("image", False), ("support", True)):
        subject = trainer(tmp_path, loss={"region": region, "relative_to": "truth"}).objective
        assert (float(subject.loss(outside, problem, None)) < 1e-6) is blind


def test_scale_phase_and_the_told_noise_level(tmp_path: Path) -> None:
    example, generator = phantom(4), torch.Generator().manual_seed(3)
    factor = random_factor(0.5, generator)
    problem, exact = place(example, None, factor, sigma_factor=1.7), place(example)
    assert float(problem.sigma / exact.sigma) == pytest.approx(abs(factor), rel=1e-6)
    assert float(problem.encoding.sigma / problem.sigma) == pytest.approx(1.7, rel=1e-6)
    # CG-SENSE knows the true level, so the reference is well weighted.
    torch.testing.assert_close(problem.cg_sense(), exact.cg_sense() * factor, rtol=0.05, atol=0.05)
    factors = [sigma_factor(0.5, generator) for _ in range(400)]
    assert 1 / 1.5 <= min(factors) < 0.7 < 1.4 < max(factors) <= 1.5
    assert sum(math.log(value) for value in factors) / 400 == pytest.approx(0, abs=0.05)
    assert sigma_factor(0, generator) == 1
    calm = trainer(tmp_path, training={"sigma_jitter": 0, "scale_jitter": 0})
    assert float(calm.objective.problem(example, generator, jitter=True).encoding.sigma) == float(exact.sigma)


# The optimiser


def test_learning_rates_of_groups(tmp_path: Path) -> None:
    settings = {"factors": {"mu": 10, "layers.0": 0}, "warm_up": 0, "frozen_steps": 0}
    subject = trainer(tmp_path, optimiser=settings)
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    rate = subject.train_step()["learning_rate"]
    # Adam's first step is the learning rate, in the direction of the gradient's sign.
    steps = {n: float((value - before[n]).detach().abs().max()) for n, value in subject.model.named_parameters()}
    for name, step in steps.items():
        expected = 10 * rate if "mu" in name else 0 if "layers.0" in name else rate
        assert step == pytest.approx(expected, rel=0.01), name
    with pytest.raises(ConfigError, match="did you mean"):
        trainer(tmp_path, optimiser={"factors": {"wieght": 2}})


def test_a_scheme_proposes_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from melcore.unrolled import MoDL

    monkeypatch.setattr(MoDL, "learning_rates", lambda _: {"mu": 5.0, "layers": 2.0}, raising=False)
    subject = trainer(tmp_path, optimiser={"factors": {"mu": 3}})
    names = {id(value): name for name, value in subject.model.named_parameters()}
    found = {names[id(p)]: group["factor"] for group in subject.optimiser.param_groups for p in group["params"]}
    assert {found[name] for name in found if "mu" in name} == {3}
    assert {found[name] for name in found if "layers" in name} == {2}


def test_the_learning_rate_follows_steps_or_time_whichever_is_further(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 100, "max_hours": 1}, optimiser={"warm_up": 0, "final_fraction": 0})
    assert learning_rate(50, config) == learning_rate(10, config, elapsed=0.5) == pytest.approx(1.5e-3)
    assert learning_rate(100, config) == learning_rate(3, config, elapsed=1) == pytest.approx(0)
    endless = tiny(tmp_path, training={"steps": None, "max_hours": 1})
    assert learning_rate(10**6, endless, elapsed=0.0) == pytest.approx(3e-3)


def test_a_time_limit_ends_an_annealed_training(tmp_path: Path) -> None:
    limit = 4.0
    subject = trainer(tmp_path, training={"steps": None, "max_hours": limit / 3600, "validation_interval": 20})
    rates: list[float] = []
    subject.report = lambda _, figures: rates.append(figures["learning_rate"])
    subject.run()
    assert subject.step == len(rates) > 10
    assert rates[-1] < 0.1 * max(rates)
    assert 0.7 * limit < subject.seconds < limit + 1
    assert subject.history[-1]["step"] == subject.step
    again = trainer(tmp_path, training={"steps": None, "max_hours": limit / 3600, "validation_interval": 20})
    again.resume()
    assert again.finished
    longer = trainer(tmp_path, training={"steps": None, "max_hours": 2 * limit / 3600, "validation_interval": 20})
    longer.resume()
    assert not longer.finished


def test_steps_may_grow_and_not_shrink(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    more = trainer(tmp_path, training={"steps": 9})
    more.resume()
    more.run()
    assert more.step == 9
    with pytest.raises(ConfigError, match="9 steps are done already"):
        trainer(tmp_path, training={"steps": 8}).resume()


# Averages


def test_the_average_of_the_weights(tmp_path: Path) -> None:
    subject = trainer(tmp_path, training={"ema": 0.5, "steps": 5})
    track = []
    subject.report = lambda *_: track.append({n: v.clone() for n, v in subject.model.state_dict().items()})
    expected = {name: value.clone() for name, value in subject.model.state_dict().items()}
    subject.run()
    for step, weights in enumerate(track, start=1):
        decay = min(0.5, step / (step + 9))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    result = subject.result().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    assert all(torch.equal(value, track[-1][name]) for name, value in subject.model.state_dict().items())
    assert any(not torch.equal(result[name], value) for name, value in track[-1].items())


def test_validation_judges_the_average(tmp_path: Path) -> None:
    subject = trainer(tmp_path, training={"ema": 0.9})
    before = subject.validate()["learned"]
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(0.3)
    assert subject.validate()["learned"] == before


def test_resumed_with_an_average_is_bit_identical(tmp_path: Path) -> None:
    settings = {"ema": 0.8, "curriculum": [{"until_step": 2, "iterations": 1, "readout_window": 6}], "batch": 2}
    whole = trainer(tmp_path / "a", training=settings)
    whole.run()
    first = trainer(tmp_path / "b", training=settings)
    first.report = lambda step, _: first.stop("stopped by the test") if step == 1 else None
    with pytest.raises(InterruptedTrainingError):
        first.run()
    second = trainer(tmp_path / "b", training=settings)
    second.resume()
    second.run()
    assert_identical(state_of(whole), state_of(second))
    other = trainer(tmp_path / "b", training={**settings, "ema": 0.0})
    with pytest.raises(ConfigError, match=r"training\.ema"):
        other.resume()


# Curricula


def test_a_curriculum_goes_from_few_iterations_and_crops_to_the_whole(tmp_path: Path) -> None:
    model = {**TINY["model"], "shared": False}
    stages = [{"until_step": 1, "iterations": 1, "readout_window": 6}, {"until_step": 2, "readout_window": 9}]
    subject = trainer(tmp_path, model=model, training={"curriculum": stages, "steps": 3})
    seen = []
    original = type(subject.model).refine

    def watch(self: Any, encoding: Any, initial: Any, **options: Any) -> Any:
        plan = options["memory"]
        seen.append((len(self.order), len(plan.iterations), initial.shape[-1]))
        return original(self, encoding, initial, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(type(subject.model), "refine", watch)
    moved = []
    for _ in range(3):
        before = subject.model.distinct[1].regulariser.layers[0].weight.clone()
        subject.train_step()
        moved.append(not torch.equal(before, subject.model.distinct[1].regulariser.layers[0].weight))
        subject.step += 1
    patch.undo()
    assert seen == [(1, 1, 6), (2, 2, 9), (2, 2, 14)]
    assert moved == [False, True, True]
    assert len(subject.result().order) == 2


# Precision


def test_bfloat16_is_the_network_alone(tmp_path: Path) -> None:
    problem = place(phantom(5))
    full, half = trainer(tmp_path), trainer(tmp_path, training={"precision": "bfloat16"})
    with half._autocast():
        x = problem.initial
        assert half.model.distinct[0].regulariser.layers[0](torch.randn(1, 1, 2, 1, 9, 8)).dtype == torch.bfloat16
        normal, adjoint, mu = problem.encoding.operator.normal, problem.encoding.adjoint_data, torch.tensor(0.1)
        inside = data_consistency(normal, adjoint, x, mu, max_iterations=5)
    assert torch.equal(inside, data_consistency(normal, adjoint, x, mu, max_iterations=5))
    losses = [float(subject._loss(problem, subject.memory).detach()) for subject in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("executor", ["plain", "checkpoint", "stream"])
def test_bfloat16_trains_with_every_executor(tmp_path: Path, executor: str) -> None:
    sections = {"training": {"precision": "bfloat16", "steps": 3}, "memory": {"executor": executor}}
    subject, plain = trainer(tmp_path, **sections), trainer(tmp_path, training={"steps": 3})
    for one in (subject, plain):
        one.train_step()
        one.validate()
    assert all(
        value.dtype == torch.float32 for value in subject.model.state_dict().values() if value.is_floating_point()
    )
    ours, reference = subject.metrics["learned"]["nrmse_db"], plain.metrics["learned"]["nrmse_db"]
    assert ours == pytest.approx(reference, abs=0.1)


# Warm starts


def bundle_of(architecture: dict[str, Any]) -> Bundle:
    torch.manual_seed(5)
    return Bundle(build(architecture).eval(), architecture, Preparation(), {"name": "before"}, "before", "0123")


def test_a_warm_start(tmp_path: Path) -> None:
    bundle = bundle_of(TINY["model"])
    deeper = {**TINY["model"], "iterations": 5, "cg_iterations": 4}
    subject = trainer(tmp_path, model=deeper, training={"ema": 0.9})
    subject.begin_from(bundle)
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(subject.model.state_dict()[name], value)
        assert torch.equal(subject.result().state_dict()[name], value)
    subject.run()
    again = trainer(tmp_path, model=deeper, training={"ema": 0.9})
    again.resume()
    assert again.origin == {"name": "before", "digest": "0123", "card": {"name": "before"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "varnet", "cg_iterations": None}, "model.scheme is 'modl' there, 'varnet' here"),
        ({"regulariser": {"channels": 5}}, "model.regulariser.channels is 4 there, 5 here"),
        ({"regulariser": {"padding": "circular"}}, "padding is 'zeros' there, 'circular' here"),
        ({"shared": False}, "model.shared is True there, False here"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    changed = {
        **TINY["model"],
        **changes,
        "regulariser": {**TINY["model"]["regulariser"], **changes.get("regulariser", {})},
    }
    architecture = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        begin_from(build(architecture), architecture, bundle_of(TINY["model"]))


def test_separate_weights_need_the_same_number_of_iterations(tmp_path: Path) -> None:
    separate = {**TINY["model"], "shared": False}
    subject = trainer(tmp_path, model={**separate, "iterations": 3})
    with pytest.raises(ConfigError, match=r"2 iterations with weights of their own, .* set model\.iterations=2"):
        subject.begin_from(bundle_of(separate))


# Without a truth


def test_a_split_has_no_common_sample_and_loses_none() -> None:
    mask = EXAMPLES[0].prepared.k_space.mask
    generator = torch.Generator().manual_seed(0)
    seen, held_out = split(mask, 0.4, 4, generator)
    assert torch.equal(seen | held_out, mask)
    assert not bool((seen & held_out).any())
    assert bool(seen[..., 7:11, :].any()), "the centre stays"
    assert int(held_out.sum()) == pytest.approx(0.4 * (int(mask.sum()) - 4), abs=1)
    other, _ = split(mask, 0.4, 4, generator)
    assert not torch.equal(seen, other), "drawn anew"
    with pytest.raises(DataError, match="self-supervision needs some"):
        split(mask, 0.001, 4, generator)


def test_the_model_sees_nothing_of_what_judges_it() -> None:
    example = phantom(6, cut_readout=False)
    settings, preparation = SelfSupervisionSettings(fraction=0.3), Preparation()
    problems = []
    for poison in (0.0, 7.0):
        generator = torch.Generator().manual_seed(1)
        _, held_out = split(example.prepared.k_space.mask, 0.3, 4, torch.Generator().manual_seed(1))
        k_space = replace(example.prepared.k_space, data=example.prepared.k_space.data + poison * held_out)
        prepared = replace(example.prepared, k_space=k_space)
        problems.append(divide(Example(prepared, None), settings, preparation, generator))
    clean, poisoned = problems
    assert torch.equal(clean.encoding.adjoint_data, poisoned.encoding.adjoint_data)
    assert torch.equal(clean.initial, poisoned.initial)
    assert not torch.equal(clean.held_out.k_space, poisoned.held_out.k_space)
    assert clean.target is None


def test_held_out_samples_prefer_the_truth() -> None:
    example = phantom(7, cut_readout=False, sigma=0.001)
    problem = divide(example, SelfSupervisionSettings(), Preparation(), torch.Generator().manual_seed(2))
    of_truth = held_out_terms(example.truth, problem.held_out)
    of_start = held_out_terms(problem.initial, problem.held_out)
    assert all(float(of_truth[name]) < 0.7 * float(of_start[name]) for name in of_truth)


def test_learning_from_undersampled_data_alone_lowers_the_true_error(tmp_path: Path) -> None:
    examples = [phantom(seed, cut_readout=False) for seed in range(3)]
    blind = [Example(example.prepared, None) for example in examples]
    config = tiny(tmp_path, loss={"self_supervised": {}}, training={"steps": 60}, optimiser={"learning_rate": 1e-2})
    subject = Trainer(config, blind, blind)

    @torch.no_grad()
    def true_error() -> float:
        return judge(learned(subject.model)(place(examples[0])), place(examples[0]))["nrmse_db"]

    before, first = true_error(), subject.validate()
    subject.run()
    assert first["learned"].keys() == {"held_out_db"}
    assert subject.metrics["learned"]["held_out_db"] < first["learned"]["held_out_db"]
    assert true_error() < before - 0.1
