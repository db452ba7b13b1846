# SPDX-License-Identifier: Apache-2.0
"""Latents to frames, chunk by chunk, at the cost of one pass and equal to an unchunked decode.

Every temporal convolution keeps the last two frames of its input from chunk to chunk, so nothing is decoded twice
and nothing is blended. The price is delay: the first frame needs a look-ahead of ``first_chunk_latents`` latent frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .engine import Array, Engine
from .errors import EngineError
from .manifest import StreamEntry

__all__ = ["FrameChunk", "VideoDecoder", "chunk_lengths"]


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Consecutive frames of the clip.

    Attributes:
        frames: [n, height * 3 / 2, width] uint8, planar YUV 4:2:0 BT.709 limited range (I420), on the host.
        first_index: Index of the first one in the clip.
        rate: Frames a second.
    """

    frames: NDArray[np.uint8]
    first_index: int
    rate: Fraction

    @property
    def pts_seconds(self) -> Fraction:
        """Presentation time of the first frame."""
        return self.first_index / self.rate


def chunk_lengths(latents: int, first: int, rest: int) -> list[int]:
    """Latent frames of each chunk: ``first`` (or all there is), then ``rest`` each, the last one what remains."""
    if latents <= first:
        return [latents]
    full, remainder = divmod(latents - first, rest)
    return [first, *[rest] * full, *([remainder] if remainder else [])]


@dataclass(frozen=True, slots=True)
class VideoDecoder:
    """The streaming decoder.

    Attributes:
        engine: The video decoder network.
        stream: Its states, from the manifest.
        chunk_latents: Latent frames a chunk.
    """

    engine: Engine
    stream: StreamEntry
    chunk_latents: int

    def chunks(self, latent: NDArray[np.float32], frames: int, rate: Fraction) -> Iterator[FrameChunk]:
        """Decode the first ``frames`` frames.

        Args:
            latent: [1, 128, f, h, w], normalised.
            frames: Frames to give, at most 8 (f - 1) + 1; what the last latents hold beyond them is dropped.
            rate: Frames a second.

        Raises:
            EngineError: The network failed, or gave fewer frames than that.
        """
        _, _, count, height, width = latent.shape
        states: dict[str, Array] = {
            state.name: np.zeros(
                (1, state.channels, 0, height * state.spatial_scale, width * state.spatial_scale), np.float32
            )
            for state in self.stream.states
        }
        lengths = chunk_lengths(count, self.stream.first_chunk_latents, self.chunk_latents)
        start = done = 0
        for index, length in enumerate(lengths):
            feeds: dict[str, Array] = {
                "latent": np.ascontiguousarray(latent[:, :, start : start + length]),
                "first": np.zeros(int(index == 0), np.float32),
                "last": np.zeros(int(index == len(lengths) - 1), np.float32),
                **states,
            }
            outputs = self.engine.run(feeds)
            decoded = np.asarray(outputs["frames"], np.uint8)[: frames - done]
            states = {state.name: outputs[f"next_{state.name}"] for state in self.stream.states}
            start += length
            if len(decoded):
                yield FrameChunk(decoded, done, rate)
                done += len(decoded)
            if done == frames:
                return
        raise EngineError(f"{self.engine.name}: {count} latent frames gave {done} frames, {frames} are needed")
