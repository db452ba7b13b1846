# SPDX-License-Identifier: Apache-2.0
"""What a clip takes of a GPU's memory: everything that it needs, from when to when, and what shares a place.

Sizes of inputs and outputs are exact; working memory is the engines' own figure where they have one and a model's
estimate (``memory_model.toml``) where they have not. Nothing of this touches a device.
"""

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from .bundle import Bundle
from .engine import concrete_shape
from .manifest import EngineEntry, NetworkEntry, TensorEntry
from .media import CONDITIONING_RATE
from .memory_plan import ArenaPlan, MemoryRequest, plan_arena
from .preset import load_preset
from .shapes import TEMPORAL_COMPRESSION, PixelShape, audio_token_count, chunk_lengths, samples_for_frames

__all__ = [
    "PHASES",
    "ClipMemory",
    "ClipSize",
    "Working",
    "clip_calls",
    "clip_memory",
    "largest_that_fits",
    "process_bytes",
]

#: Steps of a clip, in order, and the network of each.
PHASES = {
    "text": "text_encoder",
    "audio": "audio_encoder",
    "image": "image_encoder",
    "denoise_1": "denoiser",
    "upsample": "upsampler",
    "denoise_2": "denoiser",
    "decode": "video_decoder",
}
_ORDER = tuple(PHASES)
_END = len(_ORDER) - 1
#: Frames that the streaming decoder keeps of each layer.
_CACHED_FRAMES = 2
#: Who reads what a network gives, last: what stays on the device until then.
_LAST_READER = {
    "text": "denoise_2",
    "audio": "denoise_2",
    "image": "denoise_2",
    "denoise_1": "upsample",
    "upsample": "denoise_2",
    "denoise_2": "decode",
    "decode": "decode",
}


@dataclass(frozen=True, slots=True)
class ClipSize:
    """A clip as far as memory knows it: its canvas, frames on the grid 8k + 1, and its exact rate."""

    canvas: PixelShape
    rate: Fraction

    def __str__(self) -> str:
        return f"{self.canvas.width}x{self.canvas.height}, {self.canvas.frames} frames"


#: Working memory of a loaded engine for some calls, each the size of every symbol.
Working = Callable[[Sequence[Mapping[str, int]]], int]


@dataclass(frozen=True, slots=True)
class ClipMemory:
    """The plan of a clip.

    Attributes:
        size: Of the clip.
        plan: Weights first, then inputs and outputs by phase, then the working memory that all engines share; steps
            are indices into ``PHASES``. The runtime draws inputs and outputs from CUDA's pool rather than from these
            places; they show what the pool has to hold at once.
        working: Working memory that the engine of each phase asks for.
        measured: Whether working memory is the engines' own figure throughout.
        process_bytes: What CUDA takes beside.
    """

    size: ClipSize
    plan: ArenaPlan
    working: Mapping[str, int]
    measured: bool
    process_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.plan.peak_bytes + self.process_bytes


def clip_memory(
    bundle: Bundle,
    preset: str,
    size: ClipSize,
    engines: Mapping[str, EngineEntry] | None = None,
    *,
    working: Mapping[str, Working] | None = None,
    release_text: bool = False,
) -> ClipMemory:
    """Plan a clip.

    Args:
        bundle: Where the networks are.
        preset: Whose networks.
        size: Of the clip.
        engines: Compiled engines by network name (``denoiser``); without one the weight files count, which several
            networks share.
        working: What loaded engines say that they need, by network name.
        release_text: Whether the text encoder's weights are given back after the prompt.

    Raises:
        RequestError: The bundle lacks the preset.
        EngineError: A loaded engine does not serve the clip.
    """
    compiled = engines or {}
    networks = {name: bundle.network(preset, name) for name in dict.fromkeys(PHASES.values())}
    requests = list(_weights(bundle, networks, compiled, release_text=release_text))
    needed: dict[str, int] = {}
    measured = True
    for step, (phase, name) in enumerate(PHASES.items()):
        network = networks[name]
        sizes = _sizes(bundle, preset, size, phase)
        # A captured loop keeps its buffers from clip to clip.
        first, last = (0, _END) if name == "denoiser" else (step, step)
        requests.append(MemoryRequest(f"{phase} inputs", _bytes(network.inputs, sizes), first, last))
        kept_until = _ORDER.index(_LAST_READER[phase])
        requests.append(MemoryRequest(f"{phase} outputs", _bytes(network.outputs, sizes), step, kept_until))
        told = (working or {}).get(name)
        reported = (
            _reported_bytes(compiled.get(name), sizes)
            if told is None
            else told(clip_calls(bundle, preset, size, phase))
        )
        measured = measured and reported is not None
        needed[phase] = _estimated_bytes(bundle, network, sizes) if reported is None else reported
    # One block for all engines, which does not shrink: see ``memory.Scratch``.
    requests.append(MemoryRequest("working memory of all engines", max(needed.values()), 0, _END))
    return ClipMemory(size, plan_arena(requests), needed, measured, process_bytes())


def process_bytes() -> int:
    """What CUDA itself takes of a GPU's memory, once it is opened."""
    return int(_model()["fixed"]["process_bytes"])


def largest_that_fits(size: ClipSize, fits: Callable[[ClipSize], bool]) -> ClipSize | None:
    """The largest clip of the same length and nearly the same aspect that ``fits`` says yes to; None without one."""
    frames, height, width = size.canvas
    for high in range(height, 0, -64):
        wide = max(64, round(width * high / height / 64) * 64)
        smaller = ClipSize(PixelShape(frames, high, min(wide, width)), size.rate)
        if fits(smaller):
            return smaller
    return None


def _weights(
    bundle: Bundle,
    networks: Mapping[str, NetworkEntry],
    compiled: Mapping[str, EngineEntry],
    *,
    release_text: bool,
) -> Iterator[MemoryRequest]:
    files = bundle.manifest.files
    for name, entry in compiled.items():
        last = _ORDER.index("text") if release_text and name == "text_encoder" else _END
        yield MemoryRequest(f"{name} weights", files[entry.file].bytes, 0, last)
    shared = dict.fromkeys(
        file for name, network in networks.items() if name not in compiled for file in network.weights
    )
    for file in shared:
        yield MemoryRequest(f"{file} (weights)", files[file].bytes, 0, _END)


def clip_calls(bundle: Bundle, preset: str, size: ClipSize, phase: str) -> list[dict[str, int]]:
    """What the network of a phase is called with: the size of every symbol, for each kind of call.

    The prompt counts as its longest; its real length is not known before it is read.
    """
    sizes = _sizes(bundle, preset, size, phase)
    if phase == "image":
        half = _sizes(bundle, preset, size, "upsample")
        return [sizes, {**sizes, "h": half["h"], "w": half["w"]}]
    if phase != "decode":
        return [sizes]
    lengths = chunk_lengths(
        sizes["f"], bundle.manifest.model.stream.first_chunk_latents, load_preset(preset).decode_chunk_latents
    )
    last = len(lengths) - 1
    calls = [
        {**sizes, "n": n, "p": int(index == 0), "q": int(index == last), "c": _CACHED_FRAMES if index else 0}
        for index, n in enumerate(lengths)
    ]
    return list({tuple(call.values()): call for call in calls}.values())


def _sizes(bundle: Bundle, preset: str, size: ClipSize, phase: str) -> dict[str, int]:
    """Every symbol of a phase's network, at its largest call for this clip."""
    model, canvas = bundle.manifest.model, size.canvas
    grid = (canvas.halved() if phase in ("denoise_1", "upsample") else canvas).to_latent()
    audio = audio_token_count(canvas.frames, size.rate)
    sizes = {"f": grid.frames, "h": grid.height, "w": grid.width, "Nv": grid.tokens, "Na": audio}
    if phase == "text":
        return {"n": model.context_tokens}
    if phase == "audio":
        samples = samples_for_frames(canvas.frames, size.rate, CONDITIONING_RATE)
        return {"samples": samples, "tokens": audio, "Na": audio}
    if phase == "image":
        return {
            **sizes,
            "tokens": grid.tokens_per_frame,
            "hw": grid.tokens_per_frame,
            "H": canvas.height,
            "W": canvas.width,
        }
    if phase == "decode":
        chunk = min(grid.frames, max(model.stream.first_chunk_latents, load_preset(preset).decode_chunk_latents))
        frames = TEMPORAL_COMPRESSION * chunk
        return {**sizes, "n": chunk, "p": 1, "q": 1, "c": _CACHED_FRAMES, "t": frames, "T": frames}
    return sizes


def _bytes(ports: tuple[TensorEntry, ...], sizes: Mapping[str, int]) -> int:
    return sum(
        math.prod(concrete_shape(port.shape, sizes)) * np.dtype(port.dtype).itemsize
        for port in ports
        if _known(port, sizes)
    )


def _known(port: TensorEntry, sizes: Mapping[str, int]) -> bool:
    try:
        concrete_shape(port.shape, sizes)
    except KeyError:  # an output that only the network knows the size of
        return False
    return True


def _reported_bytes(entry: EngineEntry | None, sizes: Mapping[str, int]) -> int | None:
    """Working memory of the profile that serves these sizes, as TensorRT reported it when the engine was built."""
    if entry is None or "scratch_bytes" not in entry.built_with:
        return None
    reported = [int(part) for part in entry.built_with["scratch_bytes"].split(",")]
    for profile, scratch in zip(entry.key.profiles, reported, strict=False):
        if all(low <= sizes.get(symbol, low) <= high for symbol, (low, _, high) in profile.sizes.items()):
            return scratch
    return max(reported)


def _estimated_bytes(bundle: Bundle, network: NetworkEntry, sizes: Mapping[str, int]) -> int:
    element = 4 if network.precision == "fp32" else 2
    return int(_model()["elements"][network.network]) * _units(bundle, network, sizes) * element


def _units(bundle: Bundle, network: NetworkEntry, sizes: Mapping[str, int]) -> int:
    """How many elements of its unit a network has at these sizes (see ``memory_model.toml``)."""
    model = bundle.manifest.model
    match network.network:
        case "text_encoder":
            return sizes["n"] * int(network.outputs[0].shape[2])
        case "audio_encoder":
            return sizes["tokens"] * int(network.outputs[0].shape[2])
        case "image_encoder":
            return 32 * 32 * sizes["h"] * sizes["w"]
        case "denoiser":
            context = next(port for port in network.inputs if port.name == "video_context")
            return sizes["Nv"] * int(context.shape[2])
        case "upsampler":
            return 4 * sizes["Nv"] * model.latent_channels
        case "video_decoder":
            widest = max((s.channels * s.spatial_scale**2 for s in model.stream.states), default=model.latent_channels)
            return widest * sizes["h"] * sizes["w"] * (sizes["t"] + _CACHED_FRAMES)


@cache
def _model() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("ltxrt").joinpath("memory_model.toml").read_text("utf-8"))
