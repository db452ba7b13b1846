# SPDX-License-Identifier: Apache-2.0
"""What one job of the 22B model takes: FLOPs by type and bytes of every stage, counted from the full-size graphs.

    python benchmarks/bench_export.py --folder DIR      # the graphs, from files without weights
    python benchmarks/full_work.py DIR [--out DIR]

Writes ``full-work.json``. FLOPs are twice the multiply-accumulates of products, attention and convolutions, at the
sizes that the runtime feeds the networks: the denoiser at the tokens of both stages, the decoder chunk by chunk with
its caches. Types are those of the preset ``high``: the linear layers that its recipe names are FP8, everything else is
16-bit. Bytes are the least that a run moves: its weights in those types, its inputs and its outputs, once.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import onnx
from harness import RESULTS, record
from roofline import node_flops, view_work

from ltxrt.encoders import CONDITIONING_SAMPLE_RATE
from ltxrt.preset import Preset, load_preset
from ltxrt.shapes import LatentShape, PixelShape, audio_token_count, chunk_lengths, samples_for_frames
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.lint.graph import GraphView
from ltxrt_export.lint.shapes import infer_shapes
from ltxrt_export.networks.spec import concrete
from ltxrt_export.quantize.graph import linears
from ltxrt_export.quantize.recipe import RECIPES, load_recipe

PACKAGES = ("ltxrt", "onnx", "torch", "diffusers", "transformers")
PRESET = "high"
#: Of the issue that set the goals.
CLIPS = (PixelShape(121, 704, 1280), PixelShape(121, 512, 768))
RATE = Fraction(24)

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Call:
    """Some equal runs of a network.

    Attributes:
        network: Its name.
        runs: How many.
        sizes: By symbol of its ports.
    """

    network: str
    runs: int
    sizes: Sizes


def main() -> None:
    """Count and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bench_export.py left its graphs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    preset = load_preset(PRESET)
    counted = Counted(options.folder, preset)
    clips = {label(clip): whole_job(clip, preset, counted) for clip in CLIPS}
    results = {
        "preset": PRESET,
        "precision": dict(preset.precision),
        "frame_rate": str(RATE),
        "prompt_tokens": load_buckets().prompt_tokens,
        "clips": clips,
    }
    print(record("full-work", PACKAGES, results, options.out, of_machine=False))


def label(clip: PixelShape) -> str:
    """As the other benchmarks name it, ``121x1280x704``."""
    return f"{clip.frames}x{clip.width}x{clip.height}"


def whole_job(clip: PixelShape, preset: Preset, counted: "Counted") -> dict[str, Any]:
    """Every stage's work, all its runs together, and the sizes that decide it."""
    stages: dict[str, dict[str, int]] = {}
    for stage, calls in stage_calls(clip, preset).items():
        total: Counter[str] = Counter()
        for call in calls:
            work = counted.work(call)
            total.update({key: call.runs * value for key, value in work.items()})
        stages[stage] = {"runs": sum(call.runs for call in calls), **total}
    tokens = {"stage 1": clip.halved().to_latent().tokens, "stage 2": clip.to_latent().tokens}
    return {
        "tokens": {**tokens, "audio": audio_token_count(clip.frames, RATE)},
        "stages": stages,
        "frame_bytes": clip.frames * clip.width * clip.height * 3 // 2,
    }


def stage_calls(clip: PixelShape, preset: Preset) -> dict[str, list[Call]]:
    """What runs in a job, by stage."""
    half, full = clip.halved().to_latent(), clip.to_latent()
    prompt = load_buckets().prompt_tokens
    samples = samples_for_frames(clip.frames, RATE, CONDITIONING_SAMPLE_RATE)
    audio = audio_token_count(clip.frames, RATE)

    def steps(grid: LatentShape, sigmas: tuple[float, ...]) -> list[Call]:
        return [Call("denoiser", len(sigmas) - 1, {**_grid(grid), "Nv": grid.tokens, "Na": audio})]

    return {
        "text_encoder": [Call("text_encoder", 1, {"n": prompt})],
        "audio_encoder": [Call("audio_encoder", 1, {"samples": samples})],
        "image_encoder": [Call("image_encoder", 1, {"h": grid.height, "w": grid.width}) for grid in (half, full)],
        "denoise_1": steps(half, preset.stage_1_sigmas),
        "upsample": [Call("upsampler", 1, _grid(half))],
        "denoise_2": steps(full, preset.stage_2_sigmas),
        "decode": list(decoder_calls(full, preset)),
    }


def decoder_calls(grid: LatentShape, preset: Preset) -> Iterator[Call]:
    """The chunks of a clip, with the caches that they are given."""
    lengths = chunk_lengths(grid.frames, first_chunk_latents(), preset.decode_chunk_latents)
    for index, latents in enumerate(lengths):
        sizes = {"n": latents, "p": int(index == 0), "q": int(index == len(lengths) - 1), "c": 2 if index else 0}
        yield Call("video_decoder", 1, {**sizes, "h": grid.height, "w": grid.width})


def first_chunk_latents() -> int:
    """Of the published decoder."""
    import torch

    from ltxrt_export import architecture, published
    from ltxrt_export.networks.video_decoder import stream_layout

    with torch.device("meta"):
        vae: Any = architecture.video_vae(published.checkpoint_config())
    return stream_layout(vae.decoder).minimum_first_latents


def _grid(grid: LatentShape) -> dict[str, int]:
    return {"f": grid.frames, "h": grid.height, "w": grid.width}


class Counted:
    """The graphs of a folder; each is read when it is first asked for."""

    def __init__(self, folder: Path, preset: Preset) -> None:
        self.folder, self.preset = folder, preset
        self._views: dict[str, GraphView] = {}

    def work(self, call: Call) -> dict[str, int]:
        """FLOPs of one run by type, its least bytes, and how many nodes could not be counted."""
        if call.network not in self._views:
            path = self.folder / f"{call.network}.onnx"
            self._views = {call.network: GraphView(path.name, onnx.load(path, load_external_data=False), path.parent)}
        view = self._views[call.network]
        (shapes,) = infer_shapes(view, [(input_shapes(view, call.sizes), {})])
        eight_bit = self._eight_bit(view, call.network)
        flops = Counter({"fp8_flops": 0, "half_flops": 0, "attention_flops": 0, "convolution_flops": 0})
        kinds = {"Attention": "attention_flops", "Conv": "convolution_flops"}
        for node in view.nodes:
            if all(map(view.is_constant, node.output)):
                continue
            kind = "fp8_flops" if node.output[0] in eight_bit else kinds.get(node.op_type, "half_flops")
            flops[kind] += node_flops(node, shapes) or 0
        whole = view_work(view, shapes)
        assert whole.flops == flops.total()  # the same nodes, sorted
        # In the graph every weight is 16-bit.
        saved = sum({key: prod(view.initializers[key].dims) for key in eight_bit.values()}.values())
        return {**flops, "least_bytes": whole.least_bytes - saved, "unknown_nodes": whole.unknown_nodes}

    def _eight_bit(self, view: GraphView, network: str) -> dict[str, str]:
        """Products that are FP8 in the preset: their weights' names, by what they give."""
        precision = self.preset.precision[network]
        if precision not in RECIPES.get(network, ()):
            return {}
        layers = linears(view.model.graph)
        chosen = {*load_recipe(network, precision).select(layer.key for layer in layers).quantised}
        return {layer.node.output[0]: layer.key for layer in layers if layer.key in chosen}


def input_shapes(view: GraphView, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every input's shape at some sizes."""
    return {
        value.name: tuple(
            concrete(axis.dim_param or axis.dim_value, sizes) for axis in value.type.tensor_type.shape.dim
        )
        for value in view.model.graph.input
    }


if __name__ == "__main__":
    main()
