# SPDX-License-Identifier: Apache-2.0
"""The shipped model, opened for export and as torch classes; small random models of the denoiser with inputs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

from ltxrt.bundle import Bundle
from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape
from ltxrt_export import architecture, keys
from ltxrt_export.denoiser_graph import export_denoiser
from ltxrt_export.exporter import ExportStep, Sources, export_bundle, network_specs
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import export_model
from ltxrt_export.tiny.config import checkpoint_config
from ltxrt_export.tiny.weights import random_tensor
from ltxrt_export.tiny_bundle import TINY_OPTIONS, shipped_tiny
from ltxrt_export.torch_pipeline import TorchPipeline

#: Frames a second of every test of the denoiser.
RATE = Fraction(24)
#: Tokens of both text contexts.
CONTEXT = 6

Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def shipped_sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The tiny model's files as the shipped bundle holds them."""
    paths = shipped_tiny(tmp_path_factory.mktemp("shipped"))
    return Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)


@pytest.fixture(scope="session")
def shipped_specs(shipped_sources: Sources) -> Mapping[str, NetworkSpec]:
    """Its six networks, on fake tensors."""
    return network_specs(shipped_sources, Semantics.R3)[0]


@pytest.fixture(scope="session")
def torch_pipeline(shipped_sources: Sources) -> TorchPipeline:
    """The shipped model in torch."""
    return TorchPipeline.of(shipped_sources)


@dataclass(frozen=True)
class Regenerated:
    """A bundle that was exported in this session, and what the exporter reported."""

    path: Path
    steps: Sequence[ExportStep]


@pytest.fixture(scope="session")
def regenerated(shipped_sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Regenerated:
    """The shipped bundle exported anew, with every check: minutes, so once for all tests."""
    path = tmp_path_factory.mktemp("regenerated") / "tiny"
    return Regenerated(path, list(export_bundle(shipped_sources, path, TINY_OPTIONS)))


@pytest.fixture(scope="session")
def fp32_graphs(
    shipped_specs: Mapping[str, NetworkSpec], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """The traced graphs of the shipped model, by network, beside their weights: the bundle's own, else traced now."""
    bundle, folder = Bundle.open(), tmp_path_factory.mktemp("traced")
    graphs = {
        entry.network: bundle.file(entry.file)
        for entry in bundle.manifest.networks.values()
        if entry.precision == "fp32"
    }
    for path in bundle.file("networks").glob("*.safetensors"):
        shutil.copyfile(path, folder / path.name)
    for name, spec in shipped_specs.items():
        if name not in graphs:
            graphs[name] = folder / f"{name}.onnx"
            export = export_denoiser if name == "denoiser" else export_model
            graphs[name].write_bytes(export(spec).SerializeToString())
    return graphs


@pytest.fixture(scope="session")
def random_transformer() -> Callable[..., LTX2VideoTransformer3DModel]:
    """The tiny model's DiT with 2 heads of ``head`` values and ``layers`` blocks; weights are bf16 values in fp32."""

    def make(layers: int = 2, head: int = 32) -> LTX2VideoTransformer3DModel:
        config = checkpoint_config()
        config["transformer"] |= {
            "num_layers": layers,
            "av_ca_timestep_scale_multiplier": 400.0,  # published as 1000, which could be mistaken for the other
            "num_attention_heads": 2,
            "attention_head_dim": head,
            "cross_attention_dim": 2 * head,
            "audio_num_attention_heads": 2,
            "audio_cross_attention_dim": 32,
            "connector_num_attention_heads": 2,
            "connector_attention_head_dim": head,
            "audio_connector_num_attention_heads": 2,
        }
        with torch.device("meta"):
            model = architecture.transformer(config)
        key_map = keys.key_map("transformer")
        state = {
            name: torch.from_numpy(random_tensor(key_map.stored(name), tuple(value.shape), 0)).bfloat16().float()
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def denoiser_feeds() -> Callable[..., Feeds]:
    """Everything that one denoising step takes, at ``strength`` of the first frame; None is no first frame."""

    def make(
        model: Any, shape: LatentShape, audio_tokens: int, strength: float | None = None, sigma_next: float = 0.421875
    ) -> Feeds:
        config: Any = model.config
        generator = np.random.default_rng(shape.tokens + audio_tokens)

        def normal(*size: int) -> np.ndarray:
            return generator.standard_normal(size, np.float32)

        width = config.num_attention_heads * config.attention_head_dim
        audio_width = config.audio_num_attention_heads * config.audio_attention_head_dim
        row = (np.arange(shape.tokens) >= shape.tokens_per_frame).astype(np.int64)
        mask = np.ones((1, shape.tokens, 1), np.float32)
        if strength is not None:
            mask[:, row == 0] = np.float32(1) - np.float32(strength)
        latent, clean = normal(1, shape.tokens, config.in_channels), normal(1, shape.tokens, config.in_channels)
        if strength == 1.0:
            latent[:, row == 0] = clean[:, row == 0]
        video, cross = (
            (config.rope_theta ** np.linspace(0.0, 1.0, count) * np.pi / 2.0).astype(np.float32)
            for count in (width // 6, config.audio_cross_attention_dim // 2)
        )
        grid = RopeGrid(video, cross, (config.pos_embed_max_pos, config.base_height, config.base_width))
        return {
            "latent": latent,
            "clean": clean,
            "mask": mask,
            "audio_tokens": normal(1, audio_tokens, config.audio_in_channels),
            "video_context": normal(1, CONTEXT, width),
            "audio_context": normal(1, CONTEXT, audio_width),
            "token_row": row,
            "sigma": np.array([0.725], np.float32),
            "sigma_next": np.array([sigma_next], np.float32),
            **rope_tables(grid, shape, RATE, audio_tokens),
        }

    return make


@pytest.fixture(scope="session")
def denoiser_coordinates() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Patch bounds of video and audio tokens, as the diffusers class prepares them."""

    def make(model: Any, shape: LatentShape, audio_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            model.rope.prepare_video_coords(1, *shape, "cpu", fps=float(RATE)),
            model.audio_rope.prepare_audio_coords(1, audio_tokens, "cpu"),
        )

    return make
