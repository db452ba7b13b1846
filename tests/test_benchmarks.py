# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs: their arithmetic is right, their dry runs run, and the README's tables are their results."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A benchmark's module by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def dry_run(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# --- the report ---


def test_readme_has_the_tables_of_the_results(module):
    report = module("report")
    text = report.README.read_text("utf-8")
    assert report.with_tables(text, report.tables(report.RESULTS)) == text, "run python benchmarks/report.py"


def side(seconds, memory):
    spread = {"p50": seconds, "p90": seconds + 1}
    return {
        "wall_seconds": spread,
        "real_time_factor": {"p50": seconds / 5, "p90": 0.0},
        "peak_rss_mb": memory,
        "ready_seconds": 0.5,
        "load_average_before": 0.25,
        "stages": {"encode": spread, "load": spread},
    }


def record(name, results, gpu=None):
    here = {"cpu": "a CPU", "cores": 2, "gpu": gpu}
    return {"benchmark": name, "date": "2026-01-01", "machine": here, "versions": {"torch": "9"}, "results": results}


def written(folder, **records):
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_pipeline_table(module, tmp_path):
    ours = {
        **side(2.0, 400.0),
        "first_fragment_seconds": {"p50": 0.75, "p90": 1},
        "outside_backends_share": {"p50": 0.02},
    }
    results = {
        "clip": {"frames": 9, "resolution": "128x128", "repeats": 5},
        "threads": 2,
        "sides": {"ltxrt": ours, "torch": side(4.0, 1000.0)},
        "ltxrt_without": {"nothing": side(2.5, 400.0), "shared_arena": side(3.0, 600.0)},
        "ltxrt_over": {"torch": {"time": 0.5, "peak_memory": 0.4, "ready": 1.0}},
    }
    made = module("report").tables(written(tmp_path, a=record("pipeline", results)))
    assert "| ltxrt | 2.00 | 3.00 | 0.75 | 0.40 | 400 | 0.50 |" in made
    assert "| diffusers classes, torch eager | 4.00 | 5.00 |  | 0.80 | 1000 | 0.50 |" in made
    assert "0.50 of the time, 0.40 of the memory" in made
    assert "Outside engines and codecs: 2.0% of the time." in made
    assert "| nothing | 2.50 |" in made
    assert "| an arena for every network | 3.00 |" in made
    assert "on a CPU, 2 cores, 2026-01-01, load average before 0.25; torch 9." in made
    assert "On a GPU: not run yet" in made


def test_serving_tables(module, tmp_path):
    turns = {
        side: [{"seconds": 2 * seconds, "cpu_seconds": 2.0} for seconds in runs]
        for side, runs in {"stream": (1, 3, 2), "files": (2, 4, 3), "served": (3, 5, 4)}.items()
    }
    assert module("serving.throughput").loss(turns, "files", "seconds") == pytest.approx(1 / 3, abs=1e-4)
    spread = {"p50": 10.0, "p99": 30.0, "max": 40.0}
    rate = {"rate": 0.5, "calls": 7, "latency_ms": {"sync": spread}, "first_fragment_ms": None, "health_ms": spread}
    killed = {"killed_workers": 2, "processes_left": 0, "lost": ["a"], "wrong": [], "calls": {"sync": 1200, "bad": 34}}
    left = {"folders_without_a_job": ["b"], "incoming_left": [], "temporary_left": ["c"]}
    memory = {"early": {"server_rss_mb": 100.4}, "idle_at_the_end": {"server_rss_mb": 101.0}}
    results = {
        "load_average_before": [0.5, 0.0, 0.0],
        "throughput": {"turns": turns, "clips_a_turn": 2, "clip": {"num_frames": 9}, "loss": 0.25, "health_ms": spread},
        "load": {"slots": 2, "rates": [{**rate, "problems": []}]},
        "soak": {**killed, **left, "server": memory},
    }
    made = module("report").tables(written(tmp_path, a=record("serving", results)))
    assert "3 turns of 2 each; +25.0% of time" in made
    assert "the median over turns that gave +25.0% to +50.0%:" in made
    assert "| `ltxrt serve`, a checked file | 4.00 | 3.00 | 5.00 | 1.00 |" in made
    assert "| 0.5 | 7 | 10, 40 |  |  | 10, 40 | 0 |" in made
    assert "1,234 calls" in made
    assert "1 jobs lost, 0 in a wrong state, 2 files and 0 processes left" in made
    assert "load average before 0.50" in made


def test_a_gpu_s_results_take_the_place_of_the_note(module, tmp_path):
    row = {"median": 1e-5, "gb_per_second": 2400.0, "share_of_copy": 0.8}
    results = {"copy": {"gb_per_second": 3000.0}, "kernels": {"euler_step [1]": row}}
    made = module("report").tables(written(tmp_path, a=record("kernels", results, gpu="a GPU")))
    assert "not run yet" not in made
    assert "| euler_step [1] | 10.0 | 2400 | 80% |" in made


def test_page_without_marks_is_refused(module):
    with pytest.raises(ValueError, match="lacks the marks"):
        module("report").with_tables("# a page\n", "")


# --- the roofline ---


def test_work_of_a_graph(module, tmp_path):
    text = """<ir_version: 10, opset_import: ["": 23]>
    toy (float[1,n,4] x, float[1,2,n,8] q) => (float[1,n,6] y, float[1,2,n,8] a)
    <float[4,6] w, float[6] b> {
        h = MatMul (x, w)
        y = Add (h, b)
        a = Attention (q, q, q)
    }"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("w", (4, 6)), ("b", (6,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    onnx.save(model, tmp_path / "toy.onnx")
    work = module("roofline").graph_work(tmp_path / "toy.onnx", {"x": (1, 5, 4), "q": (1, 2, 5, 8)})
    assert work.flops == 2 * 5 * 4 * 6 + 2 * 2 * 5 * 5 * (8 + 8)
    assert work.least_bytes == 4 * (5 * 4 + 80 + 24 + 6 + 5 * 6 + 80)
    assert work.moved_bytes == 4 * ((20 + 24 + 30) + (30 + 6 + 30) + (80 + 80))
    assert work.unknown_nodes == 0


def test_convolutions_count_what_they_sum_over(module, tmp_path):
    graph = """<ir_version: 10, opset_import: ["": 23]> toy (float[1,4,n,8,8] x) => (float[1,6,m,8,8] y)
    <float[6,4,3,3,3] w> { y = Conv <pads = [0, 1, 1, 0, 1, 1]> (x, w) }"""
    model = onnx.parser.parse_model(graph)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((6, 4, 3, 3, 3), np.float32), "w"))
    onnx.save(model, tmp_path / "toy.onnx")
    work = module("roofline").graph_work(tmp_path / "toy.onnx", {"x": (1, 4, 5, 8, 8)})
    assert work.flops == 2 * (6 * 3 * 8 * 8) * (4 * 27)


def test_bound_is_the_longer_of_arithmetic_and_memory(module):
    roofline = module("roofline")
    ceilings = roofline.Ceilings(tflops=2.0, gb_per_second=10.0)
    assert ceilings.bound_seconds(roofline.Work(10**12, 10**9, 0, 0)) == pytest.approx(0.5)
    assert ceilings.bound_seconds(roofline.Work(10**9, 10**10, 0, 0)) == pytest.approx(1.0)


def test_fp8_product_is_the_product(module):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64).to(torch.float8_e4m3fn).float() for _ in range(2))
    torch.manual_seed(0)
    product = module("roofline").fp8_product(64, "cpu")
    torch.testing.assert_close(product(), (a @ b.t()).bfloat16(), rtol=0.02, atol=0.02)


# --- the programs ---


def test_pipeline_beside_torch():
    results = json.loads(dry_run("bench_pipeline", "--without", "decode_chunks"))
    ours, torch = results["sides"]["ltxrt"], results["sides"]["torch"]
    assert set(ours["stages"]) == {*torch["stages"], "load"}
    assert torch["bytes"] > 1000
    # One run was recorded: the median over turns is its share.
    assert results["ltxrt_over"]["torch"]["time"] == pytest.approx(
        ours["runs_seconds"][0] / torch["runs_seconds"][0], abs=1e-3
    )
    assert set(results["ltxrt_without"]) == {"nothing", "decode_chunks"}
    assert results["ltxrt_without"]["decode_chunks"]["wall_seconds"]["p50"] > 0


def test_torch_compile_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = [sys.executable, str(BENCHMARKS / "bench_pipeline.py"), "--sides", "torch-compile", "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert "no-such-compiler is not found: install it" in ran.stderr
    arguments = ("--blocks", "1", "--backends", "torch-compile")
    assert "no-such-compiler" in json.loads(dry_run("bench_engines", *arguments))["steps"]["torch-compile"]["left out"]


def test_engines():
    results = json.loads(dry_run("bench_engines"))
    assert set(results["networks"]) == {"text_encoder", "audio_encoder", "denoiser", "upsampler", "video_decoder"}
    assert len(results["networks"]["denoiser"]) == 2  # two stages
    for rows in results["networks"].values():
        for row in rows.values():
            assert row["flops"] > 1e6
            assert row["unknown_nodes"] == 0
            assert row["share_of_bound"] > 0


def test_blocks_in_torch(tmp_path):
    arguments = ("--blocks", "1", "2", "--backends", "torch", "--out", str(tmp_path))
    path = Path(dry_run("bench_engines", *arguments).strip().splitlines()[-1])
    results = json.loads(path.read_text())["results"]
    assert set(results["steps"]["torch"]["9x128x128 stage 2"]) == {"1", "2"}
    assert set(results["per_block_seconds"]["torch"]) == {"9x128x128 stage 1", "9x128x128 stage 2"}


def test_startup():
    results = json.loads(dry_run("bench_startup"))
    ready = results["generate"]["ready"]["p50"]
    assert 0 < ready < results["generate"]["ended"]["p50"]
    assert results["worker"]["ready"]["p50"] > results["phases"]["import"]["p50"]


@pytest.mark.slow
def test_throughput_beside_one_process(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_serving.py"), "--parts", "throughput", "--clips", "1"]
    ran = subprocess.run(
        [*command, "--rounds", "1", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    found = json.loads(ran.stdout.splitlines()[-1])["throughput"]
    assert ran.returncode == (not found["passed"])  # one turn of one clip proves no target
    (files,), (served,) = found["turns"]["files"], found["turns"]["served"]
    assert found["loss"] == pytest.approx(served["seconds"] / files["seconds"] - 1, abs=1e-3)
    assert served["cpu_seconds"] > 0.1
    assert found["health_ms"]["count"] > 1
    kept = json.loads((tmp_path / "serving-throughput.json").read_text())
    assert kept["results"]["throughput"] == found


def test_slope_is_between_the_smallest_and_the_largest_count(module):
    slope = module("bench_engines").slope
    assert slope({"2": {"median": 1.0}, "10": {"median": 5.0}, "4": {"median": 9.0}}) == pytest.approx(0.5)
    assert slope({"2": {"median": 1.0}}) is None


# --- the visit to a GPU ---


def parts(module, *named):
    visit = module("gpu_visit")
    return visit, [visit.Part(name, seconds, (), ("-c", code), needs) for name, seconds, code, needs in named]


def test_visit_says_how_every_part_ended(module, tmp_path):
    visit, chosen = parts(
        module,
        ("good", 60, "print('fine')", ()),
        ("bad", 60, "print('why it failed'); raise SystemExit(3)", ()),
        ("slow", 1, "import time; print('began', flush=True); time.sleep(60)", ()),
        ("absent", 60, "", ("no_such_package.at_all",)),
    )
    begin = time.monotonic()
    found = dict(visit.visited(chosen, tmp_path, 60, dry_run=True))
    assert time.monotonic() - begin < 30
    assert [found[name]["outcome"] for name in ("good", "bad", "slow", "absent")] == [
        "done",
        "failed",
        "out of time",
        "skipped",
    ]
    assert found["bad"]["reason"] == "why it failed"
    assert found["bad"]["exit_code"] == 3
    assert "no_such_package" in found["absent"]["reason"]
    assert (tmp_path / "slow.log").read_text() == "began\n"


def test_visit_ends_when_its_time_is_over(module, tmp_path):
    visit, chosen = parts(module, *[(f"part{index}", 60, "", ()) for index in range(3)])
    times = iter([0.0, 0.0, 0.0, 1.0, 56.0, 56.0, 57.0, 57.0, 57.0])
    found = dict(visit.visited(chosen, tmp_path, 60, dry_run=True, clock=lambda: next(times)))
    assert [outcome["outcome"] for outcome in found.values()] == ["done", "skipped", "skipped"]


def test_parts_that_need_a_gpu_are_skipped_without_one(module, monkeypatch):
    visit = module("gpu_visit")
    part = visit.Part("kernels", 1, (), ())
    monkeypatch.setattr(visit, "machine", lambda: type("Machine", (), {"gpu": None}))
    assert visit.missing(part, dry_run=False) == "there is no NVIDIA GPU"
    assert visit.missing(part, dry_run=True) == ""


def test_parts_of_onnx_runtime_on_a_gpu_are_skipped_without_its_provider(module, monkeypatch):
    visit = module("gpu_visit")
    part = visit.Part("cuda_pipeline", 1, (), (), provider=True)
    monkeypatch.setattr(visit, "machine", lambda: type("Machine", (), {"gpu": "NVIDIA H100"}))
    monkeypatch.setattr(visit, "cuda_provider", lambda: False)
    assert visit.missing(part, dry_run=False) == "this ONNX Runtime has no CUDA provider"
    assert visit.missing(part, dry_run=True) == ""
    monkeypatch.setattr(visit, "cuda_provider", lambda: True)
    assert visit.missing(part, dry_run=False) == ""


def test_parts_fit_into_the_visit_in_order_of_value(module):
    visit = module("gpu_visit")
    names = [part.name for part in visit.PARTS]
    assert names[:4] == ["doctor", "kernel_tests", "device_tests", "engine_tests"]
    assert sum(part.seconds for part in visit.PARTS[:8]) <= 560


def test_a_test_file_that_cannot_be_read_does_not_keep_the_others_from_the_gpu(module, tmp_path):
    visit = module("gpu_visit")
    (tmp_path / "test_one.py").write_text("import no_such_package\n")
    (tmp_path / "test_two.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [sys.executable, *visit.gpu_tests(str(tmp_path))]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "1 passed, 1 error" in ran.stdout


def test_headers_of_the_toolkit_are_found_beside_its_compiler(module, monkeypatch, tmp_path):
    visit, compiler = module("gpu_visit"), tmp_path / "cuda-13.0" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch(mode=0o755)
    (tmp_path / "nvcc").symlink_to(compiler)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visit.toolkit() == {"CUDA_PATH": str(tmp_path / "cuda-13.0")}
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert visit.toolkit() == {}
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    assert visit.toolkit() == {}


def test_visit_record_is_whole_after_every_part(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_visit.py"),
        str(tmp_path),
        "--dry-run",
        "--parts",
        "doctor",
        "kernels",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    visit = json.loads((tmp_path / "visit.json").read_text())
    assert visit["dry_run"] is True
    assert {name: outcome["outcome"] for name, outcome in visit["parts"].items()} == {
        "doctor": "done",
        "kernels": "done",
    }
    assert not list(tmp_path.glob("*.partial"))
