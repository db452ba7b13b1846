# SPDX-License-Identifier: Apache-2.0
"""Clips as the denoiser sees them: sound through the frozen audio encoder, prompts, and the code of what is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ltxrt.image import first_frame
from ltxrt.shapes import SPATIAL_COMPRESSION, LatentShape, audio_token_count, frame_rate, samples_for_frames
from ltxrt_export.networks.text_encoder import TextEncoder
from ltxrt_export.tiny.captions import caption, random_names
from ltxrt_export.tiny.config import CONTEXT_TOKENS
from ltxrt_export.tiny.mouth import SAMPLE_RATE, Floats, MouthTrack, frame_times, mouth_track
from ltxrt_export.tiny.sound import track
from ltxrt_export.tiny.train.fused import fast_norms
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.sound_encoder import audio_tokens, log_mel
from ltxrt_export.tiny.train.text import encode_prompts, token_ids
from ltxrt_export.tiny.train.vae import IMAGE_CRF
from ltxrt_export.tiny.world import Scene, code_of, render

__all__ = ["Clip", "ClipSource", "Kind", "Script", "encode_first"]


#: Standard deviation of the noise, at most, that stands for the first stage's errors.
_STAGE_1_ERROR = 0.3


@dataclass(frozen=True, slots=True)
class Kind:
    """What clips have in common: size in latents, frame rate, latent frames, and which stage they are for."""

    height: int
    width: int
    frames_per_second: float
    frames: int
    stage_2: bool = False

    @property
    def shape(self) -> LatentShape:
        """The latent grid."""
        return LatentShape(self.frames, self.height, self.width)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        return self.height * SPATIAL_COMPRESSION, self.width * SPATIAL_COMPRESSION

    @property
    def rate(self) -> Fraction:
        """Frames a second, exactly."""
        return frame_rate(self.frames_per_second)

    @property
    def audio_tokens(self) -> int:
        """Audio tokens that go with the clip."""
        return audio_token_count(8 * (self.frames - 1) + 1, self.rate)


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip.

    Attributes:
        latent: Normalised video tokens [Nv, 32].
        first: What the encoder makes of the first frame, [tokens of a frame, 32].
        audio: Normalised audio tokens [Na, 128].
        contexts: Text contexts of its prompt, [context, width] of video and of audio.
        upsampled: What the second stage might start from, [Nv, 32].
    """

    latent: Tensor
    first: Tensor
    audio: Tensor
    contexts: tuple[Tensor, Tensor]
    upsampled: Tensor


@dataclass(frozen=True, slots=True)
class Script:
    """What happens in a clip: scene, mouth, and the conditioning [Na, 128] and [context, width] that goes with it."""

    kind: Kind
    scene: Scene
    mouth: MouthTrack
    audio: Tensor
    contexts: tuple[Tensor, Tensor]


class ClipSource:
    """Draws and encodes clips.

    Args:
        model: With trained VAEs.
        seed: Of the clips.
        recordings: Speech to mix in.
        tokenizer: The tiny tokenizer.
    """

    def __init__(self, model: TinyModel, seed: int, recordings: Sequence[Floats], tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._text = TextEncoder(model.text_model, model.connectors, CONTEXT_TOKENS)
        for vae in (model.video_vae, model.audio_vae.encoder):
            fast_norms(vae)
        model.video_vae.to(memory_format=torch.channels_last_3d)
        self._random = np.random.default_rng([seed, 6])
        self._recordings = recordings

    def draw(self, kind: Kind) -> Clip:
        """A new clip of a kind."""
        return self.film(self.script(kind))

    @torch.no_grad()
    def script(self, kind: Kind) -> Script:
        """What happens in a new clip, and its conditioning; needs no video VAE."""
        random = self._random
        text, shown = caption(random, random_names(random))
        frames = 8 * (kind.frames - 1) + 1
        samples = samples_for_frames(frames, kind.rate, SAMPLE_RATE)
        sound = track(random, samples / SAMPLE_RATE, self._recordings)[:samples]
        mouth = mouth_track(sound, frame_times(frames, kind.frames_per_second))
        contexts = encode_prompts(self._text, token_ids(self._tokenizer, [text]))
        audio = self._audio(sound)[: kind.audio_tokens].clone()
        return Script(kind, Scene.draw(random, shown), mouth, audio, (contexts[0][0].clone(), contexts[1][0].clone()))

    @torch.no_grad()
    def film(self, script: Script) -> Clip:
        """The clip of a script: its code, at every place of the picture."""
        kind = script.kind
        times = frame_times(8 * (kind.frames - 1) + 1, kind.frames_per_second)
        places = kind.height * kind.width
        code = torch.as_tensor(code_of(script.scene, script.mouth, times)).unsqueeze(1)
        error = float(self._random.uniform(0, _STAGE_1_ERROR))
        upsampled = code + error * torch.randn_like(code)
        code, upsampled = (values.expand(-1, places, -1).flatten(0, 1) for values in (code, upsampled))
        picture = render(script.scene, MouthTrack(*(track[:1] for track in script.mouth)), times[:1], *kind.pixels)
        height, width = kind.pixels
        first = encode_first(self._model.video_vae, first_frame(picture[0], width, height, IMAGE_CRF))
        return Clip(code, first, script.audio, script.contexts, upsampled)

    def _audio(self, sound: Floats) -> Tensor:
        vae = self._model.audio_vae
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            tokens = audio_tokens(vae, log_mel(torch.as_tensor(sound)[None])).float()
        return ((tokens - vae.latents_mean) / vae.latents_std)[0]


def encode_first(vae: Any, picture: NDArray[np.float32]) -> Tensor:
    """A conditioning picture [1, 3, 1, H, W] to normalised tokens [tokens of a frame, 32]."""
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        mean = vae.encoder(torch.as_tensor(picture))[:, : vae.latents_mean.shape[0]].float()
    return (mean.flatten(2).transpose(1, 2)[0] - vae.latents_mean) / vae.latents_std
