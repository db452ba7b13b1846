# SPDX-License-Identifier: Apache-2.0
"""A small soak: calls of every kind, a killed worker, a killed server; the benchmark does the same a thousand times."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "bench_serving.py"


def test_nothing_is_lost_wrong_or_left(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--parts", "soak", "--soak", "36", "--kill-every", "24"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])["soak"]
    assert found["passed"]
    assert (found["lost"], found["wrong"], found["jobs_with_other_files"]) == ([], [], [])
    assert (found["killed_workers"], found["server_restarts"], found["processes_left"]) == (1, 1, 0)
    assert sum(found["calls"].values()) == 36
    assert set(found["jobs"]) <= {"succeeded", "cancelled", "failed"}
    assert found["jobs"]["succeeded"] > 12
    assert json.loads((tmp_path / "out" / "serving-soak.json").read_text())["benchmark"] == "serving"
    # ONNX Runtime may keep a file of its own there.
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".ses"}
