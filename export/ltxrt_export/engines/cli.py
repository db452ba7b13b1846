# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export build``: TensorRT engines for the GPU of this machine."""

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltxrt.cli_process import resumable

if TYPE_CHECKING:
    from ltxrt.manifest import Manifest

    from .buckets import Buckets
    from .engine_set import BuildStep, EnginePlan

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


BundleArgument = Annotated[Path, typer.Argument(help="A bundle of ONNX networks.", show_default=False)]
PresetFlag = Annotated[
    list[str] | None,
    typer.Option("--preset", help="Preset to build for; may be given again.  [default: high]", show_default=False),
]
GpuFlag = Annotated[str, typer.Option("--gpu", help="GPU to build on: auto, or its index.")]
OutFlag = Annotated[
    Path | None, typer.Option("--out", help="Another folder for networks and engines; else they go into the bundle.")
]
TimingsFlag = Annotated[
    Path | None, typer.Option("--timing-cache", help="Kernel timings to use and to extend; else kept with the engines.")
]
WorkspaceFlag = Annotated[
    int | None, typer.Option("--workspace-gib", min=1, help="Most scratch memory of a kernel; else what is free.")
]
LevelFlag = Annotated[
    int, typer.Option("--optimization-level", min=0, max=5, help="Kernels to try: 0 the first that works, 5 all.")
]
BucketsFlag = Annotated[
    Path | None, typer.Option("--buckets", help="TOML file of sizes and lengths to build for; else those of ltxrt.")
]
DecomposedFlag = Annotated[
    bool, typer.Option("--allow-decomposed-attention", help="Build attention without a fused kernel if need be.")
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be built for which sizes; needs no GPU.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def build(  # noqa: PLR0913  # one parameter per flag
    bundle: BundleArgument,
    preset: PresetFlag = None,
    gpu: GpuFlag = "auto",
    out: OutFlag = None,
    timing_cache: TimingsFlag = None,
    workspace_gib: WorkspaceFlag = None,
    optimization_level: LevelFlag = 3,
    buckets: BucketsFlag = None,
    allow_decomposed_attention: DecomposedFlag = False,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile the networks of a preset into TensorRT engines; what is there and unchanged is kept.

    Ctrl-C stops at the compiler's next step; the same command goes on from there.
    """
    from .buckets import load_buckets
    from .cache_key import BuildOptions
    from .engine_set import build_engines, plan_engines
    from .environment import open_toolchain
    from .store import EngineStore, clone_bundle

    presets = preset or ["high"]
    sizes = load_buckets(buckets)
    if dry_run:
        _dry_run(bundle, presets, sizes, as_json=as_json)
        return
    options = BuildOptions(
        workspace_gib=workspace_gib,
        optimization_level=optimization_level,
        decomposed_attention=allow_decomposed_attention,
    )
    tools = open_toolchain(gpu)
    typer.echo(f"TensorRT {tools.tensorrt.__version__}, GPU {tools.gpu.index}: {tools.gpu.name}", err=True)
    folder = bundle
    if out is not None and out.resolve() != bundle.resolve():
        clone_bundle(bundle, out)
        folder = out
    with EngineStore(folder) as store:
        plans = plan_engines(store, presets, tools, sizes, options)
        kept = resumable("finished engines are kept, the same command builds the rest")
        with kept, closing(build_engines(store, plans, tools, options, timing_cache)) as steps:
            done = _show(steps)
        rows = [_row(step, plan, store.manifest) for step, plan in zip(done, plans, strict=True)]
    typer.echo(json.dumps({"bundle": str(folder), "engines": rows}, indent=2) if as_json else str(folder))


def _show(steps: "Iterable[BuildStep]") -> "list[BuildStep]":
    """A line for each network and for each outermost phase of the compiler, on stderr; returns the networks' ends."""
    done: list[BuildStep] = []
    shown = ""
    for step in steps:
        head = f"[{step.index + 1}/{step.total}] {step.network_key}"
        if step.status == "building":
            phase = step.phase
            if phase is None or (phase.parent is None and phase.done == 0):
                line = head if phase is None else f"{head}: {phase.name}"
            elif phase.parent is None:
                line = f"{head}: {phase.name} {100 * phase.done // max(1, phase.steps)} %"
            else:
                continue
        else:
            done.append(step)
            what = "unchanged" if step.status == "kept" else f"built in {step.seconds:.0f} s"
            line = f"{head}: {what}, {step.plan_bytes / 1e6:.1f} MB"
        if line != shown:
            typer.echo(line, err=True)
        shown = line
    return done


def _row(step: "BuildStep", plan: "EnginePlan", manifest: "Manifest") -> dict[str, Any]:
    from .cache_key import engine_name

    name = engine_name(plan.network_key, plan.key)
    return {
        "engine": name,
        "network": step.network_key,
        "status": step.status,
        "seconds": round(step.seconds, 3),
        "file": manifest.engines[name].file,
        "bytes": step.plan_bytes,
        "key_sha256": manifest.engines[name].key_sha256,
    }


def _dry_run(bundle: Path, presets: list[str], sizes: "Buckets", *, as_json: bool) -> None:
    """Networks, weights and profiles, without GPU and TensorRT."""
    from ltxrt.bundle import Bundle

    from .build import load_graph
    from .engine_set import required_networks
    from .profiles import network_profiles
    from .weights import compiled_weight_bytes

    manifest = Bundle.open(bundle).manifest
    rows: list[dict[str, Any]] = []
    for key in required_networks(manifest, presets):
        weight_bytes = compiled_weight_bytes(load_graph(bundle / manifest.networks[key].file))
        profiles = {p.entry.name: p.entry.sizes for p in network_profiles(manifest, key, sizes)}
        rows.append({"network": key, "weight_bytes": weight_bytes, "profiles": profiles})
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "networks": rows}, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['network']}: weights {row['weight_bytes'] / 1e6:.1f} MB")
        for name, ranges in row["profiles"].items():
            text = ", ".join(f"{symbol} {low}..{high} ({tuned})" for symbol, (low, tuned, high) in ranges.items())
            typer.echo(f"  {name}: {text}")
