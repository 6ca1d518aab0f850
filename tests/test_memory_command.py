"""`mel plan` in a process of its own: a table, JSON, a curve, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "modl_3d_full.yaml"
SMALL = ["--shape", "20,24,32", "--coils", "4", "model.iterations=3", "model.regulariser.channels=8"]


def mel(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "melcore.cli", "plan", str(CONFIG), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_plan_is_printed_drawn_and_serialised(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = tmp_path / "curve.png"
    result = mel(*SMALL, "--memory", "8MiB", "--json", "--curve", str(curve))
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert 0 < plan["predicted_peak_bytes"] <= 8 << 20
    assert plan["relative_time"] >= 1
    assert [row["iteration"] for row in plan["iterations"]] == [1, 2, 3]
    assert all(row["executor"] and row["kept"] and row["where"] for row in plan["iterations"])
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_table_names_what_is_kept_and_where() -> None:
    result = mel(*SMALL, "--memory", "1GiB")
    assert result.returncode == 0, result.stderr
    assert "kept for the backward" in result.stdout
    assert "predicted peak:" in result.stdout
    assert "1.00 x plain backpropagation" in result.stdout


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
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str) -> None:
    result = mel(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
