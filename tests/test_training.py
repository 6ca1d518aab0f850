"""Training: configurations, examples on the scanner's path, and a loop that resumes bit by bit."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import training
from melcore.bundle import Bundle
from melcore.cli import main
from melcore.data import CoilMaps, KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, MemoryBudgetError
from melcore.memory import MemoryPlan
from melcore.memory.meter import Meter
from melcore.physics import Sense
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.preparation import Preparation, prepare
from melcore.unrolled import build
from training import checkpoint
from training.config import Config, load, parse
from training.data import (
    Example,
    cache_key,
    make_example,
    prepare_examples,
    read_example,
    window_readout,
    write_example,
)
from training.problem import place
from training.simulation import draw_mask, simulate
from training.trainer import DivergedError, InterruptedTrainingError, Trainer, crop, learning_rate, order
from training.validation import cg_sense, evaluate, judge, live_channels, zero_filled

CONFIGS = sorted((Path(__file__).parents[1] / "training" / "configs").glob("*.yaml"))

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "dimensions": "2d",
        "examples": 3,
        "validation": 2,
        "y": [36, 44],
        "x": [32, 40],
        "coils": [3, 5],
        "snr": [30, 60],
        "masks": [{"kind": "poisson", "acceleration": [2, 3], "calibration": [12, 14]}],
        "workers": 1,
    },
    "model": {
        "iterations": 2,
        "cg_iterations": 3,
        "regulariser": {"name": "resnet", "dimensions": 2, "channels": 4, "layers": 3},
    },
    "optimiser": {"warm_up": 1, "frozen_steps": 2, "learning_rate": 3e-3},
    "training": {"steps": 6, "validation_interval": 4, "checkpoint_interval": 2, "device": "cpu"},
    "output": {"directory": "unset", "bundle": "unset.safetensors"},
}


def tiny(folder: Path, **sections: dict[str, Any]) -> Config:
    """The tiny configuration with its output in `folder`, and some settings replaced."""
    content = copy.deepcopy(TINY)
    content["output"] = {"directory": str(folder / "run"), "bundle": str(folder / "tiny.safetensors")}
    content["data"]["cache"] = str(folder / "cache")
    for section, settings in sections.items():
        content.setdefault(section, {}).update(settings)
    return parse(content)


def phantom(seed: int, *, shape: tuple[int, int, int, int] = (1, 1, 18, 14), cut_readout: bool = True) -> Example:
    """A small example made without BART: random smooth coils, an ellipse, a mask along y (and x)."""
    frames, z, y, x = shape
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in (z, y, x)), indexing="ij")
    maps = torch.stack([torch.exp(1j * (a + axes[1]) - (axes[2] - math.cos(a)) ** 2) for a in (0.3, 2.0, 4.0)])
    inside = (axes[1] ** 2 + axes[2] ** 2) < 0.8
    maps = (maps / maps.abs().square().sum(0).sqrt() * inside).to(torch.complex64)[None, None, :, None]
    # Blocks: what smooths them between their edges is better than any linear method.
    blocks = torch.rand(1, 1, frames, z, (y + 3) // 4, (x + 3) // 4, generator=generator)
    blocks = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :y, :x]
    image = torch.polar(blocks, 0.5 * axes[1].expand(blocks.shape)) * inside
    mask = torch.rand(1, 1, frames, 1, y, 1 if cut_readout else x, generator=generator) < 0.5
    mask[..., y // 2 - 2 : y // 2 + 3, :] = True
    complete = Sense(maps, torch.ones(1, 1, 1, 1, 1, 1), time=frames)(image)
    k_space = KSpace(complete * mask, mask, ScanInfo((z, y, x), (z, y, x)))
    prepared = prepare(k_space, coil_maps=CoilMaps(maps))
    return Example(prepared, image / prepared.scale.view(-1, 1, 1, 1, 1, 1))


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and everything the optimiser remembers."""
    state = {f"model/{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    for index, entries in trainer.optimiser.state_dict()["state"].items():
        state |= {f"{index}/{name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    return state


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


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
        ("data.masks.7.weight=1", "no entry '7' in a list of 4"),
        ("data.masks.x=1", "no entry 'x'"),
        ("name.x=1", "plain value"),
        ("data.dimensions=3d", "model is for 2d"),
        ("preparation.map_sets=2", "1 map sets"),
        ("steps", "key=value"),
        ("training.steps={", "not YAML"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(CONFIGS[0].with_name("modl_2d.yaml"), [override])


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


# Examples


def test_examples_take_the_path_of_the_scanner(tmp_path: Path) -> None:
    """Identical tensors, with coil compression, and a target in the gauge and the scale of the data."""
    config = tiny(tmp_path)
    settings = Preparation(coils=3)
    scan = simulate(replace_data(config, coils=(5, 5), snr=(300, 300)).data, np.random.default_rng(3))
    example, prepared = make_example(scan, settings), prepare(scan.k_space, settings=settings)
    for ours, scanner in (
        (example.prepared.k_space.data, prepared.k_space.data),
        (example.prepared.k_space.mask, prepared.k_space.mask),
        (example.prepared.coil_maps.data, prepared.coil_maps.data),
        (example.prepared.scale, prepared.scale),
        (example.prepared.initial, prepared.initial),
    ):
        assert torch.equal(ours, scanner)
    assert example.prepared.k_space.data.shape[1] == 3
    # Where the target is sampled, it predicts the measurement up to its noise.
    predicted = prepared.operator()(example.truth)
    error = (predicted - prepared.k_space.data).norm() / prepared.k_space.data.norm()
    assert error < 0.07  # the maps' own error
    assert not bool((example.truth * ~example.support).any())
    assert 0.5 < float(example.truth.abs().flatten().kthvalue(round(0.99 * example.truth.numel())).values) < 2.5


def replace_data(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=settings)})


def test_simulated_noise_is_white_and_of_variance_two(tmp_path: Path) -> None:
    settings = replace_data(tiny(tmp_path), coils=(4, 4), y=(96, 96), x=(96, 96), correlation=0.6).data
    scan = simulate(settings, np.random.default_rng(1))
    mask = scan.k_space.mask.expand(scan.k_space.data.shape)
    noise = (scan.k_space.data - scan.noiseless)[mask].reshape(4, -1)
    covariance = (noise @ noise.mH / noise.shape[1]).numpy()
    np.testing.assert_allclose(covariance, 2 * np.eye(4), atol=0.15)


def test_failed_maps_make_no_example(tmp_path: Path) -> None:
    scan = simulate(tiny(tmp_path).data, np.random.default_rng(3))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, scan.noiseless.shape[1], 1, 1, 1, 1, generator=generator)
    alien = torch.roll(scan.noiseless, 9, -1) * weights
    with pytest.raises(DataError, match="miss"):
        make_example(replace(scan, noiseless=alien), Preparation())


def test_prepared_examples_are_kept_and_found_again(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    training, validation = prepare_examples(config.data, config.to_preparation())
    assert (len(training), len(validation)) == (3, 2)
    times = [path.stat().st_mtime_ns for path in training.paths]
    truths = [training[index].truth for index in range(3)] + [validation[index].truth for index in range(2)]
    assert len({(tuple(t.shape), float(t.abs().sum())) for t in truths}) == 5, "every example has a seed of its own"
    training.paths[1].unlink()
    more, _ = prepare_examples(config.data.model_copy(update={"examples": 4}), config.to_preparation())
    assert len(more) == 4
    assert torch.equal(more[1].truth, truths[1])
    assert [more.paths[index].stat().st_mtime_ns for index in (0, 2)] == [times[0], times[2]]
    other = [
        cache_key(config.data.model_copy(update={"seed": 2}), config.to_preparation()),
        cache_key(config.data, replace(config.to_preparation(), start_iterations=9)),
    ]
    assert len({training.paths[0].parent.name, *other}) == 3


def test_workers_make_the_same_examples(tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"examples": 2, "validation": 1})
    alone, _ = prepare_examples(config.data, config.to_preparation())
    together = config.data.model_copy(update={"workers": 2, "cache": tmp_path / "other"})
    parallel, _ = prepare_examples(together, config.to_preparation())
    assert all(torch.equal(alone[index].prepared.initial, parallel[index].prepared.initial) for index in range(2))


def test_examples_on_disk(tmp_path: Path) -> None:
    example, path = phantom(1, shape=(2, 1, 9, 7)), tmp_path / "e.safetensors"
    write_example(path, example)
    again = read_example(path)
    assert torch.equal(again.truth, example.truth)
    assert torch.equal(again.prepared.k_space.data, example.prepared.k_space.data)
    assert again.prepared.k_space.noise == example.prepared.k_space.noise
    assert again.prepared.coil_maps.gauge == example.prepared.coil_maps.gauge
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="damaged"):
        read_example(path)


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
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    assert torch.equal(part.support, example.support[cut])
    with pytest.raises(ConfigError, match="fully sampled"):
        window_readout(phantom(2, cut_readout=False), 4, 5)
    assert crop(example, 12) is example
    assert torch.equal(crop(example, 4).truth, example.truth[..., 4:8])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_masks_are_as_configured(path: Path) -> None:
    settings = load(path).data
    matrix = (settings.z[1], settings.y[1], settings.x[1]) if "full" not in path.stem else (48, 64, 8)
    frames = settings.frames[1]
    for kind in settings.masks:
        for seed in range(4):
            mask = draw_mask([kind], matrix, frames, np.random.default_rng(seed))
            sampled = mask.expand(1, 1, frames, *matrix)
            acceleration = 1 / float(sampled.float().mean())
            # Calibration lines come on top in regular patterns.
            regular = kind.kind in ("grid", "uniform lines")
            low, high = kind.acceleration
            assert (1 if regular else low * 0.98) <= acceleration <= high * 1.02
            region = calibration_region(mask[:, :, :1], (1, 1, 1, *matrix))
            assert max(region) >= min(kind.calibration[0], 5)


# The loop


def test_learning_rate_rises_and_falls() -> None:
    config = load(CONFIGS[0].with_name("modl_2d.yaml"))
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
    assert enough.model.memory.iterations == plain.model.memory.iterations
    less = f"{0.75 * enough.model.memory.predicted_peak_bytes:.0f}"
    scarce = Trainer(tiny(tmp_path / "c", memory={"budget": less}), examples, examples[:1])
    assert {entry.executor for entry in scarce.model.memory.iterations} != {"plain"}
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
    first.model.memory = demoted.with_prediction(1 << 20, 1.3, ["after an out-of-memory error"])
    first.train_step()
    first.save()
    second.resume()
    assert second.model.memory == first.model.memory
    other = Trainer(tiny(tmp_path, memory={"executor": "store"}), examples, examples)
    other.resume()
    assert other.model.memory == MemoryPlan.uniform("store", 2)


@pytest.mark.parametrize("part", [0.3, 0.6, 1.1])
def test_a_real_step_takes_what_was_planned(tmp_path: Path, part: float) -> None:
    """What `mel plan` predicts is what the trainer holds at its peak, optimiser and inputs included."""
    matrix = (20, 26, 40)
    model = {"iterations": 5, "regulariser": {"name": "resnet", "dimensions": 3, "channels": 16, "layers": 4}}
    data = {"dimensions": "3d", "z": [20, 20], "y": [26, 26], "x": [40, 40], "coils": [3, 3]}
    sections = {"model": model, "data": data, "preparation": {"coils": 3}}
    plain = tiny(tmp_path, **sections, memory={"budget": "1GiB"})
    whole = plain.to_memory_plan(build(plain.model)).predicted_peak_bytes
    assert whole is not None
    budget = round(part * whole)
    example = phantom(0, shape=(1, *matrix))
    trainer = Trainer(tiny(tmp_path, **sections, memory={"budget": str(budget)}), [example], [example])
    predicted = trainer.model.memory.predicted_peak_bytes
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
        moved.append(any("log_mu" in n and not torch.equal(p, initial[n]) for n, p in trainer.model.named_parameters()))
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
    metrics = evaluate(trainer.model, [example], torch.device("cpu"))
    assert set(metrics) == {"learned", "zero_filled", "cg_sense", "start"}
    assert metrics["cg_sense"]["nrmse_db"] < metrics["zero_filled"]["nrmse_db"]


# The command


def test_the_command_survives_a_signal_and_writes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny(tmp_path, training={"steps": 150, "validation_interval": 150}).to_dict()
    config, saved = tmp_path / "tiny.yaml", tmp_path / "run" / "checkpoint.safetensors"
    config.write_text(yaml.safe_dump(content))
    script = str(Path(training.__file__).with_name("fit.py"))
    process = subprocess.Popen([sys.executable, script, str(config)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not saved.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, words
    assert "stopped by SIGTERM" in words
    assert "--resume" in words
    assert not (tmp_path / "tiny.safetensors").exists()
    step = checkpoint.read(saved)[2].step
    assert 0 < step < 150

    assert main(["fit", str(config)]) == 1
    assert "--resume" in capsys.readouterr().err

    assert main(["fit", str(config), "--resume"]) == 0
    assert "learned" in capsys.readouterr().out
    bundle = Bundle.load(tmp_path / "tiny.safetensors")
    assert bundle.card["steps"] == 150
    assert bundle.card["config"] == content
    assert {"data", "seed", "machine", "seconds", "metrics", "date", "versions", "target"} <= set(bundle.card)
    assert bundle.preparation == parse(content).to_preparation()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    weights = checkpoint.read(saved)[0]
    assert all(torch.equal(weights[f"model/{name}"], value) for name, value in bundle.model.state_dict().items())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Shared batches, gradients added up once: the same training but for rounding."""
    settings = {"steps": 5, "validation_interval": 5, "batch": 3}
    script = str(Path(training.__file__).with_name("fit.py"))
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        config = folder / "tiny.yaml"
        content = tiny(folder, training=settings, data={"cache": str(tmp_path / "cache")}).to_dict()
        config.write_text(yaml.safe_dump(content))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [sys.executable, *start, script, str(config)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found.append(Bundle.load(folder / "tiny.safetensors"))
    one, two = found
    assert one.card["steps"] == two.card["steps"] == 5
    for ours, reference in zip(two.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
