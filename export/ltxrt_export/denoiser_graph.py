# SPDX-License-Identifier: Apache-2.0
"""The denoiser's ONNX graph, stitched: parts traced once, blocks copied to the model's depth."""

from collections.abc import Mapping
from typing import Any

import torch
from onnx import ModelProto
from torch.export import Dim

from .networks.denoiser import MODULATION_ROWS, DenoiseStep
from .networks.spec import NetworkSpec, example_inputs
from .onnx_export import Location, TracedGraph, attach_weights, beside, fake_mode, finished, trace, value_info
from .stitch import Stitcher

__all__ = ["export_denoiser", "stitched", "traced_parts"]

_MODULATION = [f"modulation/{name}" for name in MODULATION_ROWS]
_TABLES = [f"rope/{name}" for name in ("video_cos", "video_sin", "cross_cos", "cross_sin", "audio_cos", "audio_sin")]
_AXES = ["rope_time", "rope_height", "rope_width", "rope_cross_time", "rope_audio"]

#: Input names of each part, in the order of its ``forward``.
_PRE = ["latent", "mask", "audio_tokens", "sigma"]
_BLOCK = ["video", "audio", "video_context", "audio_context", "token_row", *_MODULATION, *_TABLES]
_POST = ["video", "embedded", "token_row", "latent", "clean", "mask", "sigma", "sigma_next"]


def export_denoiser(spec: NetworkSpec, location: Location = beside) -> ModelProto:
    """The finished ONNX model of the denoiser: like ``export_model``, in seconds at any depth."""
    return stitched(spec, traced_parts(spec), location)


def stitched(spec: NetworkSpec, parts: Mapping[str, TracedGraph], location: Location = beside) -> ModelProto:
    """The model of ``spec`` from the ``traced_parts`` of a denoiser that differs in depth at most."""
    last = len(_step(spec).blocks) - 1
    stitcher = Stitcher(spec.name)
    shared = {name: name for name in (*_MODULATION, *_TABLES, *(port.name for port in spec.inputs))}
    stitcher.add(parts["pre"], "pre", {**shared, "video": "video/0", "audio": "audio/0", "embedded": "embedded"})
    stitcher.add(parts["rope"], "rope", shared)
    for index in range(last + 1):
        wires = {
            **shared,
            "video": f"video/{index}",
            "audio": f"audio/{index}",
            "video_out": f"video/{index + 1}",
            "audio_out": f"audio/{index + 1}",
        }
        part = parts["last" if index == last else "block"]
        stitcher.add(part, f"block.{index}", wires, weight_prefix=("block.", f"transformer_blocks.{index}."))
    wires = {**shared, "video": f"video/{last + 1}", "embedded": "embedded", "next": "latent_next"}
    stitcher.add(parts["post"], "post", wires)
    model = stitcher.model(map(value_info, spec.inputs), map(value_info, spec.outputs))
    attach_weights(model, {name: spec.weights[name] for name in stitcher.weights}, location)
    return finished(model, spec.name)


def traced_parts(spec: NetworkSpec) -> dict[str, TracedGraph]:
    """Every distinct part, traced on its own: ``pre``, ``rope``, ``last``, ``post``; ``block`` if there are two.

    A block's weights are named ``block.…``, and the values that cross a border as in this module's tables.
    """
    step = _step(spec)
    with torch.no_grad(), fake_mode(step):
        feeds = dict(zip((port.name for port in spec.inputs), example_inputs(spec), strict=True))
        video, audio, embedded, *modulation = step.pre(*(feeds[name] for name in _PRE))
        tables = tuple(step.rope(*(feeds[name] for name in _AXES)))
    dims = {name: Dim(name, min=2, max=axis.maximum) for name, axis in spec.axes.items()}
    tokens, audio_tokens, row = {1: dims["Nv"]}, {1: dims["Na"]}, {0: dims["Nv"]}
    latent, clean, mask, token_row = (feeds[name] for name in ("latent", "clean", "mask", "token_row"))
    contexts, sigmas = (feeds["video_context"], feeds["audio_context"]), (feeds["sigma"], feeds["sigma_next"])
    block_inputs = (video, audio, contexts, token_row, tuple(modulation), tables)
    block_dims: tuple[Any, ...] = (
        tokens,
        audio_tokens,
        (None, None),
        row,
        (None,) * len(modulation),
        tuple({2: dims["Na" if "audio" in name else "Nv"]} for name in _TABLES),
    )
    parts = {
        "pre": trace(
            step.pre,
            tuple(feeds[name] for name in _PRE),
            (tokens, tokens, audio_tokens, None),
            (_PRE, ["video", "audio", "embedded", *_MODULATION]),
        ),
        "rope": trace(
            step.rope,
            tuple(feeds[name] for name in _AXES),
            tuple({1: dims[symbol]} for symbol in ("f", "h", "w", "f", "Na")),
            (_AXES, _TABLES),
        ),
        "last": trace(step.blocks[-1], block_inputs, block_dims, (_BLOCK, ["video_out"]), constants=spec.constants),
        "post": trace(
            step.post,
            (video, embedded, token_row, (latent, clean, mask), sigmas),
            (tokens, None, row, (tokens, tokens, tokens), (None, None)),
            (_POST, ["next"]),
        ),
    }
    if len(step.blocks) > 1:
        parts["block"] = trace(
            step.blocks[0], block_inputs, block_dims, (_BLOCK, ["video_out", "audio_out"]), constants=spec.constants
        )
    return parts


def _step(spec: NetworkSpec) -> DenoiseStep:
    if not isinstance(spec.module, DenoiseStep):
        raise TypeError(f"{spec.name} is not a DenoiseStep")
    return spec.module
