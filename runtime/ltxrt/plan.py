# SPDX-License-Identifier: Apache-2.0
"""From a request to what will be made: media read, every open choice resolved, everything refused that cannot work.

Nothing here is random or slow except reading the media, and nothing here has touched an engine.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import MediaError
from .image import aspect_ratio, read_image
from .media import AudioTrack, fit, for_output, read_audio
from .preset import Preset, load_preset
from .request import DEFAULT_NEGATIVE_PROMPT, MAX_FRAMES, MAX_SIDE, MIN_SIDE, NAMED_SIZES, Request, Size
from .schedule import check_sigmas
from .shapes import (
    CANVAS_MULTIPLE,
    PixelShape,
    covering_frames,
    frame_rate,
    frames_covering_audio,
    samples_for_frames,
)

__all__ = ["Plan", "auto_size", "plan_clip"]

_LANDSCAPE = Fraction(16, 9)
_NO_GUIDANCE = "negative_prompt has no effect: the distilled model runs without guidance"
_ASPECT_TOLERANCE = math.log(1.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One clip, resolved.

    Attributes:
        request: As it came.
        preset: The quality preset.
        seed: The seed that is used.
        rate: Exact frames a second.
        frames: Frames of the result.
        canvas: What is generated: ``frames`` rounded up to 8k + 1, at the final size.
        source: The audio as read, at its own rate; the whole of it conditions the clip.
        output_audio: What the file gets, cut or padded to the exact end; None without a track.
        image: First frame, [H, W, 3] uint8, or None.
        notes: What the caller should know about how the request was read.
    """

    request: Request
    preset: Preset
    seed: int
    rate: Fraction
    frames: int
    canvas: PixelShape
    source: AudioTrack
    output_audio: AudioTrack | None
    image: NDArray[np.uint8] | None
    notes: tuple[str, ...]

    @property
    def duration(self) -> Fraction:
        """Exact length of the result in seconds."""
        return self.frames / self.rate


def plan_clip(request: Request, bundle: Bundle) -> Plan:
    """Read the media and resolve the request.

    Raises:
        RequestError: A field does not fit the bundle.
        MediaError: The audio or image is refused.
        BundleError: The preset's schedule does not belong to the bundle's checkpoint.
    """
    preset = load_preset(request.preset_name)
    bundle.network(preset.name, "denoiser")
    for number, sigmas in enumerate((preset.stage_1_sigmas, preset.stage_2_sigmas)):
        check_sigmas(sigmas, bundle.sigmas[number], f"preset {preset.name}, stage {number + 1}")
    rate = frame_rate(request.frames_per_second)
    source = read_audio(request.input_audio)
    image = None if request.input_image is None else read_image(request.input_image)
    frames = _frames(request, source, rate)
    width, height = _size(request, preset, bundle, image)
    output_audio, audio_note = _output_audio(source, frames, rate) if request.generate_audio else (None, None)
    notes = [
        _NO_GUIDANCE if request.negative_prompt not in ("", DEFAULT_NEGATIVE_PROMPT) else None,
        audio_note,
    ]
    return Plan(
        request=request,
        preset=preset,
        seed=request.resolved_seed(),
        rate=rate,
        frames=frames,
        canvas=PixelShape(covering_frames(frames), height, width),
        source=source,
        output_audio=output_audio,
        image=image,
        notes=tuple(note for note in notes if note),
    )


def _frames(request: Request, source: AudioTrack, rate: Fraction) -> int:
    if not request.match_audio_length:
        return request.num_frames
    frames = frames_covering_audio(source.sample_count, source.sample_rate, rate)
    if frames > MAX_FRAMES:
        longest = math.floor(MAX_FRAMES / rate * 1000) / 1000
        raise MediaError(
            "input_audio",
            request.input_audio,
            f"lasts {float(source.duration):.3f} s, which takes {frames} frames at {float(rate):g} frames a second",
            f"at most {longest:.3f} s at this rate ({MAX_FRAMES} frames), or match_audio_length off",
        )
    return frames


def _size(request: Request, preset: Preset, bundle: Bundle, image: NDArray[np.uint8] | None) -> tuple[int, int]:
    """Width and height of the result."""
    if isinstance(request.resolution, Size):
        return request.resolution.width, request.resolution.height
    if request.resolution != "auto":
        return NAMED_SIZES[request.resolution]
    cap = bundle.manifest.model.auto_pixels
    budget = preset.auto_pixels if cap is None else min(cap, preset.auto_pixels)
    return auto_size(_LANDSCAPE if image is None else aspect_ratio(image), budget)


def auto_size(aspect: Fraction, budget_pixels: int) -> tuple[int, int]:
    """Width and height on the grid of 64 that use the budget, or at least half of it.

    Of the sizes whose aspect is within 5 % of the wanted one (or, where there is none, as near as can be had) the
    largest. Nearness is that of the logarithms, so that 2:1 is as far from 1:1 as 1:2.
    """
    budget = min(max(budget_pixels, MIN_SIDE**2), MAX_SIDE**2)
    sides = range(MIN_SIDE, MAX_SIDE + 1, CANVAS_MULTIPLE)
    fitting = [(w, h) for w in sides for h in sides if budget <= 2 * w * h <= 2 * budget]
    error = {size: abs(math.log(size[0] / size[1] / aspect)) for size in fitting}
    tolerated = max(_ASPECT_TOLERANCE, min(error.values()) + 1e-9)
    return min(
        (size for size in fitting if error[size] <= tolerated), key=lambda size: (-size[0] * size[1], error[size])
    )


def _output_audio(source: AudioTrack, frames: int, rate: Fraction) -> tuple[AudioTrack, str | None]:
    """The track for the file: at an output rate, then cut or padded to the exact end of the last frame."""
    end = frames / rate
    # What lies a second or more beyond the end cannot be heard; resampling half an hour of it would take seconds.
    near = AudioTrack(source.samples[:, : math.ceil((end + 1) * source.sample_rate)], source.sample_rate)
    output = for_output(near)
    exact = fit(output, samples_for_frames(frames, rate, output.sample_rate))
    milliseconds = round((source.duration - end) * 1000)
    if milliseconds > 0:
        return exact, f"audio cut by {milliseconds / 1000:.3f} s to end with the video"
    if milliseconds < 0:
        return exact, f"audio padded with {-milliseconds / 1000:.3f} s of silence to end with the video"
    return exact, None
