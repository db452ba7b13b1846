# SPDX-License-Identifier: Apache-2.0
"""How long does the 22B model take to export, and how much memory, on a machine that cannot hold it?

    python benchmarks/bench_export.py [--folder DIR] [--networks NAME ...] [--whole] [--slice]

The files are the published headers over holes (``ltxrt_export.synthetic``), so every step but the reading of weights
is the real one. Each network is exported, checked and measured in a process of its own. ``--whole`` runs the exporter
as a user does, for all presets: 70 GB are hashed, FP8 weights written (31 GB of disk), and the bundle is linted.
``--slice`` fills two blocks of full width with random weights and compares ONNX Runtime with the diffusers class (8 GB
of memory, 2.4 GB of disk).
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from harness import measured, record

NETWORKS = ("text_encoder", "audio_encoder", "image_encoder", "denoiser", "upsampler", "video_decoder")
PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
SLICE_BLOCKS = 2
SLICE_LIMIT = 1e-3


def main() -> None:
    """Run the parts that were asked for, each in a process of its own, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the synthetic files here; default: a temporary folder")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--whole", action="store_true", help="export and lint the bundle of all presets too")
    parser.add_argument("--slice", action="store_true", help="run two full-width blocks with random weights too")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *arguments = options.worker
        print(json.dumps(WORKERS[name](options.folder, *arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(options, options.folder or Path(temporary))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and report."""

    def worker(*arguments: str) -> dict[str, Any]:
        done = measured([__file__, "--folder", str(folder), "--worker", *arguments])
        usage = {key: getattr(done, key) for key in ("wall_seconds", "cpu_seconds", "peak_rss_mb")}
        print(f"{' '.join(arguments):<24}", " ".join(f"{key} {value}" for key, value in usage.items()), file=sys.stderr)
        return {**usage, **done.result}

    results: dict[str, Any] = {"files": worker("files")}
    results["networks"] = {name: worker("network", name) for name in options.networks}
    if options.whole:
        results["calibration"] = worker("calibration")
        results["whole"] = worker("whole")
        results["lint"] = worker("lint")
    if options.slice:
        parts = ("slice_write", "slice_export", "slice_torch", "slice_onnx")
        results["slice"] = {part.removeprefix("slice_"): worker(part) for part in parts}
    print(record("export-full-size", PACKAGES, results))


def files(folder: Path) -> dict[str, Any]:
    """Write the synthetic files."""
    from ltxrt_export.synthetic import write_synthetic

    model = write_synthetic(folder)
    written = [model.checkpoint, model.upsampler, *sorted(model.text_encoder.glob("*.safetensors"))]
    return {
        "bytes": {path.name: path.stat().st_size for path in written},
        "bytes_on_disk": sum(path.stat().st_blocks * 512 for path in written),
    }


def network(folder: Path, name: str) -> dict[str, Any]:
    """Export one network; what it is made of, and what the checker says. Checking is not part of the peak."""
    import resource

    from onnx import TensorProto

    from ltxrt_export.denoiser_graph import export_denoiser
    from ltxrt_export.exporter import network_specs
    from ltxrt_export.networks.denoiser import Semantics
    from ltxrt_export.onnx_export import check_graph, export_model

    spec = network_specs(sources(folder), Semantics.R3)[0][name]
    begin, processor = time.perf_counter(), time.process_time()
    model = (export_denoiser if name == "denoiser" else export_model)(spec, located(folder))
    usage = {
        "export_wall_seconds": round(time.perf_counter() - begin, 2),
        "export_cpu_seconds": round(time.process_time() - processor, 2),
        "export_peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
    graph = model.graph
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    begin = time.perf_counter()
    check_graph(name, path)
    external = [tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    blocks = Counter(node.name.split("/")[0] for node in graph.node if node.name.startswith("block."))
    names = {tensor.name for tensor in external}
    return {
        **usage,
        "checker_seconds": round(time.perf_counter() - begin, 2),
        "graph_bytes": path.stat().st_size,
        "nodes": len(graph.node),
        "nodes_per_block": sorted(set(blocks.values())),
        "blocks": len(blocks),
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "external_tensors": len(external),
        "external_parameters": sum(prod(tensor.dims) for tensor in external),
        "external_bytes": sum(int(entry.value) for t in external for entry in t.external_data if entry.key == "length"),
        "inline_constants": len(graph.initializer) - len(external),
        "stored_and_unused": sorted(ref.key for ref in spec.weights.values() if ref.key not in names),
    }


def whole(folder: Path) -> dict[str, Any]:
    """Export all presets as the command does, FP8 weights included; unchecked, since there are no weights to compare.

    The ranges are made up, all of them 1, which takes as long as any other.
    """
    import shutil

    from ltxrt.bundle import Bundle
    from ltxrt_export.exporter import ExportOptions, export_bundle
    from ltxrt_export.quantize.calibration import Calibration

    bundle = folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    opened_sources = sources(folder)
    calibration = Calibration.load(folder / "calibration.json")
    options = ExportOptions(check=False, precisions="presets", calibration=calibration)
    seconds: dict[str, float] = {}
    begin, running, note = time.perf_counter(), "", ""
    for step in export_bundle(opened_sources, bundle, options):
        note = note or step.note
        if step.description != running:
            seconds[running] = round(time.perf_counter() - begin, 2)
            begin, running = time.perf_counter(), step.description
    manifest = Bundle.open(bundle).manifest
    return {
        "seconds": {name or "specs": value for name, value in seconds.items()},
        "disk": note.split(";")[0],
        "networks": {key: network.precision for key, network in manifest.networks.items()},
        "bundle_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "bundle_bytes_on_disk": sum(path.stat().st_blocks * 512 for path in bundle.rglob("*") if path.is_file()),
    }


def lint(folder: Path) -> dict[str, Any]:
    """What the linter finds in the bundle of ``whole``, for all presets.

    Raises:
        SystemExit: It finds an error.
    """
    from ltxrt_export.engines.buckets import load_buckets
    from ltxrt_export.lint.linter import lint_bundle

    findings = list(lint_bundle(folder / "bundle", load_buckets()))
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise SystemExit("\n".join(errors))
    return {"findings": dict(Counter(f"{finding.severity} {finding.rule}" for finding in findings))}


def calibration(folder: Path) -> dict[str, Any]:
    """A file of ranges, 1 for every weight that a recipe might choose."""
    from ltxrt.bundle import file_sha256
    from ltxrt_export.exporter import network_specs
    from ltxrt_export.networks.denoiser import Semantics
    from ltxrt_export.quantize.calibration import Calibration, LayerRange, NetworkRanges, Origin

    opened = sources(folder)
    specs = network_specs(opened, Semantics.R3)[0]
    one = LayerRange(amax=1.0, percentile=1.0)
    networks = {
        name: NetworkRanges(layers={ref.key: one for ref in spec.weights.values()}, large={})
        for name, spec in specs.items()
    }
    origin = Origin(
        model=opened.checkpoint.name,
        checkpoint_sha256=file_sha256(opened.checkpoint.path),
        semantics=Semantics.R3.value,
        stage_1_sigmas=(1.0, 0.0),
        stage_2_sigmas=(0.9, 0.0),
        clips=("none: every range is made up",),
    )
    Calibration(made_from=origin, networks=networks).save(folder / "calibration.json")
    return {"ranges": sum(len(ranges.layers) for ranges in networks.values())}


def slice_write(folder: Path) -> dict[str, Any]:
    """Two blocks of the published width, and what is around them, with random weights in the published dtypes."""
    from full_width import write_slice

    return write_slice(folder, SLICE_BLOCKS)


def slice_export(folder: Path) -> dict[str, Any]:
    """The slice's denoiser graph, beside its weights."""
    import onnx
    from full_width import export_slice

    _, path = export_slice(folder)
    return {"nodes": len(onnx.load(path, load_external_data=False).graph.node)}


def slice_torch(folder: Path) -> dict[str, Any]:
    """What the diffusers class makes of two sets of inputs, in fp32; kept for ``slice_onnx``."""
    import numpy as np
    import torch

    reference = slice_reference(folder)
    with torch.no_grad():
        for seed, sizes in enumerate(reference.sizes):
            feeds = reference.feeds(sizes, seed)
            np.savez(folder / f"slice-{seed}.npz", **feeds, expected=reference.outputs(feeds)["latent_next"])
    return {"sizes": list(reference.sizes)}


def slice_onnx(folder: Path) -> dict[str, Any]:
    """The same in ONNX Runtime.

    Raises:
        SystemExit: It differs by more than the limit.
    """
    import numpy as np
    from full_width import GRAPH, slice_spec

    from ltxrt.engine import TensorSpec
    from ltxrt.engine_onnx import OnnxEngine
    from ltxrt_export.parity import relative_error

    spec = slice_spec(folder)
    ports = [tuple(TensorSpec(p.name, p.dtype, p.shape) for p in side) for side in (spec.inputs, spec.outputs)]
    begin = time.perf_counter()
    engine = OnnxEngine("denoiser", folder / GRAPH, *ports)
    loaded = time.perf_counter() - begin
    errors: list[float] = []
    for path in sorted(folder.glob("slice-*.npz")):
        feeds = dict(np.load(path))
        expected = feeds.pop("expected")
        found = engine.run(feeds)["latent_next"]
        # Of what the network adds: the latent itself passes through the Euler step unchanged.
        errors.append(relative_error(found - feeds["latent"], expected - feeds["latent"]))
    if max(errors) > SLICE_LIMIT:
        raise SystemExit(f"slice: relative L2 errors {errors}, the limit is {SLICE_LIMIT}")
    return {"load_seconds": round(loaded, 2), "relative_l2": errors, "limit": SLICE_LIMIT}


def slice_reference(folder: Path) -> Any:
    """The diffusers class with the slice's weights."""
    from types import SimpleNamespace

    from full_width import CHECKPOINT, slice_spec

    from ltxrt_export.checkpoint import Checkpoint
    from ltxrt_export.references import REFERENCES

    opened: Any = SimpleNamespace(checkpoint=Checkpoint.open(folder / CHECKPOINT))
    return REFERENCES["denoiser"](opened, slice_spec(folder))


def sources(folder: Path) -> Any:
    """The synthetic model, opened."""
    from ltxrt_export import published
    from ltxrt_export.exporter import Sources

    return Sources.open(
        folder / published.DISTILLED.name, folder / published.GEMMA.folder, folder / published.UPSAMPLER.name
    )


def located(folder: Path) -> Callable[[Path], str]:
    """Weight files as seen from ``folder``, so that a graph there can be checked."""
    return lambda path: path.relative_to(folder).as_posix()


WORKERS: Mapping[str, Callable[..., dict[str, Any]]] = {
    worker.__name__: worker
    for worker in (files, network, calibration, whole, lint, slice_write, slice_export, slice_torch, slice_onnx)
}

if __name__ == "__main__":
    main()
