# SPDX-License-Identifier: Apache-2.0
"""Phase 2: the audio VAE's encoder learns tokens from which mouth and spectrum can be read by a linear head.

The head is dropped. Token k has heard the mel frames up to 4k (its convolutions are causal), so it is asked for
the mouth at those frames and the few before.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltxrt_export.networks.audio_encoder import LogMel, MelSettings
from ltxrt_export.tiny.config import checkpoint_config
from ltxrt_export.tiny.mouth import SAMPLE_RATE, Floats, mouth_track
from ltxrt_export.tiny.sound import track
from ltxrt_export.tiny.train.fused import fast_norms, plain_norms
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Average, Optimiser

__all__ = ["AudioPhase", "audio_tokens", "log_mel"]

_SECONDS, _BATCH = 1.24, 6
_MUON_RATE, _ADAM_RATE = 0.015, 2e-3
#: Mel frames before a token's last one at which the mouth is asked for.
_BACK = 8


def log_mel(waveforms: Tensor) -> Tensor:
    """Mono [B, samples] to the two equal channels that the encoder takes, [B, 2, frames, 64]."""
    return _spectrogram()(waveforms.unsqueeze(0))[0].unsqueeze(1).expand(-1, 2, -1, -1)


@cache
def _spectrogram() -> LogMel:
    return LogMel(MelSettings.of_checkpoint(checkpoint_config())).to(torch.get_default_device())


def audio_tokens(vae: Any, mel: Tensor) -> Tensor:
    """Tokens before normalisation, [B, n, 128], as ``networks.audio_encoder.AudioEncoder`` makes them."""
    mean = vae.encoder(mel)[:, : vae.encoder.latent_channels]
    return mean.transpose(1, 2).flatten(2)


class AudioPhase:
    """Trains the audio encoder and sets its latent statistics at the end.

    Args:
        model: Its ``audio_vae`` is trained.
        seed: Of the sounds.
        recordings: Speech to mix in, see ``sound.track``.
    """

    name = "audio_vae"

    def __init__(self, model: TinyModel, seed: int, recordings: Sequence[Floats]) -> None:
        self._vae = model.audio_vae.requires_grad_(True).to(memory_format=torch.channels_last)
        fast_norms(self._vae.encoder)
        self._random = np.random.default_rng([seed, 4])
        self._recordings = recordings
        self._head = nn.Linear(self._vae.latents_mean.shape[0], 2 * _BACK + 64)
        head = [(f"head.{name}.table", parameter) for name, parameter in self._head.named_parameters()]
        parameters = [*self._vae.named_parameters(), *head]
        self._optimiser = Optimiser(parameters, _MUON_RATE, _ADAM_RATE)
        self._average = Average([parameter for _, parameter in parameters], 0.99)
        held_out = np.random.default_rng([seed, 5])
        self._test = [track(held_out, _SECONDS, recordings) for _ in range(12)]

    def step(self, progress: float) -> float:
        """One update; the loss."""
        sounds = [track(self._random, _SECONDS, self._recordings) for _ in range(_BATCH)]
        mouth, spectrum, tokens = self._errors(sounds)
        loss = mouth + 0.1 * spectrum + 1e-3 * tokens.square().mean()
        loss.backward()
        self._optimiser.step(progress)
        self._average.update()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Root mean square errors on held-out sounds, averaged weights."""
        self._average.swap()
        mouth, spectrum, tokens = self._errors(self._test)
        self._average.swap()
        return {"mouth": float(mouth) ** 0.5, "spectrum": float(spectrum) ** 0.5, "std": float(tokens.std())}

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the averaged weights and set the mean and standard deviation of each feature."""
        self._average.swap()
        plain_norms(self._vae.encoder)
        sounds = [track(self._random, _SECONDS, self._recordings) for _ in range(60)]
        tokens = torch.cat([self._errors(sounds[start : start + 12])[2].flatten(0, 1) for start in range(0, 60, 12)])
        self._vae.latents_mean.copy_(tokens.mean(dim=0))
        self._vae.latents_std.copy_(tokens.std(dim=0) + 1e-3)
        self._vae.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes."""
        return {
            "optimiser": self._optimiser.state(),
            "average": self._average.values,
            "head": self._head.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._optimiser.restore(state["optimiser"])
        self._head.load_state_dict(state["head"])
        self._average.restore(state["average"])

    def _errors(self, sounds: Sequence[Floats]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean square error of the mouth and of the spectrum, and the tokens."""
        mel = log_mel(torch.as_tensor(np.stack(sounds)))
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            tokens = audio_tokens(self._vae, mel.contiguous(memory_format=torch.channels_last)).float()
        count = tokens.shape[1]
        frames = 4 * np.arange(count)[:, None] - np.arange(_BACK)
        times = np.maximum(frames, 0).astype(np.float32) * (160 / SAMPLE_RATE)
        mouths = [np.concatenate(mouth_track(sound, times.ravel())).reshape(2, count, _BACK) for sound in sounds]
        wanted = torch.as_tensor(np.stack(mouths)).permute(0, 2, 1, 3).flatten(2)
        read = self._head(tokens + 0.1 * torch.randn_like(tokens))
        wanted_mel = torch.stack([mel[:, 0, max(0, 4 * k - 3) : 4 * k + 1].mean(dim=1) for k in range(count)], dim=1)
        return (
            (read[..., : 2 * _BACK] - wanted).square().mean(),
            (read[..., 2 * _BACK :] - (wanted_mel + 4) / 3).square().mean(),
            tokens,
        )
