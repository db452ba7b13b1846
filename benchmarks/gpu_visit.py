# SPDX-License-Identifier: Apache-2.0
"""All that one visit to a GPU should answer, in order of value, inside ten minutes.

    python benchmarks/gpu_visit.py FOLDER [--seconds 560] [--parts NAME ...] [--dry-run]

Each part is a process of its own with its own time limit, cut to what is left of the whole, and writes its record into
FOLDER as it goes. ``visit.json`` there says after every part what ran, how it ended and how long it took, and is whole
whenever the visit is cut off; each part's output lies beside it. What a machine lacks (a GPU, TensorRT,
onnxruntime-gpu, torch, pytest) is said in one line and skipped. The exit code is 0 if nothing that ran failed.

``--dry-run`` runs the same parts small, on any machine. Never run on a GPU yet.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Any

from harness import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
#: Grid of the goals: 1280x704, 121 frames; and the smaller one.
CLIPS = ("121x1280x704", "121x768x512")
EXPORT = ("-c", "from ltxrt_export.cli import main; main()")
#: The packages as they lie in the checkout, for a machine where ltxrt is not installed.
SOURCES = os.pathsep.join(str(ROOT / name) for name in ("runtime", "kernels", "export"))
#: What the runtime imports, and what the diffusers classes need beside it.
RUNTIME = ("onnxruntime", "av", "pydantic", "soxr", "tokenizers")
TORCH_SIDE = (*RUNTIME, "torch", "diffusers", "transformers", "safetensors")


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        name: Its name; ``<name>.log`` holds what it printed.
        seconds: Longest that it may take.
        command: Arguments of Python; ``{out}`` is the folder of the visit.
        dry: The same, small, without a GPU.
        needs: Python packages without which it is skipped.
        gpu: Whether it needs the GPU, except in a dry run.
        provider: Whether it needs ONNX Runtime's CUDA provider, except in a dry run.
        environment: Added to the environment.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    dry: tuple[str, ...]
    needs: tuple[str, ...] = ()
    gpu: bool = True
    provider: bool = False
    environment: dict[str, str] = field(default_factory=dict[str, str])


def bench(name: str, *arguments: str) -> tuple[str, ...]:
    """A benchmark's command."""
    return (str(HERE / f"bench_{name}.py"), *arguments)


def gpu_tests(where: str) -> tuple[str, ...]:
    """The tests of a file or folder that need a GPU.

    A file that needs a package which is not there does not keep the others from it, nor does another version of a
    package that warns.
    """
    chosen = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return (*chosen, "-W", "default::DeprecationWarning", "-W", "default::FutureWarning", where)


def blocks(name: str, counts: Sequence[str], backends: Sequence[str], clips: Sequence[str]) -> tuple[str, ...]:
    """Full-width blocks of the DiT, into a folder of their own."""
    chosen = ("--blocks", *counts, "--backends", *backends, "--clips", *clips)
    return bench("engines", *chosen, "--repeats", "5", "--out", f"{{out}}/{name}")


#: In order of value: what is not known, then what is compared, then what is nice to have.
PARTS = (
    Part(
        "doctor",
        20,
        ("-m", "ltxrt", "doctor", "--json"),
        ("-m", "ltxrt", "doctor", "--json"),
        needs=("typer", "pydantic"),
        gpu=False,
    ),
    Part(
        "kernel_tests",
        120,
        gpu_tests("tests/kernels"),
        (*gpu_tests("tests/kernels"), "--collect-only"),
        needs=("pytest", "hypothesis", "cuda.core"),
        environment={"LTXRT_REQUIRE_GPU": "1"},
    ),
    Part(
        "device_tests",
        30,
        gpu_tests("tests/runtime/test_stream.py"),
        (*gpu_tests("tests/runtime/test_stream.py"), "--collect-only"),
        needs=("pytest", "hypothesis", "cuda.core"),
        environment={"LTXRT_REQUIRE_GPU": "1"},
    ),
    Part(
        "engine_tests",
        45,
        gpu_tests("tests/runtime/test_engine_onnx_cuda.py"),
        (*gpu_tests("tests/runtime/test_engine_onnx_cuda.py"), "--collect-only"),
        needs=("pytest", "cuda.core", *RUNTIME),
        environment={"LTXRT_REQUIRE_GPU": "1"},
        provider=True,
    ),
    Part("kernels", 60, bench("kernels", "--out", "{out}"), bench("kernels", "--dry-run", "--ops", "euler_step")),
    Part(
        "cuda_pipeline",
        45,
        bench("pipeline", "--sides", "ltxrt", "--out", "{out}"),
        bench("pipeline", "--sides", "ltxrt", "--dry-run", "--out", "{out}"),
        needs=RUNTIME,
        provider=True,
    ),
    Part(
        "torch_pipeline",
        120,
        bench("pipeline", "--sides", "ltxrt", "torch", "torch-compile", "--apart", "--out", "{out}/torch_pipeline"),
        bench("pipeline", "--sides", "ltxrt", "--dry-run", "--out", "{out}/torch_pipeline"),
        needs=TORCH_SIDE,
    ),
    Part(
        "torch_blocks",
        120,
        blocks("torch_blocks", ("1", "2", "4"), ("torch", "torch-compile"), CLIPS),
        bench("engines", "--blocks", "1", "--backends", "torch", "--dry-run", "--out", "{out}/torch_blocks"),
        needs=(*TORCH_SIDE, "onnx"),
    ),
    Part(
        "exported_blocks",
        120,
        blocks("exported_blocks", ("1", "2"), ("onnxruntime",), CLIPS),
        bench("engines", "--blocks", "--backends", "--dry-run", "--out", "{out}/exported_blocks"),
        needs=(*TORCH_SIDE, "onnx", "ml_dtypes"),
        provider=True,
    ),
    Part(
        "whole_depth",
        120,
        blocks("whole_depth", ("8", "48"), ("torch",), CLIPS[:1]),
        bench("engines", "--blocks", "2", "--backends", "torch", "--dry-run", "--out", "{out}/whole_depth"),
        needs=(*TORCH_SIDE, "onnx"),
    ),
    Part(
        "training",
        120,
        (*EXPORT, "train-tiny", "--out", "{out}/trained", "--device", "cuda", "--minutes", "1.5"),
        (*EXPORT, "train-tiny", "--help"),
        needs=TORCH_SIDE,
    ),
    # Of what the parts above left; it can be made again later from the folder.
    Part(
        "estimate",
        20,
        (str(HERE / "estimate.py"), "{out}", "--out", "{out}"),
        (str(HERE / "estimate.py"), "{out}", "--out", "{out}"),
        needs=("numpy",),
        gpu=False,
    ),
)


def main() -> int:
    """Run the parts; 0 if none that ran failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--seconds", type=float, default=560.0, help="for the whole visit")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="default: all, in order")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    chosen = [part for part in PARTS if options.parts is None or part.name in options.parts]
    options.folder.mkdir(parents=True, exist_ok=True)
    visit: dict[str, Any] = {"machine": asdict(machine()), "dry_run": options.dry_run, "parts": {}}
    keep(options.folder, visit)
    failed = False
    for name, outcome in visited(chosen, options.folder.resolve(), options.seconds, dry_run=options.dry_run):
        visit["parts"][name] = outcome
        keep(options.folder, visit)
        failed = failed or outcome["outcome"] in ("failed", "out of time")
        print(
            f"{name:<16} {outcome['outcome']:<12} {outcome['seconds']:7.1f} s  {outcome.get('reason', '')}", flush=True
        )
    return int(failed)


def visited(
    parts: list[Part], folder: Path, seconds: float, *, dry_run: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part and what became of it: ``done``, ``failed``, ``out of time`` or ``skipped``."""
    end = clock() + seconds
    for part in parts:
        begin, left = clock(), end - clock()
        reason = "no time is left" if left < 5 else missing(part, dry_run=dry_run)
        if reason:
            yield part.name, {"outcome": "skipped", "reason": reason, "seconds": 0.0}
            continue
        outcome = run(part, folder, min(part.seconds, left), dry_run=dry_run)
        yield part.name, {**outcome, "seconds": round(clock() - begin, 1)}


def missing(part: Part, *, dry_run: bool) -> str:
    """Why a part cannot run here; empty if it can."""
    for name in part.needs:
        try:
            found = util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"the Python package {name} is not installed"
    if dry_run:
        return ""
    if part.gpu and machine().gpu is None:
        return "there is no NVIDIA GPU"
    return "this ONNX Runtime has no CUDA provider" if part.provider and not cuda_provider() else ""


def cuda_provider() -> bool:
    """Whether the ONNX Runtime that is installed has it; whether it loads, the part itself finds out."""
    return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()


def run(part: Part, folder: Path, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    """Run one part in a session of its own, so that whatever it started ends with it."""
    arguments = [text.replace("{out}", str(folder)) for text in (part.dry if dry_run else part.command)]
    path = os.pathsep.join(filter(None, (SOURCES, os.environ.get("PYTHONPATH"))))
    own = {} if dry_run else part.environment
    environment = {**toolkit(), **os.environ, **own, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    with (folder / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"outcome": "out of time", "reason": f"after {seconds:.0f} s; what it had written is kept"}
    if code:
        lines = (folder / f"{part.name}.log").read_text("utf-8", "replace").strip().splitlines()
        return {"outcome": "failed", "exit_code": code, "reason": lines[-1][:200] if lines else ""}
    return {"outcome": "done"}


def toolkit() -> dict[str, str]:
    """Where the CUDA headers lie that Python packages do not bring, for who looks for them; nothing if it is said."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or {"CUDA_PATH", "CUDA_HOME"} & os.environ.keys():
        return {}
    return {"CUDA_PATH": str(Path(nvcc).resolve().parents[1])}


def keep(folder: Path, visit: dict[str, Any]) -> None:
    """Write ``visit.json``, whole or not at all."""
    partial = folder / "visit.partial"
    partial.write_text(json.dumps(visit, indent=2) + "\n")
    partial.replace(folder / "visit.json")


if __name__ == "__main__":
    sys.exit(main())
