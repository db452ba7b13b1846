# SPDX-License-Identifier: Apache-2.0
"""Frames, pixels, latents and tokens: the only home of the compression factors and of frame-rate arithmetic.

The video VAE compresses 8 frames (after the first) to one latent frame and 32x32 pixels to one latent
position; the audio VAE gives 25 latents a second. Sources: Lightricks/LTX-2
packages/ltx-core/src/ltx_core/types.py (shapes, rounding), components/patchifiers.py (bounds).
"""

from fractions import Fraction
from typing import NamedTuple

__all__ = [
    "AUDIO_LATENTS_PER_SECOND",
    "CANVAS_MULTIPLE",
    "SPATIAL_COMPRESSION",
    "TEMPORAL_COMPRESSION",
    "LatentShape",
    "PixelShape",
    "audio_token_count",
    "chunk_lengths",
    "covering_frames",
    "frame_rate",
    "frames_covering_audio",
    "samples_for_frames",
]

TEMPORAL_COMPRESSION = 8
SPATIAL_COMPRESSION = 32
#: Two stages, the first at half size: both sides must be a multiple of this many pixels.
CANVAS_MULTIPLE = 2 * SPATIAL_COMPRESSION
AUDIO_LATENTS_PER_SECOND = 25


class PixelShape(NamedTuple):
    """A clip in pixels. ``frames`` is 8k + 1 where a latent shape is asked for."""

    frames: int
    height: int
    width: int

    def to_latent(self) -> "LatentShape":
        """The latent grid of this clip; ``(frames - 1)`` must be a multiple of 8, the sides of 32."""
        if (self.frames - 1) % TEMPORAL_COMPRESSION or self.frames < 1:
            raise ValueError(f"{self.frames} frames are not on the grid 8k + 1")
        if self.height % SPATIAL_COMPRESSION or self.width % SPATIAL_COMPRESSION:
            raise ValueError(f"{self.width}x{self.height} is not a multiple of {SPATIAL_COMPRESSION}")
        return LatentShape(
            (self.frames - 1) // TEMPORAL_COMPRESSION + 1,
            self.height // SPATIAL_COMPRESSION,
            self.width // SPATIAL_COMPRESSION,
        )

    def halved(self) -> "PixelShape":
        """The same clip at half size, the canvas of stage 1."""
        return PixelShape(self.frames, self.height // 2, self.width // 2)


class LatentShape(NamedTuple):
    """A latent grid: frames, height, width; tokens run frame-major, then height, then width."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Video tokens of the grid."""
        return self.frames * self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens of one latent frame; the first frame's tokens come first."""
        return self.height * self.width

    def to_pixel(self) -> PixelShape:
        """The clip that this grid decodes to."""
        return PixelShape(
            (self.frames - 1) * TEMPORAL_COMPRESSION + 1,
            self.height * SPATIAL_COMPRESSION,
            self.width * SPATIAL_COMPRESSION,
        )


def frame_rate(frames_per_second: float) -> Fraction:
    """The exact rate behind a decimal one: 23.976 is 24000/1001, 12.5 is 25/2.

    A rate within 0.1 % of n * 1000/1001 for n in 24, 30, 48, 60, 120 is that NTSC rate unless it is
    nearer to a whole number; everything else is the decimal as written, to a denominator of 1001.
    """
    exact = Fraction(str(frames_per_second))
    nearest = Fraction(round(exact))
    for whole in (24, 30, 48, 60, 120):
        ntsc = Fraction(whole * 1000, 1001)
        if abs(exact - ntsc) < Fraction(1, 1000) * ntsc and abs(exact - ntsc) < abs(exact - nearest):
            return ntsc
    return exact.limit_denominator(1001)


def covering_frames(frames: int) -> int:
    """The smallest frame count 8k + 1, at least 9, that covers ``frames``."""
    latents = max(1, -(-(frames - 1) // TEMPORAL_COMPRESSION))
    return latents * TEMPORAL_COMPRESSION + 1


def frames_covering_audio(samples: int, sample_rate: int, rate: Fraction) -> int:
    """Frames that cover an audio track, ``ceil(seconds * rate)`` in integer arithmetic, at least 1."""
    numerator = samples * rate.numerator
    return max(1, -(-numerator // (sample_rate * rate.denominator)))


def samples_for_frames(frames: int, rate: Fraction, sample_rate: int) -> int:
    """Audio samples that last as long as ``frames`` (rounded half to even, so within half a sample)."""
    return round(Fraction(frames * sample_rate) / rate)


def audio_token_count(frames: int, rate: Fraction) -> int:
    """Audio tokens that go with ``frames`` video frames.

    Rounds half to even after a float division, in the order of the reference
    (ltx_core/types.py, AudioLatentShape.from_duration), so that both agree at ties.
    """
    return round(frames / float(rate) * AUDIO_LATENTS_PER_SECOND)


def chunk_lengths(latents: int, first: int, rest: int) -> list[int]:
    """Latent frames of each chunk: ``first`` (or all there is), then ``rest`` each, what remains, and one.

    The last chunk gives all frames that were held back besides its own. As short as it is, it gives hardly more than
    the only chunk of a clip of ``first`` latent frames: 116 and 113 with the published decoder.
    """
    if latents <= first:
        return [latents]
    full, remainder = divmod(latents - first - 1, rest)
    return [first, *[rest] * full, *([remainder] if remainder else []), 1]
