# SPDX-License-Identifier: Apache-2.0
"""Blocks of the DiT at the published width in torch: one velocity prediction, eager or compiled.

Never run on a GPU yet. Weights are random, since the time does not depend on them. Inputs are those of the denoiser
network, frozen audio and all.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from full_width import slice_config

from ltxrt.shapes import LatentShape
from ltxrt_export import architecture
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.references import velocity_of

from .torch_clip import best_attention

__all__ = ["dit_step", "random_dit"]

RATE = Fraction(24)


def random_dit(blocks: int, device: torch.device, dtype: torch.dtype, *, narrow: bool = False) -> Any:
    """The published DiT, ``blocks`` deep, with random weights, made on the device.

    ``narrow`` has the tiny model's width.
    """
    with torch.device("meta"):
        model: Any = architecture.transformer(slice_config(blocks, narrow=narrow)).eval()
    model = (model if dtype is torch.float32 else model.to(dtype)).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def dit_step(model: Any, shape: LatentShape, audio_tokens: int, *, compiled: bool = False) -> Callable[[], object]:
    """A call that predicts one velocity on fixed inputs.

    Args:
        model: ``LTX2VideoTransformer3DModel``.
        shape: Latent grid.
        audio_tokens: Tokens of the sound.
        compiled: Have torch.compile make kernels of each block.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    config = model.config

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    mask = torch.ones(1, shape.tokens, 1, device=device)
    mask[:, : shape.tokens_per_frame] = 0
    feeds = {
        "latent": drawn(1, shape.tokens, config.in_channels),
        "audio_tokens": drawn(1, audio_tokens, config.audio_in_channels),
        "video_context": drawn(1, 1024, config.cross_attention_dim),
        "audio_context": drawn(1, 1024, config.audio_cross_attention_dim),
        "mask": mask,
        "sigma": torch.full((1,), 0.725, device=device),
    }
    coordinates = (
        model.rope.prepare_video_coords(1, *shape, device, fps=float(RATE)),
        model.audio_rope.prepare_audio_coords(1, audio_tokens, device),
    )
    if compiled:
        for block in model.transformer_blocks:
            block.compile()

    def step() -> object:
        with torch.no_grad(), best_attention(device):
            return velocity_of(model, feeds, coordinates, Semantics.R3)

    return step
