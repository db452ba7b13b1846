# SPDX-License-Identifier: Apache-2.0
"""Latents to frames, chunk by chunk, at the cost of one pass and equal to an unchunked decode.

Every temporal convolution keeps the last two frames of its input from chunk to chunk, so nothing is decoded twice
and nothing is blended. The price is delay: the first frame needs a look-ahead of ``first_chunk_latents`` latent frames.

On a device the caches stay there, and a chunk's frames are copied out while the next chunk is decoded: the device is
given chunk k + 1 before the caller, who encodes, is given the frames of chunk k.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Tensor, run_resident
from .errors import EngineError
from .manifest import StreamEntry
from .memory import DeviceTensor, HostCopy
from .shapes import chunk_lengths

__all__ = ["FrameChunk", "VideoDecoder"]


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

    def chunks(self, latent: Tensor, frames: int, rate: Fraction) -> Iterator[FrameChunk]:
        """Decode the first ``frames`` frames.

        Args:
            latent: [1, 128, f, h, w], normalised.
            frames: Frames to give, at most 8 (f - 1) + 1; what the last latents hold beyond them is dropped.
            rate: Frames a second.

        Raises:
            EngineError: The network failed, or gave fewer frames than that.
        """
        done = 0
        for frames_out in self._decoded(latent):
            decoded = np.asarray(frames_out, np.uint8)[: frames - done]
            if len(decoded):
                yield FrameChunk(decoded, done, rate)
                done += len(decoded)
            if done == frames:
                return
        raise EngineError(
            f"{self.engine.name}: {latent.shape[2]} latent frames gave {done} frames, {frames} are needed"
        )

    def _decoded(self, latent: Tensor) -> Iterator[Tensor]:
        """The frames of every chunk, in order; those of a device one chunk late, when they have been copied."""
        _, _, count, height, width = latent.shape
        states: dict[str, Tensor] = {
            state.name: np.zeros(
                (1, state.channels, 0, height * state.spatial_scale, width * state.spatial_scale), np.float32
            )
            for state in self.stream.states
        }
        lengths = chunk_lengths(count, self.stream.first_chunk_latents, self.chunk_latents)
        copies: deque[HostCopy] = deque()
        start = 0
        for index, length in enumerate(lengths):
            feeds: Mapping[str, Tensor] = {
                "latent": _latents(latent, start, start + length),
                "first": np.zeros(int(index == 0), np.float32),
                "last": np.zeros(int(index == len(lengths) - 1), np.float32),
                **states,
            }
            outputs = run_resident(self.engine, feeds)
            states = {state.name: outputs[f"next_{state.name}"] for state in self.stream.states}
            start += length
            frames = outputs["frames"]
            if not isinstance(frames, DeviceTensor):
                yield frames
                continue
            copies.append(frames.fetch())
            if len(copies) > 1:
                yield copies.popleft().wait()
        while copies:
            yield copies.popleft().wait()


def _latents(latent: Tensor, start: int, stop: int) -> Tensor:
    """Some latent frames of [1, 128, f, h, w], contiguous, where they are."""
    if isinstance(latent, DeviceTensor):
        return latent.device.part(latent, 2, start, stop)
    return np.ascontiguousarray(np.asarray(latent)[:, :, start:stop])
