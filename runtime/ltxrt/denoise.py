# SPDX-License-Identifier: Apache-2.0
"""The denoising loop. The two stages are two instances of one class; each step is one run of one graph.

On a device the latent never leaves it between the steps, and the next step is under way before the last one is
reported (``engine.iterate``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .encoders import Conditioning
from .engine import Engine, Tensor, iterate
from .noise import gaussian
from .rope import RopeGrid, rope_tables
from .schedule import noised, steps
from .shapes import LatentShape

__all__ = ["DenoiseStage", "DenoiseStep"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DenoiseStep:
    """One finished step.

    ``latent`` [1, Nv, 128] fp32, on the device that the denoiser runs on, may be overwritten by the next step: copy
    what must outlive it.
    """

    step: int
    steps: int
    sigma: float
    latent: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseStage:
    """One stage of denoising at one size.

    Attributes:
        number: 1 (half size) or 2 (full size); also the stage's noise stream.
        engine: The denoiser.
        rope: The model's RoPE frequencies.
        shape: Latent grid.
        channels: Width of a video token.
        rate: Frames a second.
        sigmas: Falling noise levels, the last one 0.
    """

    number: int
    engine: Engine
    rope: RopeGrid
    shape: LatentShape
    channels: int
    rate: Fraction
    sigmas: Sequence[float]

    def run(self, conditioning: Conditioning, initial: Floats | None, seed: int) -> Iterator[DenoiseStep]:
        """Denoise, yielding after every step; the last step's latent is the stage's result.

        Args:
            conditioning: What steers the clip.
            initial: Latent that is noised to the first sigma, [1, Nv, 128]; None starts from pure noise.
            seed: The request's seed.
        """
        feeds = self._feeds(conditioning, initial, seed)
        pairs = steps(self.sigmas)
        levels = [
            {"sigma": np.array([now], np.float32), "sigma_next": np.array([after], np.float32)} for now, after in pairs
        ]
        outputs = iterate(self.engine.capture(feeds), levels, {"latent_next": "latent"})
        for index, (step, (_, sigma_next)) in enumerate(zip(outputs, pairs, strict=True), start=1):
            yield DenoiseStep(index, len(pairs), sigma_next, step["latent_next"])

    def _feeds(self, conditioning: Conditioning, initial: Floats | None, seed: int) -> dict[str, NDArray[np.generic]]:
        tokens = self.shape.tokens
        start = np.zeros((1, tokens, self.channels), np.float32) if initial is None else initial
        clean, mask, row = start.copy(), np.ones((1, tokens, 1), np.float32), np.ones(tokens, np.int64)
        if conditioning.first_frames is not None:
            conditioned = slice(0, self.shape.tokens_per_frame)
            clean[:, conditioned] = conditioning.first_frames[self.number - 1]
            mask[:, conditioned] = np.float32(1) - np.float32(conditioning.image_strength)
            row[conditioned] = 0
        noise = gaussian(seed, self.number, start.shape)
        latent = noised(start, clean, noise, self.sigmas[0], mask)
        return {
            "latent": latent,
            "clean": clean,
            "mask": mask,
            "audio_tokens": conditioning.audio_tokens,
            "video_context": conditioning.text.video,
            "audio_context": conditioning.text.audio,
            "token_row": row,
            "sigma": np.zeros(1, np.float32),
            "sigma_next": np.zeros(1, np.float32),
            **rope_tables(self.rope, self.shape, self.rate, conditioning.audio_tokens.shape[1]),
        }
