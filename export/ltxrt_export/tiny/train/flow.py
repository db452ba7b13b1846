# SPDX-License-Identifier: Apache-2.0
"""The denoiser on batches, and what it is asked for: the arithmetic of one training step.

The step is that of ``networks.denoiser.DenoiseStep`` (rules R3: audio clean, its timesteps 0), for samples of one
shape with a noise level and a first-frame mask each. A trained velocity v means x0 = x - v * mask * sigma, which
is what the exported step computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape
from ltxrt_export.networks.denoiser import MODULATION_ROWS, DenoiseStep, Semantics

__all__ = ["AXES", "LEVELS", "Conditions", "Denoiser", "position_tables", "rope_grid", "sample_levels", "stage_2_mix"]

#: Noise levels of the schedules.
LEVELS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
#: How often each is trained; the rest of the time a level is drawn from all of (0, 1).
_SHARES = (0.32, 0.03, 0.03, 0.03, 0.04, 0.17, 0.13, 0.10)
_STAGE_2_LEVELS, _STAGE_2_SHARES = LEVELS[5:], (0.45, 0.3, 0.25)
AXES = ("rope_time", "rope_height", "rope_width", "rope_cross_time", "rope_audio")


@dataclass(frozen=True, slots=True)
class Conditions:
    """What steers a batch.

    Attributes:
        audio: Normalised audio tokens [B, Na, 128].
        contexts: Text contexts [B, context, video width] and [B, context, audio width].
        tables: The five position tables, in the order of ``AXES``.
        mask_first: [B], 1 - strength of the first frame; 1 where none is given.
    """

    audio: Tensor
    contexts: tuple[Tensor, Tensor]
    tables: Sequence[Tensor]
    mask_first: Tensor


class Denoiser:
    """A transformer's velocity on batches.

    Args:
        transformer: The ``LTX2VideoTransformer3DModel``; its parameters are used, whatever their gradients.
    """

    def __init__(self, transformer: Any) -> None:
        self._step = DenoiseStep(transformer, Semantics.R3)

    def velocity(self, latent: Tensor, shape: LatentShape, sigma: Tensor, given: Conditions) -> Tensor:
        """Velocity [B, Nv, 128] of ``latent`` [B, Nv, 128] at levels ``sigma`` [B]."""
        step, pre = self._step, self._step.pre
        batch, still = len(latent), torch.zeros_like(sigma)
        rows = torch.stack([given.mask_first * sigma, sigma], dim=1) * pre.timestep_scale
        now = (sigma * pre.timestep_scale).unsqueeze(1)
        none = still.unsqueeze(1)
        sources: dict[str, tuple[Any, Tensor]] = {
            "video": (pre.time_embed, rows),
            "audio": (pre.audio_time_embed, none),
            "video_prompt": (pre.prompt_adaln, now),
            "audio_prompt": (pre.audio_prompt_adaln, none),
            "video_cross": (pre.av_cross_attn_video_scale_shift, rows),
            "audio_cross": (pre.av_cross_attn_audio_scale_shift, none),
            "video_gate": (pre.av_cross_attn_video_a2v_gate, none),
            "audio_gate": (pre.av_cross_attn_audio_v2a_gate, (sigma * pre.gate_scale).unsqueeze(1)),
        }
        vectors: list[Tensor] = []
        embedded: Tensor | None = None
        for name, count in MODULATION_ROWS.items():
            mlp, timesteps = sources[name]
            flat, states = mlp(timesteps.flatten(), batch_size=timesteps.numel(), hidden_dtype=latent.dtype)
            vectors.append(flat.float().reshape(batch, timesteps.shape[1], count, -1))
            embedded = states.float().reshape(batch, timesteps.shape[1], -1) if embedded is None else embedded
        assert embedded is not None  # the first of the rows is the video's own
        token_row = torch.ones(shape.tokens, dtype=torch.int64)
        token_row[: shape.tokens_per_frame] = 0
        tables = tuple(step.rope(*given.tables))
        streams: tuple[Tensor, ...] = (pre.proj_in(latent).float(), pre.audio_proj_in(given.audio).float())
        for block in step.blocks:
            streams = block(*streams, given.contexts, token_row, tuple(vectors), tables)
        post = step.post
        shift, scale = ((embedded + post.scale_shift_table[index]).index_select(1, token_row) for index in (0, 1))
        return post.proj_out(post.norm_out(streams[0].float()) * (1 + scale) + shift).float()


def rope_grid(transformer: Any) -> RopeGrid:
    """The model's position frequencies: as the exporter writes them into a bundle."""
    config = transformer.config
    width = int(config.num_attention_heads * config.attention_head_dim)
    theta = float(config.rope_theta)

    def frequencies(count: int) -> Any:
        return (theta ** np.linspace(0.0, 1.0, count) * np.pi / 2.0).astype(np.float32)

    maximum = (float(config.pos_embed_max_pos), float(config.base_height), float(config.base_width))
    return RopeGrid(frequencies(width // 6), frequencies(int(config.audio_cross_attention_dim) // 2), maximum)


def position_tables(grid: RopeGrid, shape: LatentShape, rate: Fraction, audio_tokens: int) -> list[Tensor]:
    """The runtime's own tables, in the order of ``AXES``."""
    tables = rope_tables(grid, shape, rate, audio_tokens)
    return [torch.as_tensor(tables[name]) for name in AXES]


def sample_levels(random: np.random.Generator, count: int, *, stage_2: bool) -> Tensor:
    """Noise levels to train at, [count]."""
    levels, shares = (_STAGE_2_LEVELS, _STAGE_2_SHARES) if stage_2 else (LEVELS, _SHARES)
    shares = np.array(shares)
    drawn = random.choice(levels, size=count, p=shares / shares.sum())
    if not stage_2:
        anywhere = random.random(count) > sum(_SHARES)
        drawn = np.where(anywhere, random.uniform(0.05, 1.0, count), drawn)
    return torch.as_tensor(drawn.astype(np.float32))


def stage_2_mix(clean: Tensor, upsampled: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the second stage has reached at ``sigma`` [B] if every step so far found ``clean``.

    It starts from ``upsampled`` at the first level s0; an Euler step from s to s' keeps s'/s of where it stood.
    """
    level = sigma.view(-1, 1, 1)
    kept = level / LEVELS[5] * (1 - LEVELS[5])
    return kept * upsampled + (1 - level - kept) * clean + level * noise
