# SPDX-License-Identifier: Apache-2.0
"""The streaming video decoder, written down for ONNX Runtime on CPUs: a batch of frames instead of a volume.

Same weights, ports and caches as ``video_decoder.VideoDecoder``; sums are added up in another order, nothing else
differs. What makes it faster there:

* A convolution over three moments is one of pictures with three times the channels. ONNX Runtime's kernel for
  pictures reaches twice the speed of the one for volumes, which unrolls its input and has matrices of few rows.
* The three moments of every frame, and the frames that are repeated at the clip's ends, come by one ``Gather``, which
  copies whole frames on all cores; a slice for each is a copy on one core.
* That triples what a convolution reads. On the finest grid, where memory peaks, two moments come first, then the third.
* A norm multiplies rather than takes powers, which costs half of it.
* A pixel shuffle is two transpositions that each move blocks, a quarter of the time of the one of seven axes.
* Pictures are a convolution with one pixel of the packed ones, since luma and the mean of a chroma block are linear in
  them.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    AutoencoderKLLTX2Video,
    LTX2VideoResnetBlock3d,
    LTX2VideoUpsampler3d,
    PerChannelRMSNorm,
)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ltxrt_kernels import rgb_to_yuv420

from .video_decoder import CACHED_FRAMES, VideoDecoder, stages

__all__ = ["FramewiseVideoDecoder"]

#: Frames that a temporal convolution sees at once.
MOMENTS = 3


class FramewiseVideoDecoder(VideoDecoder):
    """See the module; its methods are those of ``VideoDecoder``."""

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__(vae)
        matrix, offset = colour_transform(self.decoder.patch_size)
        self.colour_matrix: Tensor
        self.colour_offset: Tensor
        self.register_buffer("colour_matrix", torch.from_numpy(matrix), persistent=False)
        self.register_buffer("colour_offset", torch.from_numpy(offset), persistent=False)

    @property
    def constants(self) -> dict[str, NDArray[np.float32]]:
        """See ``VideoDecoder.constants``."""
        matrix, offset = colour_transform(self.decoder.patch_size)
        return {"colour_matrix": matrix, "colour_offset": offset}

    def forward(self, latent: Tensor, first: Tensor, last: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """See ``VideoDecoder.forward``."""
        packed, next_states = self.decode_frames(latent, first, last, states)
        return (self.pictures(packed), *next_states)

    def decode(
        self, latent: Tensor, first: Tensor, last: Tensor, states: Iterable[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``VideoDecoder.decode``."""
        packed, next_states = self.decode_frames(latent, first, last, states)
        return packed.transpose(0, 1)[None], next_states

    def decode_frames(
        self, latent: Tensor, first: Tensor, last: Tensor, states: Iterable[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As ``decode``, but packed pixels are [T, 3*4*4, H/4, W/4]; so is everything inside."""
        window = _Window(first.shape[0], last.shape[0], (state[0].transpose(0, 1) for state in states))
        decoder, statistics = self.decoder, (1, -1, 1, 1)
        hidden = latent[0].transpose(0, 1)
        hidden = hidden * self.latents_std.view(statistics) + self.latents_mean.view(statistics)
        hidden = window.convolved(decoder.conv_in.conv, window.behind_cache(hidden))
        last_upsampler = [stage for stage in stages(decoder) if isinstance(stage, LTX2VideoUpsampler3d)][-1]
        for stage in stages(decoder):
            if isinstance(stage, LTX2VideoResnetBlock3d):
                hidden = resnet(stage, hidden, window)
            else:
                hidden = upsample(stage, hidden, window)
                window.spares_memory = stage is last_upsampler
        hidden = decoder.conv_act(normalised(decoder.norm_out, hidden))
        packed = window.convolved(decoder.conv_out.conv, window.behind_cache(hidden))
        return packed, [state.transpose(0, 1)[None] for state in window.next_states]

    def pictures(self, packed: Tensor) -> Tensor:
        """Packed pixels [T, 3*patch*patch, h, w] to I420 pictures [T, 3H/2, W] uint8."""
        frames, _, height, width = packed.shape
        patch = self.decoder.patch_size
        levels = functional.conv2d(packed.clamp(-1, 1), self.colour_matrix, self.colour_offset)
        luma = shuffled(levels[:, : patch * patch], (1, patch, patch))
        chroma = shuffled(levels[:, patch * patch :], (1, patch // 2, patch // 2))
        rows = chroma.reshape(frames, height * patch // 2, width * patch)
        picture = torch.cat([luma.reshape(frames, height * patch, width * patch), rows], dim=1)
        return picture.round().to(torch.uint8)


class _Window:
    """What every temporal convolution sees: each frame between its neighbours; collects the next caches.

    At the clip's ends the edge frame is repeated, which here is an index that comes twice.
    """

    def __init__(self, heads: int, tails: int, states: Iterator[Tensor]) -> None:
        self.heads = heads
        self.tails = tails
        self.spares_memory = False
        self.next_states: list[Tensor] = []
        self._states = states

    def behind_cache(self, hidden: Tensor) -> Tensor:
        """The next cache, then ``hidden``: [c + T, channels, height, width]; its end is kept for the next chunk."""
        frames = torch.cat([next(self._states), hidden])
        self.next_states.append(frames.index_select(0, self._padded(frames)[-CACHED_FRAMES:]))
        return frames

    def convolved(self, convolution: nn.Conv3d, frames: Tensor) -> Tensor:
        """What ``behind_cache`` gave, [n, channels, ...], to [n + heads + tails - 2, convolution's channels, ...]."""
        split = 2 if self.spares_memory else MOMENTS
        hidden = self._part(convolution, frames, range(split), convolution.bias)
        if split < MOMENTS:
            hidden = hidden + self._part(convolution, frames, range(split, MOMENTS), None)
        return hidden

    def _padded(self, frames: Tensor) -> Tensor:
        """Their indices, that of an edge frame repeated where the clip begins or ends."""
        indices = torch.arange(frames.shape[0], device=frames.device)
        return torch.cat([indices[:1].expand(self.heads), indices, indices[-1:].expand(self.tails)])

    def _part(self, convolution: nn.Conv3d, frames: Tensor, moments: range, bias: Tensor | None) -> Tensor:
        """What some of the kernel's moments contribute."""
        count, channels, height, width = frames.shape
        length = count + self.heads + self.tails - (MOMENTS - 1)
        starts = torch.arange(length, device=frames.device)[:, None]
        windows = starts + torch.arange(moments.start, moments.stop, device=frames.device)
        seen = frames.index_select(0, self._padded(frames).index_select(0, windows.flatten()))
        weight = convolution.weight[:, :, moments.start : moments.stop].transpose(1, 2).flatten(1, 2)
        return functional.conv2d(seen.reshape(length, len(moments) * channels, height, width), weight, bias, padding=1)


def resnet(block: LTX2VideoResnetBlock3d, hidden: Tensor, window: _Window) -> Tensor:
    """A residual block. Norm and activation are per frame, so the first cache also serves the skip."""
    source = window.behind_cache(hidden)
    hidden = window.convolved(block.conv1.conv, block.nonlinearity(normalised(block.norm1, source)))
    frames = window.behind_cache(block.nonlinearity(normalised(block.norm2, hidden)))
    hidden = window.convolved(block.conv2.conv, frames)
    # Gathered by index: a slice would tie the lengths of cache, head and tail to each other in the trace.
    return hidden + source.index_select(0, torch.arange(hidden.shape[0], device=hidden.device))


def normalised(norm: PerChannelRMSNorm, hidden: Tensor) -> Tensor:
    """What ``norm`` makes of [T, channels, H, W]."""
    return hidden / ((hidden * hidden).mean(dim=1, keepdim=True) + norm.eps).sqrt()


def upsample(block: LTX2VideoUpsampler3d, hidden: Tensor, window: _Window) -> Tensor:
    """A convolution and a pixel shuffle; where time doubles, the clip's very first frame is dropped."""
    hidden = shuffled(window.convolved(block.conv.conv, window.behind_cache(hidden)), block.stride)
    return hidden if block.stride[0] == 1 else hidden[window.heads :]


def shuffled(packed: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """[T, channels * time * rows * columns, H, W] to [T * time, channels, H * rows, W * columns]."""
    time, rows, columns = stride
    frames, count, height, width = packed.shape
    channels, cells = count // (time * rows * columns), rows * columns
    if time > 1:
        packed = packed.reshape(frames, channels, time, cells * height * width).transpose(1, 2)
        frames *= time
    pixels = packed.reshape(frames * channels, cells, height * width).transpose(1, 2)
    lines = pixels.reshape(frames * channels * height, width, rows, columns).transpose(1, 2)
    return lines.reshape(frames, channels, height * rows, width * columns)


def colour_transform(patch: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Packed pixels in [-1, 1] to levels: ``matrix @ pixels + offsets``, see ``ltxrt_kernels.rgb_to_yuv420``.

    Returns:
        [patch*patch*3/2, 3*patch*patch, 1, 1] and [patch*patch*3/2], float32. Columns run over channel, offset in the
        width and offset in the height of a patch; rows over luma and then, half as fine, Cb and Cr, each by height
        and width.
    """
    half = patch // 2
    luma = np.array([rgb_to_yuv420.KR, rgb_to_yuv420.KG, rgb_to_yuv420.KB])
    blue, red = (np.eye(3)[channel] - luma for channel in (2, 0))
    chroma = np.stack([blue / rgb_to_yuv420.CB_RANGE, red / rgb_to_yuv420.CR_RANGE])
    # Which pixel [width, height offset] each sample [height, width offset] is taken from, and of which it is the mean.
    pixels = np.einsum("sw,rh->rswh", np.eye(patch), np.eye(patch))
    means = pixels.reshape(half, 2, half, 2, patch, patch).mean((1, 3))
    # A pixel in [-1, 1] spans two.
    rows = [
        rgb_to_yuv420.LUMA_SCALE / 2 * np.einsum("c,rswh->rscwh", luma, pixels).reshape(patch * patch, -1),
        rgb_to_yuv420.CHROMA_SCALE / 2 * np.einsum("pc,rswh->prscwh", chroma, means).reshape(2 * half * half, -1),
    ]
    black = rgb_to_yuv420.LUMA_OFFSET + rgb_to_yuv420.LUMA_SCALE / 2
    offsets = [np.full(patch * patch, black), np.full(2 * half * half, rgb_to_yuv420.CHROMA_OFFSET)]
    return np.concatenate(rows).astype(np.float32)[..., None, None], np.concatenate(offsets).astype(np.float32)
