"""`mel plan`: a table, JSON, a curve, and errors in one line."""

import json
from pathlib import Path

import pytest

from melcore.cli import main

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "modl_3d_full.yaml"
SMALL = [
    "--shape",
    "20,24,16",
    "--coils",
    "4",
    "model.iterations=3",
    "model.regulariser.channels=8",
    "model.cg_iterations=3",
]


def test_the_plan_is_printed_drawn_and_serialised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    curve = tmp_path / "curve.png"
    assert main(["plan", str(CONFIG), *SMALL, "--memory", "8MiB", "--json", "--curve", str(curve)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["predicted_peak_bytes"] <= 8 << 20
    assert plan["relative_time"] >= 1
    assert [row["iteration"] for row in plan["iterations"]] == [1, 2, 3]
    assert all(row["executor"] and row["kept"] and row["where"] for row in plan["iterations"])
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_table_names_what_is_kept_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIG), *SMALL, "--memory", "1GiB"]) == 0
    printed = capsys.readouterr().out
    assert "kept for the backward" in printed
    assert "predicted peak:" in printed
    assert "1.00 x plain backpropagation" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--memory", "1MiB"], "the least that would do is"),
        ([*SMALL, "--memory", "much"], "expected a size such as 12GiB"),
        (["--shape", "20,24", "--coils", "4", "--memory", "1GiB"], "--shape takes three sizes"),
        (["--shape", "20,24,32", "--coils", "0", "--memory", "1GiB"], "--coils must be at least 1"),
        ([*SMALL, "--memory", "1GiB", "model.iteratons=4"], "did you mean"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(CONFIG), *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_the_gpu_benchmark_runs_at_toy_sizes() -> None:
    from benchmarks.memory_gpu import TOY, rows

    found = list(rows(TOY))
    assert {row["precision"] for row in found} == {"float32", "tf32", "bfloat16"}
    assert not any("error" in row for row in found)
    assert all("stream" in row["executor"] for row in found if "within" in row["problem"])
