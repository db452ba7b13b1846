# SPDX-License-Identifier: Apache-2.0
"""How long does a clip take, from the request to the last byte, and how long by the diffusers classes in torch?

    python benchmarks/bench_pipeline.py [--sides ltxrt torch ...] [--without NAME ...] [--out DIR] [--dry-run]

Sides: ``ltxrt``, ``torch`` (eager) and ``torch-compile`` (fp32 on the CPU, bf16 on a GPU, best attention). Each runs in
a process of its own, with the same sound, prompt, size, noise, schedule and weights, and encodes the same frames with
the same settings. They make their clips in turns, so that a machine that changes its pace changes it for all sides;
with ``--apart`` one side follows the other, for models of which a machine holds but one. One clip is not recorded, then
``--repeats`` are; reported are median and 90th percentile, our share of the other's time (the median over the turns),
peak memory of the process, time from an empty process to loaded models, and for ltxrt the time to the first fragment
and the share outside engines and codecs. The prompt cache is off: the text encoder runs every time.
torch.compile compiles in the clip that is not recorded, for a minute or more; on a machine without a C++ compiler its
side is left out, and the record says so.

Each ``--without`` runs ltxrt with one optimisation off, in turns with the others and with one that has them all;
``--without all`` does so for each. Weights are the tiny model's unless ``--bundle`` and ``--sources CHECKPOINT
TEXT_ENCODER UPSAMPLER`` name others. ``--dry-run`` makes one short clip on each side and writes nothing unless
``--out`` says where.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, missing_compiler, record
from turns import end_turn, in_turns, wait_for_turn

SIDES = ("ltxrt", "torch", "torch-compile")
PACKAGES = ("ltxrt", "numpy", "onnxruntime", "av", "torch", "diffusers", "transformers")


def main() -> None:
    """Run the sides and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=["ltxrt", "torch"])
    parser.add_argument("--without", nargs="*", choices=[*ABLATIONS, "all"], default=[])
    parser.add_argument("--bundle", type=Path, help="default: the tiny one")
    parser.add_argument("--sources", nargs=3, type=Path, metavar=("CHECKPOINT", "TEXT_ENCODER", "UPSAMPLER"))
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--resolution", default="256x256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of either side; 0 leaves it to each")
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--apart", action="store_true", help="one side after the other")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "WITHOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        options.frames, options.resolution, options.repeats = 9, "128x128", 1
    if options.worker:
        side, without = options.worker
        worker = ltxrt_side if side == "ltxrt" else torch_side
        print(json.dumps(worker(options, side, without)))
        return
    reason = missing_compiler() if "torch-compile" in options.sides else ""
    if reason:
        options.sides.remove("torch-compile")
        print(f"torch-compile is left out: {reason}", file=sys.stderr)
        if not options.sides:
            sys.exit(1)
    results: dict[str, Any] = {"left_out": {"torch-compile": reason}} if reason else {}
    out = options.out or (None if options.dry_run else RESULTS)

    def keep() -> None:
        if out is not None:
            record("pipeline", PACKAGES, results, out)

    run(options, results, keep)
    print(json.dumps(results) if out is None else record("pipeline", PACKAGES, results, out))


def run(options: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """All sides and how they compare; ``keep`` is called whenever some are done."""

    def made(names: Sequence[str], withouts: Sequence[str]) -> Iterator[dict[str, Any]]:
        load = round(os.getloadavg()[0], 2)
        pairs = list(zip(names, withouts, strict=True))
        groups = [[pair] for pair in pairs] if options.apart else [pairs]
        for group in groups:
            workers = {" ".join(pair): [__file__, *forwarded(options), "--worker", *pair] for pair in group}
            for (name, without), child in zip(group, in_turns(workers, options.repeats + 1).values(), strict=True):
                found = {"load_average_before": load, "peak_rss_mb": child.peak_rss_mb, **child.result}
                shown = f"{found['wall_seconds']}, {child.peak_rss_mb} MB"
                print(f"{name:<14} without {without:<18} {shown}", file=sys.stderr)
                yield found

    sides: dict[str, Any] = {}
    results |= {
        "clip": {"frames": options.frames, "resolution": options.resolution, "repeats": options.repeats},
        "threads": options.threads or len(os.sched_getaffinity(0)),
        "in_turns": not options.apart,
        "sides": sides,
    }
    for name, found in zip(options.sides, made(options.sides, ["nothing"] * len(options.sides)), strict=True):
        sides[name] = found
        if "ltxrt" in sides:
            others = {name: other for name, other in sides.items() if name != "ltxrt"}
            results["ltxrt_over"] = {name: compared(sides["ltxrt"], other) for name, other in others.items()}
        keep()
    if "ltxrt" in sides:
        chosen = list(ABLATIONS) if "all" in options.without else options.without
        names = ["nothing", *chosen] if chosen else []
        results["ltxrt_without"] = {}
        for name, found in zip(names, made(["ltxrt"] * len(names), names), strict=True):
            results["ltxrt_without"][name] = found
            keep()


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Our share of their time, of one turn each, of their memory and of their time to ready."""
    shares = [mine / other for mine, other in zip(ours["runs_seconds"], theirs["runs_seconds"], strict=True)]
    return {
        "time": round(statistics.median(shares), 3),
        "peak_memory": round(ours["peak_rss_mb"] / theirs["peak_rss_mb"], 3),
        "ready": round(ours["ready_seconds"] / theirs["ready_seconds"], 3),
    }


def forwarded(options: argparse.Namespace) -> list[str]:
    """The options that a worker needs."""
    given = ["--frames", options.frames, "--resolution", options.resolution, "--repeats", options.repeats]
    given += ["--threads", options.threads]
    given += ["--bundle", options.bundle] if options.bundle else []
    given += ["--sources", *options.sources] if options.sources else []
    return [str(value) for value in given]


def ltxrt_side(options: argparse.Namespace, side: str, without: str) -> dict[str, Any]:
    """The runtime's own figures, as ``ltxrt bench`` gives them."""
    wait_for_turn()
    began = process_start()
    if without != "nothing":
        ABLATIONS[without]()
    from ltxrt.cli_bench import BenchOptions, bench

    wanted = BenchOptions(
        bundle=options.bundle,
        frames=options.frames,
        resolution=options.resolution,
        repeats=options.repeats,
        threads=options.threads,
        prompt_cache="memory" if without == "text_encoder_runs" else "off",
    )
    imported = time.time()
    steps = bench(wanted)
    for number in range(options.repeats + 1):
        if number:
            wait_for_turn()
        next(steps)
        end_turn()
    try:
        next(steps)
    except StopIteration as end:
        report = end.value
    found = report.as_json()
    ready = round(imported - began + report.opened_seconds, 3)
    kept = ("engine", "first_run_seconds", "wall_seconds", "first_fragment_seconds", "real_time_factor", "stages")
    return {"ready_seconds": ready, **{name: found[name] for name in kept}} | {
        "runs_seconds": [round(run.wall_seconds, 4) for run in report.runs],
        "backends": found["backends"],
        "outside_backends_share": found["outside_backends_share"],
    }


def torch_side(options: argparse.Namespace, side: str, without: str) -> dict[str, Any]:
    """The classes' figures."""
    wait_for_turn()
    began = process_start()
    import torch
    from peers.torch_clip import make_clip, opened

    from ltxrt.bundle import Bundle
    from ltxrt.cli_bench import BenchOptions, Spread
    from ltxrt_export.tiny_bundle import shipped_tiny

    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    bundle = Bundle.open(options.bundle)
    request = BenchOptions(frames=options.frames, resolution=options.resolution).request()
    with tempfile.TemporaryDirectory() as folder:
        paths = None if options.sources else shipped_tiny(Path(folder))
        files = tuple(options.sources) if paths is None else (paths.checkpoint, paths.text_encoder, paths.upsampler)
        pipeline = opened(files, device, dtype)
        ready = round(time.time() - began, 3)
        if side == "torch-compile":
            pipeline.compile()
        made: list[Any] = []
        for number in range(options.repeats + 1):
            if number:
                wait_for_turn()
            made.append(make_clip(pipeline, bundle, request))
            end_turn()
        first, *runs = made
    seconds = options.frames / 24
    return {
        "ready_seconds": ready,
        "engine": f"torch {device} {dtype}",
        "threads": torch.get_num_threads(),
        "first_run_seconds": round(first.wall_seconds, 4),
        "runs_seconds": [round(run.wall_seconds, 4) for run in runs],
        "wall_seconds": asdict(Spread.of([run.wall_seconds for run in runs])),
        "real_time_factor": asdict(Spread.of([run.wall_seconds / seconds for run in runs])),
        "stages": {name: asdict(Spread.of([run.stages[name] for run in runs])) for name in first.stages},
        "bytes": first.size_bytes,
        "peak_device_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if device == "cuda" else None,
    }


def process_start() -> float:
    """When this process began, in Unix seconds; to a hundredth, which is what the kernel keeps."""
    text = Path("/proc/self/stat").read_text() if Path("/proc/self/stat").exists() else ""
    if not text:
        return time.time()
    ticks = int(text.rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


# --- one optimisation off at a time ---


def changed_sessions(change: Callable[[Any, Any], None]) -> None:
    """Have every CPU session opened with changed options."""
    import onnxruntime as ort

    from ltxrt import engine_onnx

    original = engine_onnx.session_options

    def options(threads: int) -> Any:
        made = original(threads)
        change(made, ort)
        return made

    engine_onnx.session_options = options


def with_memory_reuse() -> None:
    """Buffers planned when the session opens."""
    changed_sessions(lambda options, ort: setattr(options, "enable_mem_reuse", True))


def with_memory_pattern() -> None:
    """One block of memory a run, kept."""
    changed_sessions(lambda options, ort: setattr(options, "enable_mem_pattern", True))


def with_own_arenas() -> None:
    """An arena for every session."""
    changed_sessions(lambda options, ort: options.add_session_config_entry("session.use_env_allocators", "0"))


def without_spinning() -> None:
    """Idle threads of an engine sleep at once."""
    changed_sessions(lambda options, ort: options.add_session_config_entry("session.intra_op.allow_spinning", "0"))


def without_fusion() -> None:
    """Graphs as they were exported."""
    changed_sessions(
        lambda options, ort: setattr(options, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    )


def without_chunks() -> None:
    """The whole clip decoded at once."""
    from ltxrt import decode

    decode.chunk_lengths = lambda latents, first, rest: [latents]


def without_text_encoder() -> None:
    """What the prompt cache saves: ``ltxrt_side`` turns it on."""


#: What can be turned off, by the name of what then is missing.
ABLATIONS: Mapping[str, Callable[[], None]] = {
    "late_allocation": with_memory_reuse,
    "run_by_run_memory": with_memory_pattern,
    "shared_arena": with_own_arenas,
    "brief_spinning": without_spinning,
    "graph_fusion": without_fusion,
    "decode_chunks": without_chunks,
    "text_encoder_runs": without_text_encoder,
}

if __name__ == "__main__":
    main()
