# SPDX-License-Identifier: Apache-2.0
"""The denoiser: one whole sampling step of the dual-stream DiT in one graph.

The step: two timestep rows (first frame, rest) through the modulation MLPs, the blocks, x0, re-imposition of
the first frame and the Euler update (fp32). The graph is stitched from five small traces (``stitch.py``): what
comes before the blocks, RoPE expansion, one block, the last block, what comes after. Only video leaves, so the
last block's audio feed-forward and v2a attention and the audio head are left out.

Numerics: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/transformer/{model,transformer,
transformer_args,adaln}.py and packages/ltx-pipelines/src/ltx_pipelines/utils/samplers.py, v1.2.0. That release
(generation R3) differs from the diffusers class in what feeds the A<->V modulation; ``Semantics`` says how.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from ltxrt_export.weights import TensorRef

from .attention import Rope, gated_attention, rms_norm
from .spec import Axis, NetworkSpec, Port

__all__ = [
    "MODULATION_ROWS",
    "Block",
    "DenoiseStep",
    "Post",
    "Pre",
    "RopeExpansion",
    "Semantics",
    "spec",
]


class Semantics(StrEnum):
    """Which release's rules feed the modulation (the weights never changed, the reference did).

    R1 (2026-03): A<->V scale/shift from the other stream's sigma; frozen audio sees the current sigma.
    R2 (2026-05): A<->V scale/shift from the own per-token timestep; frozen audio sees the current sigma.
    R3 (2026-08, v1.2.0): as R2, and a frozen stream's sigma is 0.
    """

    R1 = "R1"
    R2 = "R2"
    R3 = "R3"


#: Modulation vectors that ``Pre`` hands to every block, and how many rows each has.
MODULATION_ROWS = {
    "video": 9,
    "audio": 9,
    "video_prompt": 2,
    "audio_prompt": 2,
    "video_cross": 4,
    "audio_cross": 4,
    "video_gate": 1,
    "audio_gate": 1,
}


@dataclass(frozen=True, slots=True)
class Modulation:
    """Modulation vectors, each [1, timestep rows, rows, width]; video ones have one row per distinct timestep."""

    video: Tensor
    audio: Tensor
    video_prompt: Tensor
    audio_prompt: Tensor
    video_cross: Tensor
    audio_cross: Tensor
    video_gate: Tensor
    audio_gate: Tensor


class Pre(nn.Module):
    """Token projections and modulation vectors."""

    def __init__(self, model: LTX2VideoTransformer3DModel, semantics: Semantics) -> None:
        super().__init__()
        self.proj_in = model.proj_in
        self.audio_proj_in = model.audio_proj_in
        self.time_embed = model.time_embed
        self.audio_time_embed = model.audio_time_embed
        self.prompt_adaln = model.prompt_adaln
        self.audio_prompt_adaln = model.audio_prompt_adaln
        self.av_cross_attn_video_scale_shift = model.av_cross_attn_video_scale_shift
        self.av_cross_attn_audio_scale_shift = model.av_cross_attn_audio_scale_shift
        self.av_cross_attn_video_a2v_gate = model.av_cross_attn_video_a2v_gate
        self.av_cross_attn_audio_v2a_gate = model.av_cross_attn_audio_v2a_gate
        config: Any = model.config
        self.timestep_scale = float(config.timestep_scale_multiplier)
        self.gate_scale = float(config.cross_attn_timestep_scale_multiplier)
        self.semantics = semantics

    def forward(self, latent: Tensor, mask: Tensor, audio: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Projected tokens [1, Nv, D] and [1, Na, A], embedded timestep rows [1, 2, D], modulation vectors.

        The two distinct values of the mask are its minimum (the first frame, 1 - strength) and 1 (the rest).
        """
        rows = torch.cat([mask.amin(dim=(0, 1, 2)).reshape(1), torch.ones_like(sigma)]) * sigma * self.timestep_scale
        now, still = sigma * self.timestep_scale, torch.zeros_like(sigma)
        audio_sigma = still if self.semantics is Semantics.R3 else sigma
        audio_now = audio_sigma * self.timestep_scale
        own = self.semantics is not Semantics.R1
        sources: dict[str, tuple[Any, Tensor]] = {
            "video": (self.time_embed, rows),
            "audio": (self.audio_time_embed, still),
            "video_prompt": (self.prompt_adaln, now),
            "audio_prompt": (self.audio_prompt_adaln, audio_now),
            "video_cross": (self.av_cross_attn_video_scale_shift, rows if own else audio_now.expand(2)),
            "audio_cross": (self.av_cross_attn_audio_scale_shift, still if own else now),
            "video_gate": (self.av_cross_attn_video_a2v_gate, audio_sigma * self.gate_scale),
            "audio_gate": (self.av_cross_attn_audio_v2a_gate, sigma * self.gate_scale),
        }
        vectors: list[Tensor] = []
        embedded: Tensor | None = None
        for name in MODULATION_ROWS:
            mlp, timestep = sources[name]
            flat, states = mlp(timestep, batch_size=1, hidden_dtype=latent.dtype)
            vectors.append(flat.unflatten(-1, (MODULATION_ROWS[name], -1)).unsqueeze(0))
            embedded = states.unsqueeze(0) if embedded is None else embedded
        assert embedded is not None  # the first of the rows is the video's own
        return self.proj_in(latent), self.audio_proj_in(audio), embedded, *vectors


class RopeExpansion(nn.Module):
    """Per-axis cosine/sine tables to per-token, per-head ones.

    Frequencies run axis-minor (index = frequency * 3 + axis); what is left of the head width is padded in
    front with cosine 1 and sine 0 (ltx_core/model/transformer/rope.py).
    """

    def __init__(self, model: LTX2VideoTransformer3DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.heads = int(config.num_attention_heads)
        self.audio_heads = int(config.audio_num_attention_heads)
        width = self.heads * int(config.attention_head_dim)
        self.padding = width // 2 - 3 * (width // 6)

    def forward(self, time: Tensor, height: Tensor, width: Tensor, cross_time: Tensor, audio: Tensor) -> list[Tensor]:
        """Tables [1, heads, tokens, head width / 2]: video cos, sin, cross video cos, sin, audio cos, sin.

        Args:
            time: [2, f, n] cosine and sine over latent frames.
            height: [2, h, n].
            width: [2, w, n].
            cross_time: [2, f, m], the one-axis table of the A<->V attentions.
            audio: [2, Na, m], for audio self-attention and the A<->V attentions.
        """
        f, h, w, n = time.shape[1], height.shape[1], width.shape[1], time.shape[2]
        grid = torch.stack(
            [
                time[:, :, None, None].expand(2, f, h, w, n),
                height[:, None, :, None].expand(2, f, h, w, n),
                width[:, None, None].expand(2, f, h, w, n),
            ],
            dim=-1,
        )
        angles = grid.flatten(4).flatten(1, 3)
        if self.padding:
            fill = torch.tensor([1.0, 0.0]).reshape(2, 1, 1).expand(2, angles.shape[1], self.padding)
            angles = torch.cat([fill, angles], dim=-1)
        m = cross_time.shape[2]
        cross = cross_time[:, :, None, None].expand(2, f, h, w, m).flatten(1, 3)
        tables = [(angles, self.heads), (cross, self.heads), (audio, self.audio_heads)]
        return [
            table[i].unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0) for table, heads in tables for i in (0, 1)
        ]


class Block(nn.Module):
    """One dual-stream block; the last one gives video only."""

    def __init__(self, model: LTX2VideoTransformer3DModel, index: int) -> None:
        super().__init__()
        self.block: Any = model.transformer_blocks[index]
        self.last = index == len(model.transformer_blocks) - 1
        config: Any = model.config
        self.eps = float(config.norm_eps)
        dtype = model.proj_in.weight.dtype
        self.video_ones: Tensor
        self.audio_ones: Tensor
        for name, linear in (("video_ones", model.proj_in), ("audio_ones", model.audio_proj_in)):
            self.register_buffer(name, torch.ones(linear.out_features, dtype=dtype), persistent=False)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        contexts: tuple[Tensor, Tensor],
        token_row: Tensor,
        modulation: tuple[Tensor, ...],
        tables: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Video [1, Nv, D] and, except in the last block, audio [1, Na, A] after the block."""
        block, rows = self.block, Modulation(*modulation)
        video_rope, cross_rope, audio_rope = (tables[0], tables[1]), (tables[2], tables[3]), (tables[4], tables[5])
        v = _rows(block.scale_shift_table, rows.video, token_row)
        a = _rows(block.audio_scale_shift_table, rows.audio)
        video = self._attend(
            video, (block.attn1, block.attn2), v, video_rope, self._text(block, rows, contexts, "video")
        )
        audio = self._attend(
            audio,
            (block.audio_attn1, block.audio_attn2),
            a,
            audio_rope,
            self._text(block, rows, contexts, "audio"),
        )
        video, audio = self._exchange(video, audio, rows, token_row, (cross_rope, audio_rope))
        video = video + block.ff(self._modulated(video, v[4], v[3])) * v[5]
        if self.last:
            return (video,)
        audio = audio + block.audio_ff(self._modulated(audio, a[4], a[3])) * a[5]
        return video, audio

    def _norm(self, x: Tensor) -> Tensor:
        ones = self.video_ones if x.shape[-1] == self.video_ones.shape[0] else self.audio_ones
        return rms_norm(x, ones, self.eps)

    def _modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self._norm(x) * (1 + scale) + shift

    def _attend(self, x: Tensor, attentions: tuple[Any, Any], rows: list[Tensor], rope: Rope, text: Tensor) -> Tensor:
        """Self-attention, then text cross-attention; rows as in the 9-row table."""
        own, cross = attentions
        x = x + gated_attention(own, self._modulated(x, rows[1], rows[0]), query_rope=rope) * rows[2]
        return x + gated_attention(cross, self._modulated(x, rows[7], rows[6]), text) * rows[8]

    @staticmethod
    def _text(block: Any, rows: Modulation, contexts: tuple[Tensor, Tensor], stream: str) -> Tensor:
        """The text context of one stream, modulated by its sigma."""
        if stream == "video":
            shift, scale = _rows(block.prompt_scale_shift_table, rows.video_prompt)
            return contexts[0] * (1 + scale) + shift
        shift, scale = _rows(block.audio_prompt_scale_shift_table, rows.audio_prompt)
        return contexts[1] * (1 + scale) + shift

    def _exchange(
        self, video: Tensor, audio: Tensor, rows: Modulation, token_row: Tensor, ropes: tuple[Rope, Rope]
    ) -> tuple[Tensor, Tensor]:
        """A<->V attention, both ways from one snapshot. These tables run scale before shift."""
        block, (video_rope, audio_rope) = self.block, ropes
        video_table, audio_table = (
            block.video_a2v_cross_attn_scale_shift_table,
            block.audio_a2v_cross_attn_scale_shift_table,
        )
        v = _rows(video_table[:4], rows.video_cross, token_row)
        a = _rows(audio_table[:4], rows.audio_cross)
        (video_gate,), (audio_gate,) = (
            _rows(video_table[4:], rows.video_gate),
            _rows(audio_table[4:], rows.audio_gate),
        )
        video_norm, audio_norm = self._norm(video), self._norm(audio)
        to_video = gated_attention(
            block.audio_to_video_attn,
            video_norm * (1 + v[0]) + v[1],
            audio_norm * (1 + a[0]) + a[1],
            query_rope=video_rope,
            key_rope=audio_rope,
        )
        if self.last:
            return video + video_gate * to_video, audio
        to_audio = gated_attention(
            block.video_to_audio_attn,
            audio_norm * (1 + a[2]) + a[3],
            video_norm * (1 + v[2]) + v[3],
            query_rope=audio_rope,
            key_rope=video_rope,
        )
        return video + video_gate * to_video, audio + audio_gate * to_audio


class Post(nn.Module):
    """Output head, x0, first-frame re-imposition and Euler update, the arithmetic in fp32."""

    def __init__(self, model: LTX2VideoTransformer3DModel) -> None:
        super().__init__()
        self.scale_shift_table: Tensor = model.scale_shift_table
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out

    def forward(
        self,
        video: Tensor,
        embedded: Tensor,
        token_row: Tensor,
        state: tuple[Tensor, Tensor, Tensor],
        sigmas: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The latent at the next sigma, [1, Nv, 128] fp32; ``state`` is latent, clean, mask."""
        (latent, clean, mask), (sigma, sigma_next) = state, sigmas
        shift, scale = _rows(self.scale_shift_table, embedded.unsqueeze(2), token_row)
        velocity = self.proj_out(self.norm_out(video) * (1 + scale) + shift).float()
        x0 = (latent - velocity * (mask * sigma)) * mask + clean * (1 - mask)
        return latent + (latent - x0) / sigma * (sigma_next - sigma)


def _rows(table: Tensor, vectors: Tensor, token_row: Tensor | None = None) -> list[Tensor]:
    """Per-row modulation, table [rows, width] + vectors [1, timestep rows, rows, width].

    Given ``token_row`` [N], each row is gathered to the tokens: [1, N, width]; else [1, timestep rows, width].
    """
    summed = vectors + table.to(vectors.dtype)
    rows = [summed[:, :, index] for index in range(table.shape[0])]
    return rows if token_row is None else [row.index_select(1, token_row) for row in rows]


class DenoiseStep(nn.Module):
    """The whole step as one torch module: what the stitched graph computes, for parity checks in torch."""

    def __init__(self, model: LTX2VideoTransformer3DModel, semantics: Semantics) -> None:
        super().__init__()
        self.pre = Pre(model, semantics)
        self.rope = RopeExpansion(model)
        self.blocks = nn.ModuleList(Block(model, index) for index in range(len(model.transformer_blocks)))
        self.post = Post(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs in the order of the network's ports; gives ``latent_next``."""
        latent, clean, mask, audio, video_context, audio_context, token_row, sigma, sigma_next, *axes = inputs
        video, audio, embedded, *modulation = self.pre(latent, mask, audio, sigma)
        tables = tuple(self.rope(*axes))
        streams: tuple[Tensor, ...] = (video, audio)
        for block in self.blocks:
            streams = block(*streams, (video_context, audio_context), token_row, tuple(modulation), tables)
        return self.post(streams[0], embedded, token_row, (latent, clean, mask), (sigma, sigma_next))


def spec(
    model: LTX2VideoTransformer3DModel,
    weights: Mapping[str, TensorRef],
    semantics: Semantics,
    context_tokens: int,
) -> NetworkSpec:
    """The denoiser of a transformer.

    Args:
        model: Real, fake or meta weights.
        weights: Stored tensor behind every parameter of ``model``.
        semantics: Modulation rules.
        context_tokens: Length of both text contexts.
    """
    config: Any = model.config
    width = int(config.num_attention_heads * config.attention_head_dim)
    audio_width = int(config.audio_num_attention_heads * config.audio_attention_head_dim)
    axis, cross = width // 6, int(config.audio_cross_attention_dim) // 2
    fp32 = "float32"
    return NetworkSpec(
        name="denoiser",
        module=DenoiseStep(model, semantics),
        inputs=(
            Port("latent", fp32, (1, "Nv", int(config.in_channels))),
            Port("clean", fp32, (1, "Nv", int(config.in_channels))),
            Port("mask", fp32, (1, "Nv", 1)),
            Port("audio_tokens", fp32, (1, "Na", int(config.audio_in_channels))),
            Port("video_context", fp32, (1, context_tokens, width)),
            Port("audio_context", fp32, (1, context_tokens, audio_width)),
            Port("token_row", "int64", ("Nv",)),
            Port("sigma", fp32, (1,)),
            Port("sigma_next", fp32, (1,)),
            Port("rope_time", fp32, (2, "f", axis)),
            Port("rope_height", fp32, (2, "h", axis)),
            Port("rope_width", fp32, (2, "w", axis)),
            Port("rope_cross_time", fp32, (2, "f", cross)),
            Port("rope_audio", fp32, (2, "Na", cross)),
        ),
        outputs=(Port("latent_next", fp32, (1, "Nv", int(config.out_channels))),),
        axes={
            "Nv": Axis(2, 1 << 18, 12),
            "Na": Axis(1, 1 << 14, 5),
            "f": Axis(2, 64, 2),
            "h": Axis(1, 64, 3),
            "w": Axis(1, 64, 2),
        },
        weights=weights,
        constants={"video_ones": np.ones(width, np.float32), "audio_ones": np.ones(audio_width, np.float32)},
    )
