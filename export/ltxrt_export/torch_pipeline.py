# SPDX-License-Identifier: Apache-2.0
"""The way from a request to its frames, assembled from the diffusers and transformers classes.

What the exported networks are held against: by the tests for what they give, by the benchmarks for how long it takes.
Every class has the weights of the very files that the networks were exported from. Arrays go in and out of each step on
the host; within a step everything stays on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from ltxrt.encoders import Conditioning
from ltxrt.image import first_frame
from ltxrt.latent import to_grid
from ltxrt.noise import gaussian
from ltxrt.shapes import PixelShape

from .networks.denoiser import Semantics
from .references import ModelSources, log_mel, velocity_of

__all__ = ["TorchPipeline"]

Floats = NDArray[np.float32]

_IMAGE_CRF = 33


@dataclass(frozen=True)
class TorchPipeline:
    """The models of one checkpoint on one device.

    Attributes:
        context: Tokens of the text context.
        tokenizer: Of the text encoder.
        text_model: Gemma.
        connectors: From its hidden states to the contexts.
        audio_config: ``audio_vae`` of the checkpoint's config.
        audio_vae: Audio encoder.
        vae: Video encoder and decoder.
        transformer: DiT.
        upsampler: Latent upsampler.
        device: Where they are.
        dtype: What they compute in; latents are fp32 between steps.
    """

    context: int
    tokenizer: Tokenizer
    text_model: Any
    connectors: Any
    audio_config: Mapping[str, Any]
    audio_vae: Any
    vae: Any
    transformer: Any
    upsampler: Any
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, sources: ModelSources, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "TorchPipeline":
        """Load every class."""
        checkpoint, gemma = sources.checkpoint, sources.text_encoder

        def loaded(component: Any) -> Any:
            module = component.load().to(device)
            return module if dtype is torch.float32 else module.to(dtype)

        return cls(
            context=gemma.context_length,
            tokenizer=Tokenizer.from_file(str(gemma.tokenizer_path)),
            text_model=loaded(gemma.component()),
            connectors=loaded(checkpoint.component("connectors")),
            audio_config=checkpoint.config["audio_vae"],
            audio_vae=loaded(checkpoint.component("audio_vae")),
            vae=loaded(checkpoint.component("video_vae")),
            transformer=loaded(checkpoint.component("transformer")),
            upsampler=loaded(sources.upsampler.component()),
            device=torch.device(device),
            dtype=dtype,
        )

    @property
    def channels(self) -> int:
        """Width of a video token."""
        return len(self.vae.latents_mean)

    def compile(self) -> None:
        """Have torch.compile make kernels of everything that takes time: each block of the DiT once, the VAE whole."""
        for block in self.transformer.transformer_blocks:
            block.compile()
        for module in (self.vae.decoder, self.vae.encoder, self.audio_vae.encoder, self.upsampler):
            module.compile()

    @torch.no_grad()
    def text(self, prompt: str) -> tuple[Floats, Floats]:
        """Contexts of video and audio, as published: left-padded to the whole context, masked."""
        ids = self.tokenizer.encode(prompt).ids
        padding = self.context - len(ids)
        padded = torch.tensor([[0] * padding + ids], device=self.device)
        mask = torch.tensor([[0] * padding + [1] * len(ids)], device=self.device)
        states = self.text_model(
            input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        video, audio, _ = self.connectors(torch.stack(states, dim=-1).flatten(2), mask)
        return _host(video), _host(audio)

    @torch.no_grad()
    def audio(self, waveform: Floats, tokens: int) -> Floats:
        """Normalised audio tokens [1, tokens, 128] of a waveform [1, 2, samples]."""
        filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").astype(np.float32)
        mel = log_mel(torch.from_numpy(waveform), self.audio_config["preprocessing"]["stft"], filters)
        moments = self.audio_vae.encoder(self._in(mel))
        latent = moments[:, : moments.shape[1] // 2].transpose(1, 2).flatten(2)
        return _host((latent - self.audio_vae.latents_mean) / self.audio_vae.latents_std)[:, :tokens]

    @torch.no_grad()
    def image(self, image: NDArray[np.uint8], canvas: PixelShape) -> Floats:
        """Normalised tokens of a first frame [H, W, 3]."""
        pixels = self._in(torch.from_numpy(first_frame(image, canvas.width, canvas.height, _IMAGE_CRF)))
        latent = self._normalised(self.vae.encoder(pixels)[:, : self.channels])
        return _host(latent.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def stage(
        self,
        stage: tuple[int, Sequence[float]],
        canvas: PixelShape,
        rate: Fraction,
        initial: Floats,
        conditioning: Conditioning,
        seed: int,
    ) -> Floats:
        """Euler sampling written out, on the DiT with its own position tables, from the runtime's noise.

        Args:
            stage: Its number, and its noise levels.
            canvas: Size of the frames.
            rate: Frames a second.
            initial: Latent that is noised to the first level, [1, Nv, channels].
            conditioning: What steers the clip.
            seed: The request's.
        """
        (number, sigmas), shape, model = stage, canvas.to_latent(), self.transformer
        first, mask_array = initial.copy(), np.ones((1, shape.tokens, 1), np.float32)
        if conditioning.first_frames is not None:
            first[:, : shape.tokens_per_frame] = conditioning.first_frames[number - 1]
            mask_array[:, : shape.tokens_per_frame] = 1 - conditioning.image_strength
        noise = gaussian(seed, number, initial.shape)
        start = first * (1 - mask_array) + (initial * (1 - sigmas[0]) + noise * sigmas[0]) * mask_array
        x, clean, mask = (
            torch.from_numpy(np.asarray(array, np.float32)).to(self.device) for array in (start, first, mask_array)
        )
        coordinates = (
            model.rope.prepare_video_coords(1, *shape, self.device, fps=float(rate)),
            model.audio_rope.prepare_audio_coords(1, conditioning.audio_tokens.shape[1], self.device),
        )
        fixed = {
            "audio_tokens": self._in(torch.from_numpy(conditioning.audio_tokens)),
            "video_context": self._in(torch.from_numpy(conditioning.text.video)),
            "audio_context": self._in(torch.from_numpy(conditioning.text.audio)),
            "mask": mask,
        }
        for sigma, sigma_next in pairwise(sigmas):
            level = torch.tensor([sigma], dtype=torch.float32, device=self.device)
            feeds = {**fixed, "latent": x.to(self.dtype), "sigma": level}
            velocity = velocity_of(model, feeds, coordinates, Semantics.R3).float()
            x0 = (x - velocity * mask * sigma) * mask + clean * (1 - mask)
            x = x + (x - x0) / sigma * (sigma_next - sigma)
        return _host(x)

    @torch.no_grad()
    def upsample(self, tokens: Floats, canvas: PixelShape) -> Floats:
        """Tokens of ``canvas`` at twice its size."""
        grid = self._in(torch.from_numpy(to_grid(tokens, canvas.to_latent())))
        up = self._normalised(self.upsampler(self._unnormalised(grid)))
        return _host(up.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode(self, tokens: Floats, canvas: PixelShape) -> Tensor:
        """Frames [frames, 3, H, W] on the device, black at -1 and white at 1."""
        grid = self._in(torch.from_numpy(to_grid(tokens, canvas.to_latent())))
        return self.vae.decoder(self._unnormalised(grid))[0].transpose(0, 1)

    def _in(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _normalised(self, latent: Tensor) -> Tensor:
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (self.vae.latents_mean, self.vae.latents_std))
        return (latent - mean) / std

    def _unnormalised(self, latent: Tensor) -> Tensor:
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (self.vae.latents_mean, self.vae.latents_std))
        return latent * std + mean


def _host(tensor: Tensor) -> Floats:
    return tensor.float().cpu().numpy()
