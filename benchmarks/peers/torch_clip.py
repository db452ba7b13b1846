# SPDX-License-Identifier: Apache-2.0
"""One clip by the diffusers classes in torch, from the sound to the bytes of the MP4, stage by stage.

Everything that is not the model is ltxrt's own on both sides: reading the sound, noise, schedule, H.264 and AAC
settings. The classes decode the whole clip at once, as diffusers does, and FFmpeg's swscale converts the colours. That
both sides give the same frames is for the tests to show (tests/export/test_pipeline_parity.py).
"""

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltxrt.bundle import Bundle
from ltxrt.encoders import CONDITIONING_SAMPLE_RATE, Conditioning, TextContexts
from ltxrt.media import conditioning_waveform
from ltxrt.mux import FragmentMuxer, MuxOptions
from ltxrt.plan import Plan, plan_clip
from ltxrt.request import Request
from ltxrt.shapes import audio_token_count, samples_for_frames
from ltxrt_export.exporter import Sources
from ltxrt_export.torch_pipeline import TorchPipeline

__all__ = ["ClipTimes", "best_attention", "make_clip", "opened"]

#: In the order in which torch should try them on a GPU.
ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(slots=True)
class ClipTimes:
    """Wall seconds of one clip by stage, and its size."""

    device: torch.device
    stages: dict[str, float] = field(default_factory=dict[str, float])
    size_bytes: int = 0

    @property
    def wall_seconds(self) -> float:
        """All stages; there is nothing between them."""
        return sum(self.stages.values())

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the block, the device's work included."""
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin


def opened(files: tuple[Path, Path, Path], device: str, dtype: str) -> TorchPipeline:
    """The classes with the weights of a checkpoint, a text encoder's folder and an upsampler."""
    return TorchPipeline.of(Sources.open(*files), device, getattr(torch, dtype))


def best_attention(device: torch.device) -> AbstractContextManager[Any]:
    """The fastest attention that torch has on the device; CPUs have one."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(list(ATTENTION), set_priority=True)


def make_clip(pipeline: TorchPipeline, bundle: Bundle, request: Request) -> ClipTimes:
    """Make a clip; ``bundle`` gives what the request is checked against."""
    times = ClipTimes(pipeline.device)
    with times.stage("plan"):
        plan = plan_clip(request, bundle)
    with best_attention(pipeline.device):
        conditioning = _conditioning(pipeline, plan, times)
        half, full = plan.canvas.halved(), plan.canvas
        start = np.zeros((1, half.to_latent().tokens, pipeline.channels), np.float32)
        with times.stage("denoise_1"):
            latent = pipeline.stage((1, plan.preset.stage_1_sigmas), half, plan.rate, start, conditioning, plan.seed)
        with times.stage("upsample"):
            latent = pipeline.upsample(latent, half)
        with times.stage("denoise_2"):
            latent = pipeline.stage((2, plan.preset.stage_2_sigmas), full, plan.rate, latent, conditioning, plan.seed)
        with times.stage("decode"):
            pixels = _rgb(pipeline.decode(latent, full))[: plan.frames]
    with times.stage("mux"):
        times.size_bytes = _encoded(pixels, plan)
    return times


def _conditioning(pipeline: TorchPipeline, plan: Plan, times: ClipTimes) -> Conditioning:
    with times.stage("encode"):
        text = TextContexts(*pipeline.text(plan.request.prompt))
        samples = samples_for_frames(plan.canvas.frames, plan.rate, CONDITIONING_SAMPLE_RATE)
        tokens = audio_token_count(plan.canvas.frames, plan.rate)
        audio = pipeline.audio(conditioning_waveform(plan.source, samples), tokens)
        sizes = (plan.canvas.halved(), plan.canvas)
        image = plan.image
        frames = None if image is None else tuple(pipeline.image(image, size) for size in sizes)
    return Conditioning(
        text=text,
        audio_tokens=audio,
        first_frames=frames,  # type: ignore[arg-type]  # two sizes
        image_strength=plan.request.image_strength,
    )


def _rgb(frames: torch.Tensor) -> NDArray[np.uint8]:
    """[frames, H, W, 3] on the host, as diffusers' video processor rounds."""
    unit = (frames.float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _encoded(pixels: NDArray[np.uint8], plan: Plan) -> int:
    """Bytes of the MP4, made with the runtime's own settings."""
    options = MuxOptions(
        width=plan.canvas.width,
        height=plan.canvas.height,
        frame_rate=plan.rate,
        crf=plan.preset.crf,
        x264_preset=plan.preset.x264_preset,
        audio_bitrate=plan.preset.audio_bitrate,
        tags={},
    )
    size = 0
    with FragmentMuxer(options, plan.output_audio) as muxer:
        for start in range(0, len(pixels), 16):
            planar = [
                av.VideoFrame.from_ndarray(frame, format="rgb24")
                .reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709")
                .to_ndarray()
                for frame in pixels[start : start + 16]
            ]
            size += len(muxer.write(np.stack(planar)))
        return size + len(muxer.finish())
