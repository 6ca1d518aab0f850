"""The streaming benchmark runs, and says where and how it was measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_small_benchmark_writes_its_tables_and_keeps_what_was_not_measured(tmp_path):
    command = [sys.executable, "benchmarks/streaming.py", "--small", "--output", str(tmp_path / "streaming")]
    for part in ("throughput", "sustained"):
        subprocess.run([*command, "--only", part], cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "streaming.json").read_text())
    assert set(found) == {"throughput", "sustained"}
    for part in found.values():
        assert "--small" in part["command"]
        assert "cores" in part["machine"]
    assert len(found["throughput"]["rows"]) == 10
    assert all(row["ours_per_cpu_second"] > 0 for row in found["throughput"]["rows"])
    (row,) = found["sustained"]["rows"]
    assert row["delivered"] == row["exams"] == 3
    assert (tmp_path / "streaming.md").read_text().count("## ") == 2
