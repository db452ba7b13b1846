# SPDX-License-Identifier: Apache-2.0
"""How fast is every network alone, how far from the machine's ceilings, and what does a full-width block take?

    python benchmarks/bench_engines.py [--bundle DIR] [--clips FRAMESxWIDTHxHEIGHT ...] [--out DIR] [--dry-run]
    python benchmarks/bench_engines.py --blocks 1 2 4 --backends torch torch-compile onnxruntime --clips 121x1280x704

Networks: a clip is made once and what every network is fed is kept; then each is timed on each of its shapes. Work and
ceilings are those of ``roofline.py``.

``--blocks``: the DiT at the published width with so many blocks and random weights, one step at the tokens of stage 1
and of stage 2 of each clip. ``torch`` and ``torch-compile`` are the diffusers class, bf16 on a GPU and fp32 on the CPU;
``onnxruntime`` is the exported graph with the same kind of weights (1 to 4 blocks; on a GPU bf16 by its CUDA provider).
Time per block is the slope between the smallest and the largest count. Never run on a GPU yet.

``--dry-run`` takes a short clip and, of the blocks, narrow ones, and writes nothing unless ``--out`` says where.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, Timing, missing_compiler, record, timed
from roofline import Ceilings, cpu_ceilings, gpu_ceilings, graph_work

from ltxrt.bundle import Bundle
from ltxrt.cli_bench import BenchOptions
from ltxrt.engine import Array, Engine
from ltxrt.engine_store import Engines, EngineStore
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.pipeline import Pipeline
from ltxrt.shapes import LatentShape, PixelShape, audio_token_count
from ltxrt_export.quantize.recording import ObservedEngine

PACKAGES = ("ltxrt", "numpy", "onnxruntime", "onnx", "torch", "diffusers")
BACKENDS = ("torch", "torch-compile", "onnxruntime")
CLIPS = (PixelShape(25, 128, 128), PixelShape(121, 256, 256))
#: More are not written to disk and exported.
MOST_EXPORTED = 4


def main() -> None:
    """Measure what was asked for and write the record, anew after every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the tiny one")
    parser.add_argument(
        "--clips", nargs="*", type=pixels, default=[PixelShape(25, 128, 128), PixelShape(121, 256, 256)]
    )
    parser.add_argument("--blocks", nargs="*", type=int, help="full-width blocks instead of a bundle's networks")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        options.clips, options.repeats = [PixelShape(9, 128, 128)], 1
    out = options.out or (None if options.dry_run else RESULTS)
    name = "engines" if options.blocks is None else "blocks"
    results: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}

    def keep() -> None:
        if out is not None:
            record(name, PACKAGES, results, out)

    (networks if options.blocks is None else blocks)(options, results, keep)
    print(json.dumps(results) if out is None else record(name, PACKAGES, results, out))


def pixels(text: str) -> PixelShape:
    """``121x1280x704`` as frames, width and height."""
    frames, width, height = map(int, text.split("x"))
    return PixelShape(frames, height, width)


# --- the networks of a bundle ---


def networks(options: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Every network on every shape that the clips feed it."""
    pipeline = Pipeline.open(options.bundle, threads=options.threads, prompt_cache="off")
    on_gpu = pipeline.store.backend.name != "onnxruntime-cpu"
    ceilings = gpu_ceilings() if on_gpu else cpu_ceilings(1024 if options.dry_run else 2048)
    results |= {"engine": pipeline.store.backend.name, "ceilings": asdict(ceilings), "networks": {}}
    for clip in options.clips:
        for (name, shapes), feeds in recorded(pipeline, clip).items():
            engine: Engine = getattr(pipeline.store.engines("high"), name)
            times = timed(partial(engine.run, feeds), repeats=options.repeats)
            row = {
                "clip": f"{clip.frames}x{clip.width}x{clip.height}",
                **asdict(times),
                **roofline(pipeline.bundle, name, feeds, times, ceilings),
            }
            results["networks"].setdefault(name, {})[shapes] = row
            print(f"{name:<14} {row['median'] * 1e3:9.2f} ms  {shapes}", file=sys.stderr)
            keep()


def recorded(pipeline: Pipeline, clip: PixelShape) -> dict[tuple[str, str], Mapping[str, Array]]:
    """What each network is fed in a clip, by its name and the shapes of what it takes."""
    found: dict[tuple[str, str], Mapping[str, Array]] = {}

    class Store(EngineStore):
        def engines(self, preset: str) -> Engines:
            engines = pipeline.store.engines(preset)
            return Engines(**{name: observed(getattr(engines, name)) for name in NETWORK_NAMES})

    def observed(engine: Engine) -> ObservedEngine:
        def observe(feeds: Mapping[str, Array]) -> dict[str, Array]:
            copies = {name: np.array(value) for name, value in feeds.items()}
            first = [f"{name}{list(value.shape)}" for name, value in copies.items()][:3]
            found.setdefault((engine.name, " ".join(first)), copies)
            return engine.run(feeds)

        return ObservedEngine(engine.name, engine.inputs, engine.outputs, observe)

    request = BenchOptions(frames=clip.frames, resolution=f"{clip.width}x{clip.height}").request()
    watched = replace(pipeline, store=Store(pipeline.bundle))
    for _ in watched.generate(request):
        pass
    return found


def roofline(
    bundle: Bundle, name: str, feeds: Mapping[str, Array], times: Timing, ceilings: Ceilings
) -> dict[str, float | int]:
    """The work of a run, and the share of the ceilings that it reached."""
    path = bundle.file(bundle.network("high", name).file)
    work = graph_work(path, {key: value.shape for key, value in feeds.items()})
    return {
        **asdict(work),
        "tflops": round(work.flops / times.median / 1e12, 5),
        "bound_seconds": ceilings.bound_seconds(work),
        "share_of_bound": round(ceilings.bound_seconds(work) / times.median, 4),
    }


# --- full-width blocks ---


def blocks(options: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Steps of the DiT by backend, clip, stage and number of blocks, and the slope over the blocks."""
    import torch

    gpu = torch.cuda.is_available()
    results |= {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "width": "narrow" if options.dry_run else "published",
        "ceilings": asdict(gpu_ceilings() if gpu else cpu_ceilings(1024 if options.dry_run else 2048)),
        "steps": {},
        "per_block_seconds": {},
    }
    for backend in options.backends:
        if backend == "torch-compile" and (reason := missing_compiler()):
            results["steps"][backend] = {"left out": reason}
            print(f"{backend} is left out: {reason}", file=sys.stderr)
            continue
        for count in sorted(options.blocks):
            if backend == "onnxruntime" and count > MOST_EXPORTED:
                continue
            make = exported_steps if backend == "onnxruntime" else partial(torch_steps, compiled=backend != "torch")
            try:
                with tempfile.TemporaryDirectory() as folder:
                    for label, step in make(count, options, Path(folder)):
                        seconds = step_times(step, options.repeats, gpu=gpu)
                        results["steps"].setdefault(backend, {}).setdefault(label, {})[str(count)] = asdict(seconds)
                        print(f"{backend:<14} {count:>2} blocks {label:<28} {seconds.median:.4f} s", file=sys.stderr)
                        keep()
            except torch.OutOfMemoryError as error:
                results["steps"].setdefault(backend, {})[f"{count} blocks"] = f"out of memory: {error}"[:200]
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
    results["per_block_seconds"] = {
        backend: {label: slope(by_count) for label, by_count in rows.items() if isinstance(by_count, dict)}
        for backend, rows in results["steps"].items()
    }


def slope(by_count: Mapping[str, Mapping[str, float]]) -> float | None:
    """Seconds a block: the difference between the largest and the smallest count, over the blocks between."""
    counts = sorted(map(int, by_count))
    if len(counts) < 2:
        return None
    low, high = counts[0], counts[-1]
    return (by_count[str(high)]["median"] - by_count[str(low)]["median"]) / (high - low)


def step_times(step: Callable[[], object], repeats: int, *, gpu: bool) -> Timing:
    """A step's times, the device's work included."""
    import torch

    def whole() -> None:
        step()
        if gpu:
            torch.cuda.synchronize()

    return timed(whole, repeats=repeats, warmup=2)


def token_grids(options: argparse.Namespace) -> list[tuple[str, LatentShape, int]]:
    """Both stages of every clip: name, latent grid, audio tokens."""
    grids: list[tuple[str, LatentShape, int]] = []
    for clip in options.clips:
        audio = audio_token_count(clip.frames, Fraction(24))
        for number, canvas in ((1, clip.halved()), (2, clip)):
            label = f"{clip.frames}x{clip.width}x{clip.height} stage {number}"
            grids.append((label, canvas.to_latent(), audio))
    return grids


def torch_steps(count: int, options: argparse.Namespace, folder: Path, *, compiled: bool) -> Any:
    """The diffusers class."""
    import torch
    from peers.torch_dit import dit_step, random_dit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_dit(count, device, dtype, narrow=options.dry_run)
    for number, (label, shape, audio) in enumerate(token_grids(options)):
        yield label, dit_step(model, shape, audio, compiled=compiled and number == 0)


def exported_steps(count: int, options: argparse.Namespace, folder: Path) -> Any:
    """The exported graph of a checkpoint with random weights."""
    import torch
    from full_width import denoiser_feeds, export_slice, write_slice

    begin = time.perf_counter()
    write_slice(folder, count, narrow=options.dry_run)
    gpu = torch.cuda.is_available()
    spec, path = export_slice(folder, bf16=gpu)
    print(f"exported {count} blocks in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if gpu:
        from full_width import cuda_session_step as session_step
    else:
        from full_width import cpu_session_step as session_step
    run = session_step(spec, path, options.threads)
    for label, shape, audio in token_grids(options):
        feeds = denoiser_feeds(spec, shape, audio)
        yield label, partial(run, feeds)


if __name__ == "__main__":
    main()
