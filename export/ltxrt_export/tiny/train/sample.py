# SPDX-License-Identifier: Apache-2.0
"""Clips from the model under training, by the runtime's two stages in torch: to see what has been learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltxrt.schedule import steps
from ltxrt.shapes import LatentShape
from ltxrt_export.networks.text_encoder import TextEncoder
from ltxrt_export.networks.upsampler import Upsampler
from ltxrt_export.tiny.config import CONTEXT_TOKENS
from ltxrt_export.tiny.train.clips import Kind
from ltxrt_export.tiny.train.flow import Conditions, Denoiser, position_tables, rope_grid
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.sound_encoder import audio_tokens, log_mel
from ltxrt_export.tiny.train.text import TextBatch, encode_prompts

__all__ = ["SCHEDULES", "FirstFrame", "Sampler"]

_STAGE_1 = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
#: The noise levels of both stages, by steps.
SCHEDULES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "8+3": (_STAGE_1, (0.909375, 0.725, 0.421875, 0.0)),
    "8+2": (_STAGE_1, (0.909375, 0.725, 0.0)),
    "5+2": ((1.0, 0.9875, 0.975, 0.909375, 0.725, 0.0), (0.909375, 0.725, 0.0)),
}


@dataclass(frozen=True, slots=True)
class FirstFrame:
    """A first frame as tokens of the half and of the full size, [B, tokens, 32] each, and its strength."""

    half: Tensor
    full: Tensor
    strength: float


class Sampler:
    """Makes clips of one kind, several at once.

    Args:
        model: Trained, or on the way.
        kind: Size at full resolution, frame rate and length.
    """

    def __init__(self, model: TinyModel, kind: Kind) -> None:
        self._model, self._kind = model, kind
        self._denoiser, self._grid = Denoiser(model.transformer), rope_grid(model.transformer)
        self._upsampler = Upsampler(model.upsampler, model.video_vae)
        self._text = TextEncoder(model.text_model, model.connectors, CONTEXT_TOKENS)

    @torch.no_grad()
    def sample(
        self, schedule: str, prompts: TextBatch, sounds: NDArray[np.float32], first: FirstFrame | None = None
    ) -> Tensor:
        """Normalised latents [B, 32, f, h, w] for sounds [B, samples] at 16 kHz."""
        kind, vae = self._kind, self._model.audio_vae
        contexts = encode_prompts(self._text, prompts)
        tokens = torch.cat([audio_tokens(vae, log_mel(torch.as_tensor(sound)[None])) for sound in sounds])
        audio = ((tokens - vae.latents_mean) / vae.latents_std)[:, : kind.audio_tokens]
        half = LatentShape(kind.frames, kind.height // 2, kind.width // 2)
        latent = torch.zeros(len(sounds), half.tokens, 32)
        frames = (None, None) if first is None else (first.half, first.full)
        strength = 0.0 if first is None else first.strength
        for shape, sigmas, clean in zip((half, kind.shape), SCHEDULES[schedule], frames, strict=True):
            if shape is kind.shape or shape != half:
                grid = latent.transpose(1, 2).unflatten(2, tuple(half))
                latent = torch.cat([self._upsampler(one[None]) for one in grid]).flatten(2).transpose(1, 2)
            tables = position_tables(self._grid, shape, kind.rate, kind.audio_tokens)
            given = Conditions(audio, contexts, tables, torch.full((len(sounds),), 1 - strength))
            latent = self._stage(latent, shape, sigmas, given, clean)
        return latent.transpose(1, 2).unflatten(2, tuple(kind.shape))

    @torch.no_grad()
    def pictures(self, latent: Tensor) -> NDArray[np.uint8]:
        """Decode latents to [B, T, H, W, 3] uint8."""
        vae: Any = self._model.video_vae
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std))
        decoded = torch.cat([vae.decoder(one[None] * std + mean) for one in latent])
        unit = (decoded * 0.5 + 0.5).clamp(0, 1) * 255
        return unit.round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()

    def _stage(
        self, start: Tensor, shape: LatentShape, sigmas: Sequence[float], given: Conditions, clean: Tensor | None
    ) -> Tensor:
        held = start.clone()
        mask = torch.ones(*start.shape[:2], 1)
        if clean is not None:
            held[:, : shape.tokens_per_frame] = clean
            mask[:, : shape.tokens_per_frame] = given.mask_first[:, None, None]
        latent = torch.lerp(held, torch.lerp(start, torch.randn_like(start), sigmas[0]), mask)
        for sigma, following in steps(sigmas):
            levels = torch.full((len(start),), sigma)
            velocity = self._denoiser.velocity(latent, shape, levels, given)
            target = (latent - velocity * (mask * sigma)) * mask + held * (1 - mask)
            latent = latent + (latent - target) / sigma * (following - sigma)
        return latent
