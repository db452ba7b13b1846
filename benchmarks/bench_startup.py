# SPDX-License-Identifier: Apache-2.0
"""How long until the first clip can begin: from an empty process to every network loaded?

    python benchmarks/bench_startup.py [--bundle DIR] [--repeats 5] [--out DIR] [--dry-run]

``generate`` is the command itself: from its start to its line that says that the networks are loaded, and to its end,
for a clip of 9 frames. ``worker`` is a server's worker process, to the word that it takes jobs: every network has then
run once. ``phases`` says where the time goes, inside a process of its own. Files are in the system's cache, as after a
first use. The last line is the record's path. ``--dry-run`` measures once and writes nothing unless ``--out`` says
where.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, measured, record

PACKAGES = ("ltxrt", "numpy", "onnxruntime", "av", "tokenizers", "pydantic", "typer", "rich")
LOADED = "load: 1/1"


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the tiny one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(phases(options.bundle)))
        return
    repeats = 1 if options.dry_run else options.repeats
    results = run(options.bundle, repeats)
    out = options.out or (None if options.dry_run else RESULTS)
    print(json.dumps(results) if out is None else record("startup", PACKAGES, results, out))


def run(bundle: Path | None, repeats: int) -> dict[str, Any]:
    """Every way in, one after the other; the very first run of each is not recorded."""
    given = ["--bundle", str(bundle)] if bundle else []
    inside = [measured([__file__, "--worker", *given]).result for _ in range(repeats + 1)][1:]
    commands = [generate(given) for _ in range(repeats + 1)][1:]
    workers = [worker(bundle) for _ in range(repeats + 1)][1:]
    return {
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 2),
        "generate": spreads(commands),
        "worker": spreads(workers),
        "phases": spreads(inside),
    }


def spreads(runs: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Median and 90th percentile of every figure, in seconds."""
    from ltxrt.cli_bench import Spread

    every = list(runs)
    return {name: asdict(Spread.of([run[name] for run in every])) for name in every[0]}


def generate(given: list[str]) -> dict[str, float]:
    """Seconds from the start of ``ltxrt generate`` to loaded networks and to its end.

    Raises:
        RuntimeError: It failed, or never said that the networks are loaded.
    """
    from ltxrt.media import bundled_speech

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ltxrt", "generate", "--audio", str(bundled_speech()), "--prompt", "a face"]
        command += ["--no-match-audio-length", "--num-frames", "9", "--resolution", "128x128", "--seed", "0"]
        command += ["--output", str(Path(folder) / "clip.mp4"), *given]
        begin = time.perf_counter()
        loaded = None
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None  # it is a pipe
            for line in process.stderr:
                if line.startswith(LOADED):
                    loaded = time.perf_counter() - begin
        ended = time.perf_counter() - begin
    if process.returncode or loaded is None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"ready": round(loaded, 4), "ended": round(ended, 4)}


def worker(bundle: Path | None) -> dict[str, float]:
    """Seconds from the start of a worker process until it takes jobs.

    Raises:
        RuntimeError: It ended before.
    """
    from ltxrt.serve.worker import WorkerOptions

    with tempfile.TemporaryDirectory() as folder:
        options = WorkerOptions(name="bench", data=folder, bundle=None if bundle is None else str(bundle))
        command = [sys.executable, "-m", "ltxrt.serve.worker", options.as_argument()]
        begin = time.perf_counter()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None  # it is a pipe
            word = process.stdout.readline().strip()
            seconds = time.perf_counter() - begin
            process.communicate()  # the end of its stdin ends it
    if word != "ready":
        raise RuntimeError(f"the worker said {word!r}")
    return {"ready": round(seconds, 4)}


def phases(bundle: Path | None) -> dict[str, float]:
    """Seconds by phase, and by network; networks are loaded one after the other here."""
    begin = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[name] = round(now - begin, 4)
        begin = now

    import ltxrt.cli_report
    import ltxrt.pipeline  # noqa: F401  # timed

    lap("import")
    from ltxrt.bundle import Bundle
    from ltxrt.engine_store import EngineStore
    from ltxrt.manifest import NETWORK_NAMES
    from ltxrt.tokenizer import PromptTokenizer

    opened = Bundle.open(bundle)
    lap("open_and_hash")
    PromptTokenizer.open(opened.file("tokenizer.json"), opened.manifest.model.context_tokens)
    lap("tokenizer")
    store = EngineStore(opened)
    lap("look_at_machine")
    store.engines("high")
    lap("load_networks")
    if store.backend.name == "onnxruntime-cpu":
        from ltxrt.engine_onnx import OnnxEngine

        for name in NETWORK_NAMES:
            entry = opened.network("high", name)
            ports = [tuple(tensor.spec() for tensor in side) for side in (entry.inputs, entry.outputs)]
            begin = time.perf_counter()
            OnnxEngine(name, opened.file(entry.file), *ports)
            lap(f"load_{name}_alone")
    return seconds


if __name__ == "__main__":
    main()
