# SPDX-License-Identifier: Apache-2.0
"""A few blocks of the DiT at the published width, as a checkpoint with random weights and as an exported graph.

Written in the published layout and dtypes, 0.8 GB a block, so that exporter and loaders are the real ones.
"""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ltxrt.engine import Array, TensorSpec
from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape
from ltxrt_export import published
from ltxrt_export.checkpoint import Checkpoint
from ltxrt_export.denoiser_graph import export_denoiser
from ltxrt_export.networks import denoiser
from ltxrt_export.networks.spec import NetworkSpec, random_feeds
from ltxrt_export.synthetic import ModelConfigs, checkpoint_tensors, write_sparse
from ltxrt_export.tiny.config import checkpoint_config as narrow_config
from ltxrt_export.tiny.config import gemma_config
from ltxrt_export.tiny.tokenizer import VOCABULARY
from ltxrt_export.tiny.weights import random_tensor
from ltxrt_export.weights import TensorFile

__all__ = [
    "cpu_session_step",
    "cuda_session_step",
    "denoiser_feeds",
    "export_slice",
    "slice_config",
    "slice_spec",
    "write_slice",
]

#: Checkpoint and graph, in the folder that the functions are given.
CHECKPOINT, GRAPH = "slice.safetensors", "slice.onnx"

Step = Callable[[Mapping[str, Array]], object]


def slice_config(blocks: int, *, narrow: bool = False) -> dict[str, Any]:
    """The published configuration, so many blocks deep; ``narrow`` takes the tiny model's."""
    config = narrow_config() if narrow else published.checkpoint_config()
    config["transformer"]["num_layers"] = blocks
    return config


def write_slice(folder: Path, blocks: int, *, narrow: bool = False) -> dict[str, int]:
    """The checkpoint; its parameters and bytes."""
    config = slice_config(blocks, narrow=narrow)
    gemma = {"text_encoder": gemma_config(VOCABULARY)} if narrow else {}
    tensors = checkpoint_tensors(ModelConfigs(checkpoint=config, **gemma))
    wanted = {key: layout for key, layout in tensors.items() if key.startswith("model.diffusion_model.")}
    wanted = {key: layout for key, layout in wanted.items() if "embeddings_connector" not in key}
    path = folder / CHECKPOINT
    write_sparse(path, wanted, {"model_version": "2.3.0", "config": json.dumps(config)})
    dtypes = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    with path.open("r+b") as file:
        for ref in TensorFile.open(path).tensors.values():
            file.seek(ref.offset)
            file.write(random_tensor(ref.key, ref.shape, 0).astype(dtypes[ref.dtype]).tobytes())
    return {"parameters": sum(prod(shape) for _, shape in wanted.values()), "bytes": path.stat().st_size}


def slice_spec(folder: Path) -> NetworkSpec:
    """The denoiser of the checkpoint, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    component = Checkpoint.open(folder / CHECKPOINT).component("transformer")
    with FakeTensorMode():
        module: Any = component.build().eval()
        return denoiser.spec(module, component.weights, denoiser.Semantics.R3, 1024)


def export_slice(folder: Path, *, bf16: bool = False) -> tuple[NetworkSpec, Path]:
    """Its graph beside its weights, computing in fp32 or in BF16."""
    from onnx import TensorProto

    from ltxrt_export.quantize.half import to_half

    spec, path = slice_spec(folder), folder / GRAPH
    model = export_denoiser(spec)
    model = to_half(model, "denoiser", TensorProto.BFLOAT16) if bf16 else model
    path.write_bytes(model.SerializeToString())
    return spec, path


def denoiser_feeds(spec: NetworkSpec, shape: LatentShape, audio_tokens: int) -> dict[str, Array]:
    """One step's inputs at a latent grid."""
    sizes = {"f": shape.frames, "h": shape.height, "w": shape.width, "Nv": shape.tokens, "Na": audio_tokens}
    made: dict[str, Array] = dict(random_feeds(spec, sizes, 0))
    widths = {port.name: int(port.shape[-1]) for port in spec.inputs if port.name.startswith("rope_")}
    video, cross = (np.geomspace(1, 1e4, widths[name]).astype(np.float32) for name in ("rope_time", "rope_audio"))
    tables = rope_tables(RopeGrid(video, cross, (20.0, 2048.0, 2048.0)), shape, Fraction(24), audio_tokens)
    row = (np.arange(shape.tokens) >= shape.tokens_per_frame).astype(np.int64)
    sigmas = {"sigma": np.array([0.725], np.float32), "sigma_next": np.array([0.421875], np.float32)}
    return {**made, **tables, **sigmas, "token_row": row, "mask": row.reshape(1, -1, 1).astype(np.float32)}


def cpu_session_step(spec: NetworkSpec, path: Path, threads: int) -> Step:
    """The graph in the runtime's CPU engine."""
    from ltxrt.engine_onnx import OnnxEngine

    ports = [tuple(TensorSpec(p.name, p.dtype, p.shape) for p in side) for side in (spec.inputs, spec.outputs)]
    engine = OnnxEngine("denoiser", path, *ports, threads=threads)
    return engine.run


def cuda_session_step(spec: NetworkSpec, path: Path, threads: int) -> Step:
    """The graph by ONNX Runtime's CUDA provider, everything bound on the device. Never run on a GPU yet.

    Raises:
        RuntimeError: This ONNX Runtime has no CUDA provider.
    """
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise RuntimeError("this onnxruntime has no CUDA provider: install onnxruntime-gpu in its place")
    session = ort.InferenceSession(path, providers=["CUDAExecutionProvider"])
    bound: dict[int, Any] = {}

    def run(feeds: Mapping[str, Array]) -> object:
        key = id(feeds)
        if key not in bound:
            binding = session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
            for port in spec.outputs:
                binding.bind_output(port.name, "cuda")
            bound[key] = binding
        session.run_with_iobinding(bound[key])
        return None

    return run
