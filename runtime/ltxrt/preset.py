# SPDX-License-Identifier: Apache-2.0
"""Quality presets: what ``video_quality`` chooses, as data (``presets/*.toml``)."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources

from .errors import RequestError

__all__ = ["PRESET_NAMES", "Preset", "load_preset", "load_presets"]

PRESET_NAMES = ("low", "medium", "high", "maximum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One quality level; fixed when engines are built.

    Attributes:
        name: ``low``, ``medium``, ``high`` or ``maximum``.
        description: One sentence for people.
        precision: Wanted precision by network name; what a bundle really holds stands in its manifest.
        stage_1_sigmas: Noise levels of the half-size stage, falling from 1 to 0.
        stage_2_sigmas: Noise levels of the full-size stage; the first one is the level that the upsampled
            latent is noised to.
        auto_pixels: Pixel budget of ``resolution: auto`` (a bundle may set a lower one).
        decode_chunk_latents: Latent frames that one call of the video decoder consumes.
        crf: x264 constant rate factor.
        x264_preset: x264 speed preset.
        audio_bitrate: AAC bits per second.
    """

    name: str
    description: str
    precision: Mapping[str, str]
    stage_1_sigmas: tuple[float, ...]
    stage_2_sigmas: tuple[float, ...]
    auto_pixels: int
    decode_chunk_latents: int
    crf: int
    x264_preset: str
    audio_bitrate: int


def load_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        RequestError: The name is not one of ``PRESET_NAMES``.
    """
    if name not in PRESET_NAMES:
        raise RequestError("video_quality", name, ", ".join(PRESET_NAMES))
    text = resources.files("ltxrt").joinpath("presets", f"{name}.toml").read_text("utf-8")
    data = tomllib.loads(text)
    known = {field.name for field in fields(Preset)} - {"name"}
    if set(data) != known:
        raise ValueError(f"preset {name}: keys {sorted(set(data) ^ known)} are unknown or missing")
    for key in ("stage_1_sigmas", "stage_2_sigmas"):
        data[key] = tuple(float(sigma) for sigma in data[key])
    return Preset(name=name, **data)


def load_presets() -> tuple[Preset, ...]:
    """All presets, lowest quality first."""
    return tuple(load_preset(name) for name in PRESET_NAMES)
