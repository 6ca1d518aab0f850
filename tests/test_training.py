"""Training: configurations, and a loop that resumes bit by bit."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from melcore.bundle import Bundle
from melcore.errors import ConfigError, DataError, MemoryBudgetError
from melcore.memory import MemoryPlan
from melcore.memory.meter import Meter
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import build
from tests.training_cases import TINY, assert_identical, content, phantom, state_of, tiny
from training import checkpoint
from training.config import load, parse
from training.example import window_readout
from training.problem import crop, place
from training.schedule import learning_rate, order
from training.trainer import DivergedError, InterruptedTrainingError, Trainer
from training.validation import cg_sense, evaluate, judge, live_channels, zero_filled

CONFIGS = sorted((Path(__file__).parents[1] / "training" / "configs").glob("*.yaml"))

# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_are_valid(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert parse(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.steps=3", "did you mean 'training'"),
        ("training.step=3", "did you mean 'training.steps'"),
        ("data.masks.0.acceleraton=3", r"did you mean 'data\.masks\.0\.acceleration'"),
        ("model.regulariser.chanels=3", "did you mean 'channels'"),
        ("model.iteratons=3", "did you mean"),
        ("memory.executor=stor", "did you mean 'store'"),
        ("training.steps=many", r"training\.steps.*'many'"),
        ("training.steps=0", r"training\.steps.*0"),
        ("training.steps='7'", r"training\.steps.*'7'"),
        ("data.coils=[8, 4]", r"data\.coils.*\[least, most\]"),
        ("data.masks.7.weight=1", "no entry '7' in a list of 1"),
        ("data.masks.x=1", "no entry 'x'"),
        ("name.x=1", "plain value"),
        ("data.dimensions=3d", "model is for 2d"),
        ("preparation.map_sets=2", "1 map sets"),
        ("training.steps=null", r"training\.steps or training\.max_hours"),
        ("training.curriculum=[{until_step: 9, iterations: 50}]", "50 iterations, but the model has"),
        ("training.curriculum=[{until_step: 9}, {until_step: 9}]", "one after another"),
        ("training.curriculum=[{until_step: 9, iteration: 2}]", r"did you mean 'training\.curriculum\.0\.iterations'"),
        ("training.precision=float16", "float32"),
        ("loss.self_supervised={fraction: 1.5}", r"loss\.self_supervised\.fraction"),
        ("steps", "key=value"),
        ("training.steps={", "not YAML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        load(path, [override])


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TINY).replace("0.003", "3e-3"))
    config = load(path, ["optimiser.learning_rate=2e-4", "data.masks.0.weight=3", "model.iterations=4", "loss.l2=1"])
    assert config.optimiser.learning_rate == 2e-4
    assert config.data.masks[0].weight == 3
    assert config.model["iterations"] == 4
    assert config.loss.l2 == 1
    assert load(path).optimiser.learning_rate == 3e-3


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not YAML"), ("- 1", "sections"), ("name: x", "missing|required")]
)
def test_files_that_are_no_configurations(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(path)
    with pytest.raises(DataError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_a_window_of_the_readout_is_exact() -> None:
    """What is computed in the window equals the window of what is computed on the whole."""
    example = phantom(2, shape=(2, 3, 13, 12))
    part = window_readout(example, 4, 5)
    cut = (..., slice(4, 9))
    for ours, whole in (
        (zero_filled(place(part)), zero_filled(place(example))[cut]),
        (part.prepared.operator().normal(part.truth), example.prepared.operator().normal(example.truth)[cut]),
        (cg_sense(place(part), weight=0.5), cg_sense(place(example), weight=0.5)[cut]),
    ):
        torch.testing.assert_close(ours, whole, atol=5e-4, rtol=0)  # CG ends where its residual is small
    assert torch.equal(part.support, example.support[cut])
    with pytest.raises(ConfigError, match="fully sampled"):
        window_readout(phantom(2, cut_readout=False), 4, 5)
    assert crop(example, 12) is example
    assert torch.equal(crop(example, 4).truth, example.truth[..., 4:8])


# The loop


def test_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 300}, optimiser={"warm_up": 50})
    rates = [learning_rate(step, config) for step in range(config.training.steps + 1)]
    top = config.optimiser.warm_up
    assert max(rates) == rates[top] == pytest.approx(config.optimiser.learning_rate)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    assert rates[-1] == pytest.approx(config.optimiser.learning_rate * config.optimiser.final_fraction)


def test_every_epoch_sees_every_example_once(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"batch": 3})
    seen = [index for step in range(20) for index in order(step, 10, config)]
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_training_lowers_the_error(tmp_path: Path) -> None:
    examples = [phantom(seed) for seed in range(3)]
    config = tiny(tmp_path, training={"steps": 60}, optimiser={"learning_rate": 1e-2})
    trainer = Trainer(config, examples, examples)
    before = trainer.validate()
    trainer.run()
    assert trainer.metrics["learned"]["nrmse_db"] < before["learned"]["nrmse_db"] - 0.3
    assert trainer.metrics["cg_sense"] == before["cg_sense"]


@pytest.mark.parametrize("window", [None, 6])
def test_resumed_training_is_bit_identical(tmp_path: Path, window: int | None) -> None:
    examples = [phantom(seed) for seed in range(4)]
    settings = {"batch": 2, "readout_window": window}
    whole = Trainer(tiny(tmp_path / "a", training=settings), examples, examples[:1])
    whole.run()
    config = tiny(tmp_path / "b", training=settings)
    first = Trainer(config, examples, examples[:1])
    first.report = lambda step, _: first.stop("stopped by the test") if step == 3 else None
    with pytest.raises(InterruptedTrainingError, match="step 3 of 6"):
        first.run()
    torch.rand(7)  # the generator is elsewhere when the second session begins
    second = Trainer(config, examples, examples[:1])
    second.resume()
    assert second.step == 3
    second.run()
    assert_identical(state_of(whole), state_of(second))
    assert whole.history == second.history
    assert second.seconds > first.seconds


def test_a_memory_budget_becomes_a_plan(tmp_path: Path) -> None:
    examples = [phantom(seed) for seed in range(2)]
    plain = Trainer(tiny(tmp_path / "a"), examples, examples[:1])
    enough = Trainer(tiny(tmp_path / "b", memory={"budget": "1GiB"}), examples, examples[:1])
    assert enough.memory.iterations == plain.memory.iterations
    less = f"{0.75 * enough.memory.predicted_peak_bytes:.0f}"
    scarce = Trainer(tiny(tmp_path / "c", memory={"budget": less}), examples, examples[:1])
    assert {entry.executor for entry in scarce.memory.iterations} != {"plain"}
    plain.train_step()
    scarce.train_step()
    for ours, reference in zip(scarce.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-6)
    with pytest.raises(MemoryBudgetError):
        Trainer(tiny(tmp_path, memory={"budget": "20KiB"}), examples, examples)
    with pytest.raises(ConfigError, match="12 apples"):
        tiny(tmp_path, memory={"budget": "12 apples"})


def test_a_resumed_training_keeps_the_plan_that_it_was_demoted_to(tmp_path: Path) -> None:
    """Another plan would round differently, and the one before ran out of memory."""
    examples = [phantom(0)]
    config = tiny(tmp_path, memory={"budget": "1GiB"})
    first, second = Trainer(config, examples, examples), Trainer(config, examples, examples)
    demoted = MemoryPlan.uniform("stream", 2, chunk=4, keep_input=True)
    first.memory = demoted.with_prediction(1 << 20, 1.3, ["after an out-of-memory error"])
    first.train_step()
    first.save()
    second.resume()
    assert second.memory == first.memory
    other = Trainer(tiny(tmp_path, memory={"executor": "store"}), examples, examples)
    other.resume()
    assert other.memory == MemoryPlan.uniform("store", 2)


@pytest.mark.parametrize("part", [0.3, 0.6, 1.1])
def test_a_real_step_takes_what_was_planned(tmp_path: Path, part: float) -> None:
    """What `mel plan` predicts is what the trainer holds at its peak, optimiser and inputs included."""
    matrix = (20, 26, 40)
    model = {"iterations": 5, "regulariser": {"name": "resnet", "dimensions": 3, "channels": 16, "layers": 4}}
    data = {"dimensions": "3d", "z": [20, 20], "y": [26, 26], "x": [40, 40], "coils": [4, 4]}
    sections = {"model": model, "data": data, "preparation": {"coils": 4}}
    plain = tiny(tmp_path, **sections, memory={"budget": "1GiB"})
    whole = plain.to_memory_plan(build(plain.model)).predicted_peak_bytes
    assert whole is not None
    budget = round(part * whole)
    example = phantom(0, shape=(1, *matrix))
    trainer = Trainer(tiny(tmp_path, **sections, memory={"budget": str(budget)}), [example], [example])
    predicted = trainer.memory.predicted_peak_bytes
    trainer.train_step()  # the optimiser makes its moments
    with Meter() as meter:
        moments = [v for entry in trainer.optimiser.state.values() for v in entry.values() if torch.is_tensor(v)]
        meter.hold(*trainer.model.parameters(), *moments)
        meter.restart()
        trainer.train_step()
    assert meter.peak <= predicted <= budget
    assert meter.peak == pytest.approx(predicted, rel=0.1)


def test_only_the_regulariser_learns_at_first(tmp_path: Path) -> None:
    examples = [phantom(0)]
    trainer = Trainer(tiny(tmp_path), examples, examples)
    initial = {name: value.clone() for name, value in trainer.model.named_parameters()}
    moved = []
    for trainer.step in range(4):
        trainer.train_step()
        moved.append(any("mu" in n and not torch.equal(p, initial[n]) for n, p in trainer.model.named_parameters()))
    assert moved == [False, False, True, True]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    examples = [phantom(seed) for seed in range(2)]
    trainer = Trainer(tiny(tmp_path, training={"steps": 6}), examples, examples[:1])
    trainer.examples = [*examples]

    def poison(step: int, _: object) -> None:
        if step == 3:
            trainer.examples = [replace(example, truth=example.truth * math.nan) for example in examples]

    trainer.report = poison
    with pytest.raises(DivergedError, match=r"step 4 .* nan .*keeps the last good state"):
        trainer.run()
    again = Trainer(tiny(tmp_path), examples, examples[:1])
    again.resume()
    assert again.step == 2
    assert all(bool(torch.isfinite(value).all()) for value in state_of(again).values())


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    examples = [phantom(0)]
    trainer = Trainer(tiny(tmp_path), examples, examples)
    with pytest.raises(DataError, match="without --resume"):
        trainer.resume()
    trainer.save()
    changed = Trainer(tiny(tmp_path, optimiser={"learning_rate": 1e-3}), examples, examples)
    with pytest.raises(ConfigError, match=r"optimiser\.learning_rate"):
        changed.resume()
    moved = Trainer(tiny(tmp_path, memory={"executor": "checkpoint"}), examples, examples)
    moved.resume()  # memory changes no result
    wider = copy.deepcopy(TINY["model"])
    wider["regulariser"]["channels"] = 5
    other = Trainer(tiny(tmp_path, model=wider), examples, examples)
    with pytest.raises(DataError, match="another model"):
        checkpoint.restore(trainer.checkpoint, other.model, other.optimiser)
    content = trainer.checkpoint.read_bytes()
    trainer.checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        trainer.resume()
    Bundle(trainer.model, TINY["model"], Preparation()).save(trainer.checkpoint)
    with pytest.raises(DataError, match="not a checkpoint"):
        trainer.resume()


def test_dead_channels_are_counted(tmp_path: Path) -> None:
    example = phantom(0)
    trainer = Trainer(tiny(tmp_path), [example], [example])
    assert live_channels(trainer.model, place(example)) == 1
    first = trainer.model.distinct[0].regulariser.layers[0]
    with torch.no_grad():
        first.weight[:2] = 0
    assert live_channels(trainer.model, place(example)) == pytest.approx(6 / 8)


def test_the_truth_is_judged_perfect(tmp_path: Path) -> None:
    example = phantom(0)
    assert judge(example.truth * (1 + 1e-6), example)["ssim"] == pytest.approx(1, abs=1e-5)
    trainer = Trainer(tiny(tmp_path), [example], [example])
    metrics = evaluate(trainer.model, [place(example)])
    assert set(metrics) == {"learned", "zero_filled", "cg_sense", "start"}
    assert metrics["cg_sense"]["nrmse_db"] < metrics["zero_filled"]["nrmse_db"]
