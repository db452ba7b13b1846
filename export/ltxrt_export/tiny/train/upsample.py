# SPDX-License-Identifier: Apache-2.0
"""Phase 4: the x2 upsampler learns the latent of a clip from that at half size: the code of both is one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltxrt_export.networks.upsampler import Upsampler
from ltxrt_export.tiny.mouth import Floats, MouthTrack, frame_times, mouth_track
from ltxrt_export.tiny.sound import track
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Average, Optimiser
from ltxrt_export.tiny.train.vae import random_scene
from ltxrt_export.tiny.world import code_of

__all__ = ["UpsamplerPhase"]

#: Half-size latent grids.
_SIZES: Mapping[tuple[int, int], float] = {(2, 2): 0.45, (3, 3): 0.35, (2, 4): 0.1, (4, 4): 0.1}
_FRAMES, _BATCH = 3, 8
_MUON_RATE, _ADAM_RATE = 0.01, 1e-3


class UpsamplerPhase:
    """Trains the upsampler around the video VAE's statistics.

    Args:
        model: Its ``upsampler`` is trained; its ``video_vae`` is ready.
        seed: Of the clips.
        recordings: Speech to mix in.
        mouths: Mouth movements to train on; scenes are drawn anew all the time.
    """

    name = "upsampler"

    def __init__(self, model: TinyModel, seed: int, recordings: Sequence[Floats], mouths: int = 150) -> None:
        self._random = np.random.default_rng([seed, 8])
        self._recordings = recordings
        self._upsampler = Upsampler(model.upsampler.requires_grad_(True), model.video_vae)
        parameters = list(model.upsampler.named_parameters())
        self._optimiser = Optimiser(parameters, _MUON_RATE, _ADAM_RATE)
        self._average = Average([parameter for _, parameter in parameters], 0.99)
        self._mouths = [self._mouth() for _ in range(mouths)]
        self._test = [self._pair((2, 2)) for _ in range(8)]

    def step(self, progress: float) -> float:
        """One update; the loss."""
        sizes, shares = list(_SIZES), list(_SIZES.values())
        size = sizes[int(self._random.choice(len(sizes), p=shares))]
        chosen = [self._pair(size) for _ in range(_BATCH)]
        half = torch.stack([pair[0] for pair in chosen])
        half = half + torch.randn_like(half) * (0.15 * torch.rand(_BATCH, 1, 1, 1, 1))
        loss = (self._upsampler(half) - torch.stack([pair[1] for pair in chosen])).square().mean()
        loss.backward()
        self._optimiser.step(progress)
        self._average.update()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean square error on held-out clips, where a latent has variance 1."""
        self._average.swap()
        half, full = (torch.stack([pair[index] for pair in self._test]) for index in (0, 1))
        error = float((self._upsampler(half) - full).square().mean())
        self._average.swap()
        return {"error": error}

    def finish(self) -> None:
        """Keep the averaged weights and freeze."""
        self._average.swap()
        self._upsampler.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes."""
        return {"optimiser": self._optimiser.state(), "average": self._average.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._optimiser.restore(state["optimiser"])
        self._average.restore(state["average"])

    def _mouth(self) -> tuple[MouthTrack, Floats]:
        random = self._random
        frames, rate = 8 * (_FRAMES - 1) + 1, float(random.choice([12.5, 24.0, 25.0, 30.0, 60.0]))
        times = frame_times(frames, rate)
        return mouth_track(track(random, frames / rate, self._recordings), times), times

    def _pair(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The code of one clip at half and at full size, each [32, f, h, w]."""
        mouth, times = self._mouths[int(self._random.integers(len(self._mouths)))]
        shift = np.float32(self._random.uniform(0, 10))
        code = torch.as_tensor(code_of(random_scene(self._random), mouth, times + shift)).T[:, :, None, None]
        half, full = (code.expand(-1, -1, size[0] * factor, size[1] * factor) for factor in (1, 2))
        return half, full
