# SPDX-License-Identifier: Apache-2.0
"""Prompt, audio and first frame to what the denoiser is conditioned on."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .engine import Array, Engine
from .errors import EngineError
from .image import first_frame
from .media import CONDITIONING_RATE, AudioTrack, conditioning_waveform
from .prompt_cache import PromptCache, prompt_key
from .shapes import PixelShape, audio_token_count, samples_for_frames
from .tokenizer import TokenizedPrompt

__all__ = ["CONDITIONING_SAMPLE_RATE", "Conditioning", "TextContexts", "encode_audio", "encode_image", "encode_text"]

#: Sample rate of the audio encoder's input.
CONDITIONING_SAMPLE_RATE = CONDITIONING_RATE

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextContexts:
    """The prompt as both streams see it: [1, context, video width] and [1, context, audio width]."""

    video: Floats
    audio: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Everything that steers both denoising stages of a clip.

    Attributes:
        text: Text contexts.
        audio_tokens: [1, Na, 128], normalised; the same in both stages.
        first_frames: First-frame tokens [1, h * w, 128] at the size of stage 1 and of stage 2; None without an image.
        image_strength: 1 keeps the first frame, 0 ignores it.
    """

    text: TextContexts
    audio_tokens: Floats
    first_frames: tuple[Floats, Floats] | None
    image_strength: float


def encode_text(
    engine: Engine, prompt: TokenizedPrompt, cache: PromptCache | None = None, model: str = ""
) -> TextContexts:
    """Run the text encoder on a prompt's tokens, unless the cache knows what comes out.

    Args:
        engine: The text encoder.
        prompt: The prompt.
        cache: Contexts of earlier prompts; None always runs the network.
        model: What ``engine`` is, from ``text_model``; for the cache.
    """
    if cache is None:
        outputs: Mapping[str, Array] = engine.run({"input_ids": prompt.input_ids})
    else:
        key = prompt_key(model, prompt.input_ids)
        known = cache.get(key, engine.outputs)
        outputs = engine.run({"input_ids": prompt.input_ids}) if known is None else known
        if known is None:
            cache.put(key, outputs)
    return TextContexts(outputs["video_context"], outputs["audio_context"])


def encode_audio(engine: Engine, track: AudioTrack, frames: int, rate: Fraction) -> Floats:
    """Audio tokens [1, Na, 128] that go with ``frames`` frames; what the track lacks is silence.

    Padding the waveform rather than the latents keeps the encoder's view of silence what it is in real audio.
    """
    samples = samples_for_frames(frames, rate, CONDITIONING_SAMPLE_RATE)
    tokens = engine.run({"waveform": conditioning_waveform(track, samples)})["audio_tokens"]
    wanted = audio_token_count(frames, rate)
    if tokens.shape[1] < wanted:
        raise EngineError(f"audio_encoder: {samples} samples gave {tokens.shape[1]} tokens, {wanted} are needed")
    return np.ascontiguousarray(tokens[:, :wanted])


def encode_image(engine: Engine, image: NDArray[np.uint8], canvas: PixelShape, crf: int) -> tuple[Floats, Floats]:
    """First-frame tokens for stage 1 (half size) and stage 2; each is encoded at its own size."""
    sizes = (canvas.halved(), canvas)
    half, full = (
        engine.run({"image": first_frame(image, size.width, size.height, crf)})["image_tokens"] for size in sizes
    )
    return half, full
