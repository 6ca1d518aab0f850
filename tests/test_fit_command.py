"""``mel fit`` as processes: killed, stopped, out of disk, two at once; nothing of what was done is lost."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import training
from melcore.bundle import Bundle
from melcore.cli import main
from melcore.errors import DataError
from tests.training_cases import content, phantom, tiny
from training import checkpoint, directory
from training.board import Board
from training.card import describe_data
from training.config import load, shipped
from training.example import Example
from training.trainer import DivergedError, Trainer

SCRIPT = str(Path(training.__file__).with_name("fit.py"))

# A training on phantoms, quick to start again; `python -c LOOP FOLDER STEPS` says "ready" when its first step begins.
LOOP = """
import sys, torch
from pathlib import Path
from tests.training_cases import phantom, tiny
from training.trainer import Trainer
torch.set_num_threads(1)
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
config = tiny(folder, training={"steps": steps, "checkpoint_interval": 1, "ema": 0.9, "batch": 2})
examples = [phantom(seed) for seed in range(3)]
trainer = Trainer(config, examples, examples[:1])
if trainer.checkpoint.exists():
    trainer.resume()
print("ready", flush=True)
trainer.run()
"""


def write(folder: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content(folder, **sections)))
    return path


def start(*arguments: str, limit: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        preexec_fn=limit,
    )


def loop(folder: Path, steps: int, limit: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code and words of `LOOP`, run to its end."""
    process = start("-c", LOOP, str(folder), str(steps), limit=limit)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def wait_for_another(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a file is there, or is replaced by a new one."""
    before = path.stat().st_mtime_ns if path.is_file() else 0
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and path.stat().st_mtime_ns > before:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=5)[1])


def assert_same_weights(first: Path, second: Path) -> None:
    """Checkpoints with the same tensors: weights, averages, optimiser, random state."""
    ours, theirs = checkpoint.read(first)[0], checkpoint.read(second)[0]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_killed_over_and_over_and_resumed_the_weights_are_the_same_bits(tmp_path: Path) -> None:
    assert loop(tmp_path / "a", 60) == (0, "")
    rng, killed = np.random.default_rng(1), []
    saved = tmp_path / "b/run/checkpoint.safetensors"
    for attempt in range(4):
        process = start("-c", LOOP, str(tmp_path / "b"), "60")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if attempt % 2:  # while a checkpoint is written, if it can be caught
            deadline = time.monotonic() + 5
            while not any(saved.parent.glob(".*.part")) and process.poll() is None and time.monotonic() < deadline:
                pass
        else:
            time.sleep(float(rng.uniform(0.1, 0.4)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append(process.returncode)
    assert -signal.SIGKILL in killed
    assert loop(tmp_path / "b", 60) == (0, "")
    assert_same_weights(tmp_path / "a/run/checkpoint.safetensors", saved)
    assert {path.name for path in saved.parent.iterdir()} == {"checkpoint.safetensors"}


def test_the_command_survives_signals_and_writes_the_same_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 40, "validation_interval": 40, "ema": 0.9}
    whole, config = write(tmp_path / "a", training=settings), write(tmp_path / "b", training=settings)
    assert main(["fit", str(whole)]) == 0
    words = capsys.readouterr()
    assert "learned" in words.out
    assert f"tensorboard --logdir {tmp_path / 'a/run/tensorboard'}" in words.err
    assert f"results: {tmp_path / 'a/run/tiny.safetensors'}" in words.err
    assert "memory plan: plain" in words.err

    saved, code = tmp_path / "b/run/checkpoint.safetensors", []
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(SCRIPT, str(config), *(["--resume"] if code else []))
        wait_for_another(saved, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        code.append(process.returncode)
        if number == signal.SIGTERM:
            assert "stopped by SIGTERM" in errors
            assert "--resume" in errors
    assert code == [-signal.SIGKILL, 128 + signal.SIGTERM]
    assert not (tmp_path / "b/run/tiny.safetensors").exists()
    assert 0 < checkpoint.read(saved)[2].step < 40

    assert main(["fit", str(config)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["fit", str(config), "--resume"]) == 0
    first, second = (Bundle.load(tmp_path / name / "run/tiny.safetensors") for name in "ab")
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.card["metrics"] == second.card["metrics"]
    assert_same_weights(tmp_path / "a/run/checkpoint.safetensors", saved)
    average = {name: value for name, value in checkpoint.read(saved)[0].items() if name.startswith("average/")}
    assert all(torch.equal(average[f"average/{name}"], value) for name, value in theirs.items())

    # The card says what it really was.
    card = second.card
    assert (card["steps"], card["ema"], card["precision"], card["repeatable"]) == (40, 0.9, "float32", True)
    assert card["data"]["simulated_share"] == 1
    assert card["data"]["examples"] == 40
    assert card["data"]["ranges"]["coils"] == [3, 5]
    assert {"seed", "machine", "seconds", "hours", "metrics", "date", "versions", "target"} <= set(card)
    assert json.loads(json.dumps(card)) == card

    # A bundle to begin from, more steps, and a shorter name.
    other = write(tmp_path / "c", training={"steps": 1, "validation_interval": 9})
    assert main(["fit", str(other), "--from", str(tmp_path / "b/run/tiny.safetensors"), "--quiet"]) == 0
    card = Bundle.load(tmp_path / "c/run/tiny.safetensors").card
    assert card["began_from"]["digest"] == second.digest
    assert main(["fit", str(other), "--resume", "training.steps=2", f"output.bundle={tmp_path / 'd.safetensors'}"]) == 0
    card = Bundle.load(tmp_path / "d.safetensors").card
    assert (card["steps"], card["began_from"]["digest"]) == (2, second.digest)
    assert main(["fit", str(other), "--resume", "--from", "another"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Shared batches, gradients added up once: the same training but for rounding."""
    settings = {"steps": 5, "validation_interval": 5, "batch": 3, "max_hours": 1}
    found = []
    for processes in (1, 2):
        config = write(tmp_path / str(processes), training=settings)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        process = start(*launch, SCRIPT, str(config))
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found.append(Bundle.load(tmp_path / str(processes) / "run/tiny.safetensors"))
    one, two = found
    assert one.card["steps"] == two.card["steps"] == 5
    assert two.card["processes"] == 2
    for ours, reference in zip(two.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert loop(folder, 3) == (0, "")
    saved = folder / "run/checkpoint.safetensors"
    before, size = saved.read_bytes(), saved.stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    # Steps may grow, so the same training goes on; but no file may be as large as its checkpoint any more.
    code, errors = loop(folder, 6, limit)
    assert code == 1
    assert "checkpoint.safetensors cannot be written: File too large" in errors
    assert saved.read_bytes() == before
    assert loop(folder, 6) == (0, "")
    assert checkpoint.read(saved)[2].step == 6
    assert {path.name for path in saved.parent.iterdir()} == {"checkpoint.safetensors"}


def test_a_full_disk_ends_the_board_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(tmp_path, 0)
    board.scalar("a", 1.0, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "add_scalar", full)
    board.scalar("a", 2.0, 2)
    board.scalar("a", 3.0, 3)
    board.image("b", torch.zeros(1, 3, 4), 3)
    board.close()
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_one_training_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with directory.claimed(run), pytest.raises(DataError, match="another training"), directory.claimed(run):
        pass
    with directory.claimed(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used"), directory.claimed(tmp_path / "file" / "run"):
        pass
    with pytest.raises(DataError, match="is a folder"):
        directory.check_target(tmp_path)
    with pytest.raises(DataError, match="cannot be made"):
        directory.check_target(tmp_path / "file" / "b.safetensors")


def test_the_example_that_is_not_finite_is_named(tmp_path: Path) -> None:
    examples = [phantom(seed) for seed in range(3)]
    examples[1] = replace(examples[1], truth=examples[1].truth * math.nan)
    trainer = Trainer(tiny(tmp_path, training={"steps": 4}), examples, examples[:1])
    with pytest.raises(DivergedError, match=r"\(example 1, whose data are not finite\): the loss is nan.*prepare it"):
        trainer.run()
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


def test_no_examples(tmp_path: Path) -> None:
    for examples, split in (([], "training"), ([phantom(0)], "validation")):
        with pytest.raises(DataError, match=f"no example for {split}"):
            Trainer(tiny(tmp_path), examples, [])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 18, 14), r"3 slices, but the model is for 2d"), ((2, 1, 18, 14), r"2 frames, but the model is for 2d")],
)
def test_examples_of_another_layout_are_named(tmp_path: Path, shape: Any, message: str) -> None:
    examples: list[Example] = [phantom(0), phantom(1, shape=shape)]
    trainer = Trainer(tiny(tmp_path), examples, examples[:1])
    with pytest.raises(DataError, match=rf"example 1 .*{message}"):
        trainer.run()


def test_the_card_of_a_mixture(tmp_path: Path) -> None:
    from training.anatomies import Entry, Folder
    from training.sources import Mixture, Source

    entries = tuple(
        Entry(subject, "train", "volume", f"{subject}.safetensors", (4, 5, 6), origin="hospital", licence=licence)
        for subject, licence in (("s1", "CC0"), ("s2", "CC-BY"))
    )
    examples: Any = [phantom(0)]
    trainer = Trainer(tiny(tmp_path), examples, examples)
    sources = (Source(3, Folder(tmp_path / "heads", entries), entries, (1, 1)), Source(1, None, (), (1, 1)))
    trainer.examples = type("Mixed", (), {"mixture": Mixture(sources)})()
    data = describe_data(trainer.config, trainer)
    assert data["simulated_share"] == 0.25
    assert data["sources"] == [
        {
            "name": "heads",
            "share": 0.75,
            "subjects": 2,
            "kinds": {"volume": 2},
            "licences": ["CC-BY", "CC0"],
            "origins": ["hospital"],
        },
        {"name": "simulation", "share": 0.25},
    ]


def test_configurations_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(iter(shipped()))
    assert main(["fit", name[:-1]]) == 1
    assert f"did you mean '{name}'" in capsys.readouterr().err
    assert main(["fit", f"nowhere/{name}.yaml"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert load(name) == load(shipped()[name])
