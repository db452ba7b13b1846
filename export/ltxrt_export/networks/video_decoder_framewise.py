# SPDX-License-Identifier: Apache-2.0
"""The streaming video decoder, written down for ONNX Runtime on CPUs: a batch of frames instead of a volume.

Same weights, ports and caches as ``video_decoder.VideoDecoder``, and the same function: only what is rounded differs
(a mean of 1e-5 levels in the pictures of the tiny model). What makes it faster there:

* Convolutions are of pictures. ONNX Runtime's kernel for those reaches twice the speed of the one for volumes, which
  unrolls its input and has matrices of few rows.
* In time they are minimal filters: four frames take the products of six kernels, not of twelve. That is F(4, 3) of
  Winograd, Arithmetic Complexity of Computations, 1980; for networks, Lavin and Gray, arXiv:1509.09308.
* The six frames that four are made of, those that are repeated at the clip's ends among them, come by one ``Gather``,
  which copies whole frames on all cores; a slice for each is a copy on one core.
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

#: Frames that a temporal convolution sees for one frame.
MOMENTS = 3
#: Frames that are made together, and how many they are made of.
MADE, SEEN = 4, 6
#: F(4, 3): what six kernels see of the frames, the kernels of three moments, and the frames that their products make.
#: Lavin and Gray's matrices of the points 0, 1, -1, 2, -2 and infinity; that of the kernels times 24.
FILTER_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
FILTER_KERNELS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32)
FILTER_OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32
)


class FramewiseVideoDecoder(VideoDecoder):
    """See the module; its methods are those of ``VideoDecoder``."""

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__(vae)
        self.colour_matrix: Tensor
        self.colour_offset: Tensor
        self.filter_inputs: Tensor
        self.filter_kernels: Tensor
        self.filter_outputs: Tensor
        for name, value in self.constants.items():
            self.register_buffer(name, torch.from_numpy(value), persistent=False)

    @property
    def constants(self) -> dict[str, NDArray[np.float32]]:
        """See ``VideoDecoder.constants``."""
        matrix, offset = colour_transform(self.decoder.patch_size)
        return {
            "colour_matrix": matrix,
            "colour_offset": offset,
            "filter_inputs": FILTER_INPUTS,
            "filter_kernels": FILTER_KERNELS,
            "filter_outputs": FILTER_OUTPUTS,
        }

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
        window = _Window(
            (first.shape[0], last.shape[0]),
            (self.filter_inputs, self.filter_kernels, self.filter_outputs),
            (state[0].transpose(0, 1) for state in states),
        )
        decoder, statistics = self.decoder, (1, -1, 1, 1)
        hidden = latent[0].transpose(0, 1)
        hidden = hidden * self.latents_std.view(statistics) + self.latents_mean.view(statistics)
        hidden = window.convolved(decoder.conv_in.conv, window.behind_cache(hidden))
        for stage in stages(decoder):
            if isinstance(stage, LTX2VideoResnetBlock3d):
                hidden = resnet(stage, hidden, window)
            else:
                hidden = upsample(stage, hidden, window)
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

    def __init__(
        self, ends: tuple[int, int], minimal_filter: tuple[Tensor, Tensor, Tensor], states: Iterator[Tensor]
    ) -> None:
        self.heads, self.tails = ends
        self.next_states: list[Tensor] = []
        self._inputs, self._kernels, self._outputs = minimal_filter
        self._states = states

    def behind_cache(self, hidden: Tensor) -> Tensor:
        """The next cache, then ``hidden``: [c + T, channels, height, width]; its end is kept for the next chunk."""
        frames = torch.cat([next(self._states), hidden])
        self.next_states.append(frames.index_select(0, self._padded(frames)[-CACHED_FRAMES:]))
        return frames

    def convolved(self, convolution: nn.Conv3d, frames: Tensor) -> Tensor:
        """What ``behind_cache`` gave, [n, channels, ...], to [n + heads + tails - 2, convolution's channels, ...]."""
        _, channels, height, width = frames.shape
        padded = self._padded(frames)
        indices = torch.arange(padded.shape[0] - (MOMENTS - 1), device=frames.device)
        # The last window may reach behind the end: what it makes there is dropped.
        padded = torch.cat([padded, padded[-1:].expand(MADE - 1)])
        windows = indices[::MADE, None] + torch.arange(SEEN, device=frames.device)
        seen = frames.index_select(0, padded.index_select(0, windows.flatten()))
        mixed = self._inputs @ seen.reshape(-1, SEEN, channels * height * width)
        weight, bias = self._six_kernels(convolution)
        mixed = mixed.reshape(-1, SEEN * channels, height, width)
        products = functional.conv2d(mixed, weight, bias, padding=1, groups=SEEN)
        made = self._outputs @ products.reshape(-1, SEEN, convolution.out_channels * height * width)
        return made.reshape(-1, convolution.out_channels, height, width).index_select(0, indices)

    def _padded(self, frames: Tensor) -> Tensor:
        """Their indices, that of an edge frame repeated where the clip begins or ends."""
        indices = torch.arange(frames.shape[0], device=frames.device)
        return torch.cat([indices[:1].expand(self.heads), indices, indices[-1:].expand(self.tails)])

    def _six_kernels(self, convolution: nn.Conv3d) -> tuple[Tensor, Tensor]:
        """Kernels [6 * channels out, channels in, rows, columns] and biases; the second counts once in every frame."""
        moments = convolution.weight.movedim(2, 0)
        weight = (self._kernels @ moments.flatten(1) / 24).reshape(-1, *moments.shape[2:])
        assert convolution.bias is not None  # a decoder's convolutions have one
        none = torch.zeros_like(convolution.bias)
        return weight, torch.cat([none, convolution.bias, none.repeat(SEEN - 2)])


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
