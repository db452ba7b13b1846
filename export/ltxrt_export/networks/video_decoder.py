# SPDX-License-Identifier: Apache-2.0
"""The video VAE decoder as an exact stream: chunks of a clip in, planar YUV frames out, no frame computed twice.

The decoder's temporal convolutions (kernel 3) look one frame back and one ahead, and at the true ends of the
clip the edge frame is repeated. Each of them therefore keeps the last two frames of its input from chunk to
chunk and runs unpadded over ``cache + chunk``, so it emits one frame late: the first chunk gives fewer frames,
every later one 8 per latent, the last one what is left. Their concatenation is the un-chunked decode.

What depends on the position in the clip is a *shape*, never a value: ``first`` and ``last`` are tensors of
length 1 in the first and last chunk and 0 elsewhere, and the caches are empty (length 0) before the first
chunk. With p and q their lengths, every convolution sees ``cache + p * head + chunk + q * tail``, and a
time-doubling upsampler drops its first p frames. So no output size depends on a tensor's value, and one graph
serves first, middle, last and only chunks.

Numerics: diffusers src/diffusers/models/autoencoders/autoencoder_kl_ltx2.py (LTX2VideoDecoder3d, whose modules
are used as they are), Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/video_vae/conv_video_decoder.py.
Colours: ``ltxrt_kernels.rgb_to_yuv420``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    AutoencoderKLLTX2Video,
    LTX2VideoDecoder3d,
    LTX2VideoResnetBlock3d,
    LTX2VideoUpsampler3d,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorRef
from ltxrt_kernels import rgb_to_yuv420

from .spec import Axis, NetworkSpec, Port

__all__ = ["CACHED_FRAMES", "StreamLayout", "StreamState", "VideoDecoder", "spec", "stages", "stream_layout"]

#: Frames that a temporal convolution of kernel 3 keeps of its input.
CACHED_FRAMES = 2

Forward = Callable[..., tuple[Tensor, ...]]
Stage = LTX2VideoResnetBlock3d | LTX2VideoUpsampler3d


@dataclass(frozen=True, slots=True)
class StreamState:
    """One cache: ``name`` is an input [1, channels, c, space_scale*h, space_scale*w], ``next_`` + name an output.

    c is 0 before the first chunk and 2 after it. A frame of it lasts 1/time_scale of a latent frame.
    """

    name: str
    channels: int
    time_scale: int
    space_scale: int


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """What a runtime has to know to stream a clip of F latents through the decoder.

    Attributes:
        states: The caches, in port order.
        minimum_first_latents: A first chunk that is not also the last needs this many latents, or some layer
            would have nothing to compute. A shorter clip goes through in one chunk; later chunks need 1.
        held_frames: A first chunk of n latents, unless it is the last, gives 8n - 7 - held_frames frames; the
            last chunk gives the held ones on top of its own 8 a latent.
    """

    states: tuple[StreamState, ...]
    minimum_first_latents: int
    held_frames: int


class VideoDecoder(nn.Module):
    """Normalised latents to I420 pictures, chunk by chunk.

    Args:
        vae: Its decoder and latent statistics are used; parameter names stay the VAE's.

    Raises:
        ExportError: The decoder has parts that LTX-2.3 does not have.
    """

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__()
        check_supported(vae.decoder)
        self.decoder: LTX2VideoDecoder3d = vae.decoder
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", vae.latents_mean)
        self.register_buffer("latents_std", vae.latents_std)
        self.layout = stream_layout(vae.decoder)

    @property
    def constants(self) -> dict[str, NDArray[np.float32]]:
        """Values of the buffers that are no weights, see ``NetworkSpec``."""
        return {}

    def forward(self, latent: Tensor, first: Tensor, last: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Decode one chunk.

        Args:
            latent: [1, 128, n, h, w], normalised.
            first: [1] in the clip's first chunk, [0] elsewhere; the value does not matter.
            last: [1] in the clip's last chunk, [0] elsewhere; the value does not matter.
            states: The caches as ``layout`` lists them.

        Returns:
            Frames [T, 3H/2, W] uint8 (I420, BT.709 limited range), then the next caches, each of two frames.
            After the last chunk the caches mean nothing.
        """
        packed, next_states = self.decode(latent, first, last, states)
        return (packed_to_yuv420(packed, self.decoder.patch_size), *next_states)

    def rgb(self, latent: Tensor, first: Tensor, last: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """As ``forward``, but with the decoder's own output: [1, 3, T, H, W], about [-1, 1], unclamped."""
        packed, next_states = self.decode(latent, first, last, states)
        patch = self.decoder.patch_size
        _, _, frames, height, width = packed.shape
        tiles = packed.reshape(1, 3, patch, patch, frames, height, width).permute(0, 1, 4, 5, 3, 6, 2)
        return (tiles.reshape(1, 3, frames, height * patch, width * patch), *next_states)

    def decode(
        self, latent: Tensor, first: Tensor, last: Tensor, states: Iterable[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the network: packed pixels [1, 3*4*4, T, H/4, W/4] (channel, width, height offset), next caches."""
        edges = _Edges(first.shape[0], last.shape[0], iter(states))
        decoder, statistics = self.decoder, (1, -1, 1, 1, 1)
        hidden = latent * self.latents_std.view(statistics) + self.latents_mean.view(statistics)
        hidden = decoder.conv_in.conv(edges.pad(hidden))
        for stage in stages(decoder):
            if isinstance(stage, LTX2VideoResnetBlock3d):
                hidden = resnet(stage, hidden, edges)
            else:
                hidden = upsample(stage, hidden, edges)
        hidden = decoder.conv_act(decoder.norm_out(hidden))
        return decoder.conv_out.conv(edges.pad(hidden)), edges.next_states


class _Edges:
    """What precedes and follows the chunk at every temporal convolution; collects the next caches."""

    def __init__(self, heads: int, tails: int, states: Iterator[Tensor]) -> None:
        self.heads = heads
        self.tails = tails
        self.next_states: list[Tensor] = []
        self._states = states

    def pad(self, hidden: Tensor) -> Tensor:
        """``cache + heads * first frame + hidden + tails * last frame``, and its end kept as the next cache."""
        head = hidden[:, :, :1].expand(-1, -1, self.heads, -1, -1)
        tail = hidden[:, :, -1:].expand(-1, -1, self.tails, -1, -1)
        padded = torch.cat([next(self._states), head, hidden, tail], dim=2)
        self.next_states.append(padded[:, :, -CACHED_FRAMES:])
        return padded


def resnet(block: LTX2VideoResnetBlock3d, hidden: Tensor, edges: _Edges) -> Tensor:
    """A residual block. Norm and activation are per frame, so the first cache also serves the skip."""
    padded = edges.pad(hidden)
    hidden = block.conv1.conv(block.nonlinearity(block.norm1(padded)))
    hidden = block.conv2.conv(edges.pad(block.nonlinearity(block.norm2(hidden))))
    # Gathered by index: a slice would tie the lengths of cache, head and tail to each other in the trace.
    frames = torch.arange(hidden.shape[2], device=hidden.device) + edges.heads
    return hidden + padded.index_select(2, frames)


def upsample(block: LTX2VideoUpsampler3d, hidden: Tensor, edges: _Edges) -> Tensor:
    """A convolution and a pixel shuffle; where time doubles, the clip's very first frame is dropped."""
    time, rows, columns = block.stride
    hidden = block.conv.conv(edges.pad(hidden))
    _, packed, frames, height, width = hidden.shape
    channels = packed // (time * rows * columns)
    hidden = hidden.reshape(1, channels, time, rows, columns, frames, height, width)
    hidden = hidden.permute(0, 1, 5, 2, 6, 3, 7, 4)
    hidden = hidden.reshape(1, channels, frames * time, height * rows, width * columns)
    return hidden if time == 1 else hidden[:, :, edges.heads :]


def packed_to_yuv420(packed: Tensor, patch: int) -> Tensor:
    """Packed pixels [1, 3*patch*patch, T, h, w] to I420 pictures [T, 3H/2, W] uint8, in fp32.

    Chroma blocks lie within a patch, so colours are converted before the pixel shuffle, which then moves one
    and a half samples a pixel rather than three.
    """
    _, _, frames, height, width = packed.shape
    half = patch // 2
    unit = (packed.float() * 0.5 + 0.5).clamp(0, 1).reshape(3, half, 2, half, 2, frames, height, width)
    luma = rgb_to_yuv420.LUMA_OFFSET + rgb_to_yuv420.LUMA_SCALE * luma_of(unit)
    blocks = unit.mean(dim=(2, 4))
    block_luma = luma_of(blocks)
    differences = [
        (blocks[2:] - block_luma) * (rgb_to_yuv420.CHROMA_SCALE / rgb_to_yuv420.CB_RANGE),
        (blocks[:1] - block_luma) * (rgb_to_yuv420.CHROMA_SCALE / rgb_to_yuv420.CR_RANGE),
    ]
    chroma = rgb_to_yuv420.CHROMA_OFFSET + torch.cat(differences)
    luma_rows = luma.reshape(patch, patch, frames, height, width).permute(2, 3, 1, 4, 0)
    chroma_rows = chroma.reshape(2, half, half, frames, height, width).permute(3, 0, 4, 2, 5, 1)
    picture = torch.cat(
        [
            luma_rows.reshape(frames, height * patch, width * patch),
            chroma_rows.reshape(frames, height * half, width * patch),
        ],
        dim=1,
    )
    return picture.round().to(torch.uint8)


def luma_of(rgb: Tensor) -> Tensor:
    """Y' of RGB along the first axis, which stays with size 1."""
    return rgb_to_yuv420.KR * rgb[:1] + rgb_to_yuv420.KG * rgb[1:2] + rgb_to_yuv420.KB * rgb[2:]


def stages(decoder: LTX2VideoDecoder3d) -> list[Stage]:
    """What lies between ``conv_in`` and ``conv_out``; the class registers it in the order of execution."""
    return [module for module in decoder.modules() if isinstance(module, Stage)]


def stream_layout(decoder: LTX2VideoDecoder3d) -> StreamLayout:
    """The caches of a decoder, and how far its first chunk has to look ahead."""
    time = space = 1
    caches = [(decoder.conv_in.in_channels, time, space)]
    for stage in stages(decoder):
        if isinstance(stage, LTX2VideoResnetBlock3d):
            caches += [(conv.in_channels, time, space) for conv in (stage.conv1, stage.conv2)]
        else:
            caches.append((stage.conv.in_channels, time, space))
            time, space = time * stage.stride[0], space * stage.stride[1]
    caches.append((decoder.conv_out.in_channels, time, space))
    states = tuple(StreamState(f"state_{index:02}", *cache) for index, cache in enumerate(caches))
    minimum = next(n for n in range(1, 1000) if first_chunk_frames(states, n) > 0)
    held = (minimum - 1) * time + 1 - first_chunk_frames(states, minimum)
    return StreamLayout(states, minimum, held)


def first_chunk_frames(states: Iterable[StreamState], latents: int) -> int:
    """Frames that a first chunk gives while more are to come; 0 where some convolution would run empty."""
    frames, time = latents, 1
    for state in states:
        factor, time = state.time_scale // time, state.time_scale
        frames = frames * factor - (factor - 1)
        if frames < CACHED_FRAMES:
            return 0
        frames -= 1
    return frames


def check_supported(decoder: LTX2VideoDecoder3d) -> None:
    """Refuse what the streaming forward does not do; none of it is part of LTX-2.3.

    Raises:
        ExportError: Names the first such part.
    """
    upsamplers = [stage for stage in stages(decoder) if isinstance(stage, LTX2VideoUpsampler3d)]
    resnets = [stage for stage in stages(decoder) if isinstance(stage, LTX2VideoResnetBlock3d)]
    refused = {
        "causal convolutions": decoder.is_causal,
        "timestep conditioning": decoder.time_embedder is not None,
        "noise injection": any(block.per_channel_scale1 is not None for block in resnets),
        "a convolution at the head of an up block": any(block.conv_in for block in decoder.up_blocks),
        "residual upsampling": any(block.residual for block in upsamplers),
        "patches in time": decoder.patch_size_t != 1,
        "patches of an odd size": decoder.patch_size % 2 != 0,
    }
    for part, present in refused.items():
        if present:
            raise ExportError(f"video VAE decoder: {part} cannot be streamed; LTX-2.3 has none")


def with_named_inputs(forward: Forward, names: list[str]) -> Forward:
    """``forward`` with a parameter for every input: torch.export takes all of ``*states`` for a single one."""

    def named(*tensors: Tensor) -> tuple[Tensor, ...]:
        return forward(*tensors)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    vars(named)["__signature__"] = inspect.Signature(parameters)
    return named


def spec(
    vae: AutoencoderKLLTX2Video, weights: Mapping[str, TensorRef], kind: type[VideoDecoder] = VideoDecoder
) -> tuple[NetworkSpec, StreamLayout]:
    """The ``video_decoder`` network and its stream layout, for the manifest.

    Args:
        vae: In eval mode; real or fake tensors.
        weights: Stored tensors by the VAE's parameter names; those of the encoder are not used.
        kind: How it is written down; ``FramewiseVideoDecoder`` is for CPUs.
    """
    module = kind(vae).eval()
    layout = module.layout
    channels = module.latents_mean.shape[0]
    scale = layout.states[-1].space_scale * module.decoder.patch_size

    def cache(state: StreamState, prefix: str, frames: int | str) -> Port:
        grid = f"{state.space_scale}*h", f"{state.space_scale}*w"
        return Port(prefix + state.name, "float32", (1, state.channels, frames, *grid))

    inputs = (
        Port("latent", "float32", (1, channels, "n", "h", "w")),
        Port("first", "float32", ("p",)),
        Port("last", "float32", ("q",)),
        *(cache(state, "", "c") for state in layout.states),
    )
    module.forward = with_named_inputs(module.forward, [port.name for port in inputs])
    network = NetworkSpec(
        name="video_decoder",
        module=module,
        inputs=inputs,
        outputs=(
            Port("frames", "uint8", ("t", f"{scale * 3 // 2}*h", f"{scale}*w")),
            *(cache(state, "next_", CACHED_FRAMES) for state in layout.states),
        ),
        axes={
            "n": Axis(1, 61, 4),
            "h": Axis(1, 128, 2),
            "w": Axis(1, 128, 3),
            "p": Axis(0, 1, 3, traced_maximum=4),
            "q": Axis(0, 1, 3, traced_maximum=4),
            "c": Axis(0, CACHED_FRAMES, 3, traced_maximum=4),
            "t": Axis(1, 481, 2),
        },
        weights={name: weights[name] for name in module.state_dict()},
        constants=module.constants,
    )
    return network, layout
