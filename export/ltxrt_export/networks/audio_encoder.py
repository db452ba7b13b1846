# SPDX-License-Identifier: Apache-2.0
"""Sound to normalised audio tokens: log-mel spectrogram and audio VAE encoder in one graph.

The spectrogram is a convolution with the windowed DFT basis. That basis (4 MB) is not stored: the graph builds
it from one period of a cosine by looking up ``(k * n) mod N``, and whoever loads the graph folds it.

Numerics: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/audio_vae/ops.py (AudioProcessor, which is
torchaudio's MelSpectrogram), audio_vae.py; diffusers
src/diffusers/models/autoencoders/autoencoder_kl_ltx2_audio.py (LTX2AudioEncoder, used as it is).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio, LTX2AudioEncoder
from numpy.typing import NDArray
from torch import Tensor, nn

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorRef

from .spec import Axis, NetworkSpec, Port

__all__ = ["AudioEncoder", "LogMel", "MelSettings", "mel_filters", "spec"]

LOG_FLOOR = 1e-5
#: Spectrogram frames a token: two convolutions of stride 2.
TOKEN_HOPS = 4

# The Slaney scale: linear to 1 kHz, 15 mels there, then 27 mels for every factor of 6.4.
_HZ_PER_MEL = 200.0 / 3
_KNEE_HZ = 1000.0
_KNEE_MEL = _KNEE_HZ / _HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27


@dataclass(frozen=True, slots=True, kw_only=True)
class MelSettings:
    """The spectrogram that the audio VAE was trained on. Lengths in samples, frequencies in hertz.

    Attributes:
        sampling_rate: Of the waveform.
        filter_length: DFT length; frames are centred, with half of it reflected at both ends.
        win_length: Length of the periodic Hann window, centred in the frame.
        hop_length: Distance of two frames.
        n_mel_channels: Mel bins.
        mel_fmin: Lower edge of the lowest bin.
        mel_fmax: Upper edge of the highest bin.
    """

    sampling_rate: int = 16_000
    filter_length: int = 1024
    win_length: int = 1024
    hop_length: int = 160
    n_mel_channels: int = 64
    mel_fmin: float = 0.0
    mel_fmax: float = 8000.0

    def __post_init__(self) -> None:
        """Refuse what the arithmetic does not cover.

        Raises:
            ExportError: A DFT length without a quarter turn, a longer window, or edges beyond half the sampling rate.
        """
        length, window = self.filter_length, self.win_length
        if length < 4 or length % 4:
            raise ExportError(f"audio config: filter_length {length}; allowed: multiples of 4")
        if not 0 < window <= length:
            raise ExportError(f"audio config: win_length {window}; allowed: 1 to filter_length ({length})")
        if not 0 <= self.mel_fmin < self.mel_fmax <= self.sampling_rate / 2:
            raise ExportError(
                f"audio config: mel_fmin {self.mel_fmin:g}, mel_fmax {self.mel_fmax:g}; "
                f"allowed: 0 <= mel_fmin < mel_fmax <= {self.sampling_rate / 2:g}"
            )

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> "MelSettings":
        """Read the settings from a checkpoint's ``config`` (its section ``audio_vae``)."""
        audio = config["audio_vae"]
        stft, mel = audio["preprocessing"]["stft"], audio["preprocessing"]["mel"]
        return cls(
            sampling_rate=int(audio["model"]["params"]["sampling_rate"]),
            filter_length=int(stft["filter_length"]),
            win_length=int(stft["win_length"]),
            hop_length=int(stft["hop_length"]),
            n_mel_channels=int(mel["n_mel_channels"]),
            mel_fmin=float(mel["mel_fmin"]),
            mel_fmax=float(mel["mel_fmax"]),
        )

    def constants(self) -> dict[str, NDArray[np.float32]]:
        """The tables of ``LogMel``, by buffer name."""
        turn = 2 * np.pi * np.arange(self.filter_length) / self.filter_length
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.win_length) / self.win_length)
        before = (self.filter_length - self.win_length) // 2
        window = np.pad(hann, (before, self.filter_length - self.win_length - before))
        tables = {"cosine": np.cos(turn), "window": window, "filters": mel_filters(self)}
        return {name: table.astype(np.float32) for name, table in tables.items()}


def mel_filters(settings: MelSettings) -> NDArray[np.float64]:
    """Triangular filters [filter_length/2 + 1, n_mel_channels], Slaney scale, each of area 1 over hertz."""
    edges = mel_to_hz(
        np.linspace(hz_to_mel(settings.mel_fmin), hz_to_mel(settings.mel_fmax), settings.n_mel_channels + 2)
    )
    bins = np.linspace(0, settings.sampling_rate / 2, settings.filter_length // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


def hz_to_mel(hertz: float) -> float:
    """A frequency on the Slaney scale."""
    if hertz < _KNEE_HZ:
        return hertz / _HZ_PER_MEL
    return float(_KNEE_MEL + np.log(hertz / _KNEE_HZ) / _LOG_STEP)


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney mels as frequencies."""
    return np.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)))


class LogMel(nn.Module):
    """Waveform to log-mel spectrogram, in fp32: STFT magnitude, mel filters, natural log above 1e-5."""

    def __init__(self, settings: MelSettings) -> None:
        super().__init__()
        self.length = settings.filter_length
        self.hop = settings.hop_length
        self.cosine: Tensor
        self.window: Tensor
        self.filters: Tensor
        for name, table in settings.constants().items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Analyse ``waveform[1, channels, samples]``: [1, channels, 1 + samples // hop, mel bins]."""
        reflected = F.pad(waveform.transpose(0, 1), (self.length // 2, self.length // 2), mode="reflect")
        spectrum = F.conv1d(reflected, self.basis(), stride=self.hop)
        real, imaginary = spectrum[:, : self.length // 2 + 1], spectrum[:, self.length // 2 + 1 :]
        magnitude = torch.sqrt(real * real + imaginary * imaginary).transpose(1, 2)
        return torch.log(torch.clamp(magnitude @ self.filters, min=LOG_FLOOR)).unsqueeze(0)

    def basis(self) -> Tensor:
        """Windowed cosines, then sines, of frequencies 0 to N/2: [N + 2, 1, N]. Integer phases are exact."""
        frequencies = torch.arange(self.length // 2 + 1).unsqueeze(1)
        phase = frequencies * torch.arange(self.length) % self.length
        # A sine is a cosine a quarter turn on; its sign does not matter to the magnitude.
        phases = torch.cat([phase, (phase + self.length // 4) % self.length])
        rows = self.cosine.index_select(0, phases.flatten()).view(-1, 1, self.length)
        return rows * self.window


class AudioEncoder(nn.Module):
    """Waveform to normalised audio tokens.

    Args:
        vae: Its encoder and latent statistics are used; parameter names stay the VAE's.
        settings: The spectrogram that it was trained on.

    Raises:
        ExportError: The encoder and the settings do not fit each other.
    """

    def __init__(self, vae: AutoencoderKLLTX2Audio, settings: MelSettings) -> None:
        super().__init__()
        encoder = vae.encoder
        for field, given, built in (
            ("sampling_rate", settings.sampling_rate, encoder.sample_rate),
            ("hop_length", settings.hop_length, encoder.mel_hop_length),
            ("n_mel_channels", settings.n_mel_channels, encoder.mel_bins),
        ):
            if given != built:
                raise ExportError(f"audio config: {field} {given}; allowed: {built}, as the encoder was built")
        self.log_mel = LogMel(settings)
        self.encoder: LTX2AudioEncoder = encoder
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", vae.latents_mean)
        self.register_buffer("latents_std", vae.latents_std)

    def forward(self, waveform: Tensor) -> Tensor:
        """Encode ``waveform[1, 2, samples]`` to tokens [1, samples // hop // 4 + 1, 128], index c*16 + mel."""
        mean = self.encoder(self.log_mel(waveform))[:, : self.encoder.latent_channels]
        return (mean.transpose(1, 2).flatten(2) - self.latents_mean) / self.latents_std


def spec(vae: AutoencoderKLLTX2Audio, weights: Mapping[str, TensorRef], config: Mapping[str, Any]) -> NetworkSpec:
    """The ``audio_encoder`` network, for sound of 40 ms to 481 s (481 frames at 1 a second).

    Args:
        vae: In eval mode; real or fake tensors.
        weights: Stored tensors by the VAE's parameter names; those of the decoder are not used.
        config: The checkpoint's own, for the spectrogram.

    Raises:
        ExportError: As ``MelSettings`` and ``AudioEncoder``.
    """
    settings = MelSettings.of_checkpoint(config)
    module = AudioEncoder(vae, settings).eval()
    token = TOKEN_HOPS * settings.hop_length
    longest = 481 * settings.sampling_rate
    constants: dict[str, NDArray[Any]] = {f"log_mel.{name}": table for name, table in settings.constants().items()}
    return NetworkSpec(
        name="audio_encoder",
        module=module,
        inputs=(Port("waveform", "float32", (1, vae.encoder.in_channels, "samples")),),
        outputs=(Port("audio_tokens", "float32", (1, "tokens", module.latents_mean.shape[0])),),
        axes={
            # The reflection needs filter_length // 2 + 1 samples, the tracer two tokens.
            "samples": Axis(max(token, settings.filter_length // 2 + 1), longest, settings.sampling_rate),
            "tokens": Axis(2, longest // token + 1, 26),
        },
        weights={name: weights[name] for name in module.state_dict()},
        constants=constants,
    )
