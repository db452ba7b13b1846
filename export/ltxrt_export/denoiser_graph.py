# SPDX-License-Identifier: Apache-2.0
"""The denoiser's ONNX graph, stitched: parts traced once, blocks copied to the model's depth."""

from collections.abc import Mapping
from typing import Any

import torch
from onnx import GraphProto, ModelProto, helper
from torch.export import Dim

from .networks.denoiser import MODULATION_ROWS, DenoiseStep
from .networks.spec import NetworkSpec, example_inputs
from .onnx_export import Location, TracedGraph, attach_weights, beside, fake_mode, finished, name_axes, trace
from .stitch import Stitcher

__all__ = ["export_denoiser"]

_MODULATION = [f"modulation/{name}" for name in MODULATION_ROWS]
_TABLES = [f"rope/{name}" for name in ("video_cos", "video_sin", "cross_cos", "cross_sin", "audio_cos", "audio_sin")]
_BLOCK_INPUTS = ["video", "audio", "video_context", "audio_context", "token_row", *_MODULATION, *_TABLES]


def export_denoiser(spec: NetworkSpec, location: Location = beside) -> ModelProto:
    """The finished ONNX model of the denoiser: like ``export_model``, in seconds at any depth."""
    step = spec.module
    if not isinstance(step, DenoiseStep):
        raise TypeError(f"{spec.name} is not a DenoiseStep")
    parts = _traced_parts(spec, step)
    last = len(step.blocks) - 1
    stitcher = Stitcher(spec.name)
    shared = {name: name for name in (*_MODULATION, *_TABLES, *(port.name for port in spec.inputs))}
    stitcher.add(parts["pre"], "pre", {**shared, "video": "video/0", "audio": "audio/0", "embedded": "embedded"})
    stitcher.add(parts["rope"], "rope", shared)
    for index in range(last + 1):
        part = parts["last" if index == last else "block"]
        wires = {
            **shared,
            "video": f"video/{index}",
            "audio": f"audio/{index}",
            "video_out": f"video/{index + 1}",
            "audio_out": f"audio/{index + 1}",
        }
        stitcher.add(part, f"block.{index}", wires, weight_prefix=("block.", f"transformer_blocks.{index}."))
    stitcher.add(
        parts["post"],
        "post",
        {**shared, "video": f"video/{last + 1}", "embedded": "embedded", "next": "latent_next"},
    )
    model = stitcher.model(_ports(spec))
    name_axes(model.graph, spec)
    attach_weights(model, {name: spec.weights[name] for name in stitcher.weights}, location)
    return finished(model, spec.name)


def _traced_parts(spec: NetworkSpec, step: DenoiseStep) -> dict[str, TracedGraph]:
    """Every distinct part, traced on its own, with wires named as in this module's tables."""
    names = [port.name for port in spec.inputs]
    with fake_mode(step):
        feeds = dict(zip(names, example_inputs(spec), strict=True))
    dims = {name: Dim(name, min=2, max=axis.maximum) for name, axis in spec.axes.items()}
    tokens, audio_tokens = {1: dims["Nv"]}, {1: dims["Na"]}
    axes = [name for name in feeds if name.startswith("rope_")]
    with torch.no_grad(), fake_mode(step):
        projected = step.pre(feeds["latent"], feeds["mask"], feeds["audio_tokens"], feeds["sigma"])
        tables = tuple(step.rope(*(feeds[name] for name in axes)))
    video, audio, embedded, *modulation = projected
    pre = ["latent", "mask", "audio_tokens", "sigma"]
    parts = {
        "pre": trace(
            step.pre,
            tuple(feeds[name] for name in pre),
            (tokens, tokens, audio_tokens, None),
            (pre, ["video", "audio", "embedded", *_MODULATION]),
        ),
        "rope": trace(
            step.rope,
            tuple(feeds[name] for name in axes),
            tuple({1: dims[symbol]} for symbol in ("f", "h", "w", "f", "Na")),
            (axes, _TABLES),
        ),
    }
    block_feeds = (
        video,
        audio,
        (feeds["video_context"], feeds["audio_context"]),
        feeds["token_row"],
        tuple(modulation),
        tables,
    )
    table_dims = tuple({2: dims["Na" if "audio" in name else "Nv"]} for name in _TABLES)
    block_dims: tuple[Any, ...] = (
        tokens,
        audio_tokens,
        (None, None),
        {0: dims["Nv"]},
        (None,) * len(modulation),
        table_dims,
    )
    outputs: Mapping[str, list[str]] = {"block": ["video_out", "audio_out"], "last": ["video_out"]}
    for name, index in (("block", 0), ("last", -1)):
        if name == "block" and len(step.blocks) == 1:
            continue
        parts[name] = trace(
            step.blocks[index],
            block_feeds,
            block_dims,
            (_BLOCK_INPUTS, outputs[name]),
            constants=spec.constants,
        )
    names = ["video", "embedded", "token_row", "latent", "clean", "mask", "sigma", "sigma_next"]
    parts["post"] = trace(
        step.post,
        (
            video,
            embedded,
            feeds["token_row"],
            (feeds["latent"], feeds["clean"], feeds["mask"]),
            (feeds["sigma"], feeds["sigma_next"]),
        ),
        (tokens, None, {0: dims["Nv"]}, (tokens, tokens, tokens), (None, None)),
        (names, ["next"]),
    )
    return parts


def _ports(spec: NetworkSpec) -> GraphProto:
    """Typed graph inputs and outputs of the network, without nodes."""
    ports = GraphProto()
    for target, source in ((ports.input, spec.inputs), (ports.output, spec.outputs)):
        for port in source:
            element = helper.np_dtype_to_tensor_dtype(torch.zeros(0, dtype=getattr(torch, port.dtype)).numpy().dtype)
            target.append(helper.make_tensor_value_info(port.name, element, port.shape))
    return ports
