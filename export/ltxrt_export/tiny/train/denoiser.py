# SPDX-License-Identifier: Apache-2.0
"""Phase 5: the DiT learns to denoise drawn clips, given clean sound, a prompt and perhaps the first frame.

Flow matching with the noise levels of the runtime's schedules drawn most often. The loss is the velocity's square
error; what changes over time within a clip weighs more than what stays, because that is where the mouth is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ltxrt_export.tiny.mouth import Floats
from ltxrt_export.tiny.train.clips import Clip, ClipSource, Kind
from ltxrt_export.tiny.train.flow import (
    Conditions,
    Denoiser,
    position_tables,
    rope_grid,
    sample_levels,
    stage_2_mix,
)
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Average, Optimiser

__all__ = ["DenoiserPhase"]

#: Latent sizes with their shares; the first stage runs at half the size of the canvas.
_STAGE_1: Mapping[tuple[int, int], float] = {(2, 2): 0.36, (3, 3): 0.16, (2, 4): 0.04, (4, 2): 0.02, (4, 4): 0.02}
_STAGE_2: Mapping[tuple[int, int], float] = {(4, 4): 0.17, (6, 6): 0.09, (4, 8): 0.04, (8, 4): 0.02, (8, 8): 0.02}
_RATES: Mapping[float, float] = {12.5: 0.18, 24.0: 0.32, 25.0: 0.13, 30.0: 0.16, 60.0: 0.21}
_FRAMES, _STAGE_2_FRAMES = 6, 4
#: Long clips.
_LONG = {
    Kind(2, 2, 24.0, 16): 0.03,
    Kind(3, 3, 24.0, 16): 0.02,
    Kind(2, 2, 12.5, 12): 0.01,
    Kind(2, 2, 60.0, 16): 0.01,
    Kind(4, 4, 24.0, 14, stage_2=True): 0.02,
    Kind(6, 6, 24.0, 12, stage_2=True): 0.01,
}
#: Video tokens of a batch, about; most samples of a batch.
_TOKENS, _MOST = 480, 22
_MUON_RATE, _ADAM_RATE = 0.012, 2e-3
_MOVING_WEIGHT = 3.0
_NEW_SHARE, _BUCKET_LIMIT = 0.3, 150


class DenoiserPhase:
    """Trains the transformer; the text side stays as it is.

    Args:
        model: Its ``transformer`` is trained.
        tokenizer: The tiny tokenizer.
        seed: Of the clips and the noise.
        recordings: Speech to mix in.
        clips: How many to draw before the first step; more follow while it learns.
    """

    name = "denoiser"

    def __init__(
        self, model: TinyModel, tokenizer: Tokenizer, seed: int, recordings: Sequence[Floats], clips: int = 500
    ) -> None:
        self._random = np.random.default_rng([seed, 7])
        self._source = ClipSource(model, seed, recordings, tokenizer)
        parameters = list(model.transformer.requires_grad_(True).named_parameters())
        self._transformer = model.transformer
        self._denoiser = Denoiser(model.transformer)
        self._grid = rope_grid(model.transformer)
        self._optimiser = Optimiser(parameters, _MUON_RATE, _ADAM_RATE)
        self._average = Average(parameter for _, parameter in parameters)
        shares = _kinds()
        self._kinds, self._shares = list(shares), np.array(list(shares.values())) / sum(shares.values())
        self._buckets: dict[Kind, list[Clip]] = {
            kind: [self._source.draw(kind) for _ in range(max(3, round(clips * share)))]
            for kind, share in zip(self._kinds, self._shares, strict=True)
        }
        self._tests = [
            (kind, [self._source.draw(kind) for _ in range(6)]) for kind in map(_test_kind, (12.5, 24.0, 60.0))
        ]

    def step(self, progress: float) -> float:
        """One update; the loss."""
        kind = self._kinds[int(self._random.choice(len(self._kinds), p=self._shares))]
        bucket = self._buckets[kind]
        if self._random.random() < _NEW_SHARE:
            bucket.append(self._source.draw(kind))
            del bucket[:-_BUCKET_LIMIT]
        frames = int(self._random.integers(2, kind.frames + 1)) if kind.frames <= _FRAMES else kind.frames
        batch = max(2, min(_MOST, _TOKENS // (frames * kind.height * kind.width)))
        clips = [bucket[int(i)] for i in self._random.integers(len(bucket), size=batch)]
        used = Kind(kind.height, kind.width, kind.frames_per_second, frames, kind.stage_2)
        sigma = sample_levels(self._random, batch, stage_2=kind.stage_2)
        loss = self._loss(used, clips, sigma, self._first_frame_masks(batch))
        loss.backward()
        self._optimiser.step(progress)
        self._average.update()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of what moves that is not explained from pure noise, by frame rate; averaged weights."""
        self._average.swap()
        result: dict[str, float] = {}
        for kind, clips in self._tests:
            for level in (1.0, 0.725):
                sigma = torch.full((len(clips),), level)
                latent, mix = self._mixed(kind, clips, sigma)
                velocity = self._velocity(kind, clips, mix, sigma, torch.ones(len(clips)))
                error = (mix - level * velocity - latent).unflatten(1, (kind.frames, -1))
                truth = latent.unflatten(1, (kind.frames, -1))
                rest = error[:, 1:] - error[:, 1:].mean(1, keepdim=True)
                moving = truth[:, 1:] - truth[:, 1:].mean(1, keepdim=True)
                name = f"{kind.frames_per_second:g}@{level:g}"
                result[name] = float(rest.square().mean() / moving.square().mean())
                if kind.frames_per_second == 24:
                    result[f"all@{level:g}"] = float(error.square().mean())
        self._average.swap()
        return result

    def finish(self) -> None:
        """Keep the averaged weights and freeze."""
        self._average.swap()
        self._transformer.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes; the clips are drawn anew."""
        return {"optimiser": self._optimiser.state(), "average": self._average.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._optimiser.restore(state["optimiser"])
        self._average.restore(state["average"])

    def _loss(self, kind: Kind, clips: Sequence[Clip], sigma: Tensor, mask_first: Tensor) -> Tensor:
        latent, mix = self._mixed(kind, clips, sigma)
        wanted = (mix - latent) / sigma.view(-1, 1, 1)
        mask = torch.ones(latent.shape[:2])
        mask[:, : kind.shape.tokens_per_frame] = mask_first[:, None]
        clean = latent.clone()
        clean[:, : kind.shape.tokens_per_frame] = torch.stack([clip.first for clip in clips])
        state = torch.lerp(clean, mix, mask.unsqueeze(-1))
        velocity = self._velocity(kind, clips, state, sigma, mask_first)
        error = ((velocity - wanted) * (mask > 0).unsqueeze(-1)).unflatten(1, (kind.frames, -1))
        later = error[:, 1:]
        moving = (later - later.mean(dim=1, keepdim=True)).square().mean()
        return error.square().mean() + _MOVING_WEIGHT * moving

    def _mixed(self, kind: Kind, clips: Sequence[Clip], sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents, and these mixed with noise as the kind's stage has them at ``sigma``."""
        tokens = kind.shape.tokens
        latent = torch.stack([clip.latent[:tokens] for clip in clips])
        noise = torch.randn_like(latent)
        if kind.stage_2:
            upsampled = torch.stack([clip.upsampled[:tokens] for clip in clips])
            return latent, stage_2_mix(latent, upsampled, noise, sigma)
        return latent, torch.lerp(latent, noise, sigma.view(-1, 1, 1))

    def _velocity(self, kind: Kind, clips: Sequence[Clip], state: Tensor, sigma: Tensor, mask_first: Tensor) -> Tensor:
        audio = torch.stack([clip.audio[: kind.audio_tokens] for clip in clips])
        prompts = list(range(len(clips)))
        for index, free in enumerate(mask_first == 0):
            # Given the first frame as it is, the picture decides and not the prompt.
            if free and self._random.random() < 0.4:
                prompts[index] = int(self._random.integers(len(clips)))
        contexts = (
            torch.stack([clips[index].contexts[0] for index in prompts]),
            torch.stack([clips[index].contexts[1] for index in prompts]),
        )
        tables = position_tables(self._grid, kind.shape, kind.rate, kind.audio_tokens)
        return self._denoiser.velocity(state, kind.shape, sigma, Conditions(audio, contexts, tables, mask_first))

    def _first_frame_masks(self, count: int) -> Tensor:
        """1 - strength of the first frame, 1 for about half of the samples."""
        random = self._random
        strengths = random.choice([1.0, 0.7, -1.0], size=count, p=[0.5, 0.2, 0.3])
        strengths = np.where(strengths < 0, random.random(count), strengths)
        given = random.random(count) < 0.45
        return torch.as_tensor(np.where(given, 1 - strengths, 1.0).astype(np.float32))


def _kinds() -> dict[Kind, float]:
    """All kinds of clips with their shares."""
    kinds = {
        Kind(*size, rate, frames, stage_2): share * rate_share
        for sizes, frames, stage_2 in ((_STAGE_1, _FRAMES, False), (_STAGE_2, _STAGE_2_FRAMES, True))
        for size, share in sizes.items()
        for rate, rate_share in _RATES.items()
    }
    return kinds | _LONG


def _test_kind(rate: float) -> Kind:
    return Kind(2, 2, rate, _FRAMES)
