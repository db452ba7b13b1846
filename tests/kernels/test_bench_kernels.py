# SPDX-License-Identifier: Apache-2.0
"""The benchmark up to the edge of the device: its dry run, its refusal without a GPU, its arithmetic."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ltxrt_kernels.ops import OPS

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"


def run(*arguments, path=None):
    environment = {**os.environ, "PATH": os.environ["PATH"] if path is None else str(path)}
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    spec = importlib.util.spec_from_file_location("bench_kernels", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run_compiles_and_prints_every_launch():
    pytest.importorskip("cuda.bindings.nvrtc")
    ran = run("--dry-run", "--ops", "euler_step")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert "nothing here has run on a GPU" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == [str(problem) for problem in OPS["euler_step"].production]
    assert all("90a: " in line and "120: " in line for line in lines[2:])


def test_without_a_gpu_nothing_is_recorded(tmp_path):
    before = set(PROGRAM.parent.glob("results/*"))
    ran = run("--ops", "euler_step", path=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.startswith("no GPU to measure on: ")
    assert set(PROGRAM.parent.glob("results/*")) == before


def test_times_are_the_events_and_the_first_ones_do_not_count(bench, monkeypatch):
    calls = []
    clock = iter(range(10**6))

    class Stream:
        def record(self, options):
            calls.append("record")
            # Milliseconds: the first ten launches take 1000 times as long.
            place = next(clock)
            return 5.0 * place if place >= 20 else 5000.0 * place

        def sync(self):
            calls.append("sync")

    cold = SimpleNamespace(fill=lambda value, stream: calls.append("fill"))
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(EventOptions=lambda timing_enabled: None))
    times = bench.device_times(lambda: calls.append("work"), Stream(), cold, 7)
    assert (times.median, times.p10, times.p90, times.repeats) == (0.005, 0.005, 0.005, 7)
    assert calls == [*["fill", "record", "work", "record"] * 17, "sync"]


def test_share_of_the_ceiling(bench):
    problem = OPS["euler_step"].production[0]
    times = bench.Timing(problem.moved_bytes / 2e12, 1.0, 1.0, 3)
    row = bench.described(problem, times, 4000.0)
    assert row["gb_per_second"] == 2000
    assert row["share_of_copy"] == 0.5
