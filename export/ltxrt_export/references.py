# SPDX-License-Identifier: Apache-2.0
"""The torch classes behind each network, as oracles: diffusers and transformers, fed the published way.

Nothing of ``networks/`` takes part. What the classes lack is restated here from the reference implementation: the audio
front end (``torch.stft``; ltx_core/model/audio_vae/ops.py) and the source of the A<->V modulation
(ltx_core/model/transformer/transformer_args.py; the class alone follows the rules of March 2026).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape
from ltxrt_kernels.rgb_to_yuv420.reference import rgb_to_yuv420

from .checkpoint import Checkpoint, Gemma, Upsampler
from .networks.denoiser import Semantics
from .networks.spec import NetworkSpec, random_feeds

__all__ = ["REFERENCES", "ModelSources", "Reference", "denoise_velocity", "log_mel", "velocity_of"]

Arrays = Mapping[str, NDArray[Any]]
Sizes = Mapping[str, int]


class ModelSources(Protocol):
    """The opened files of a model."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def text_encoder(self) -> Gemma: ...

    @property
    def upsampler(self) -> Upsampler: ...


@dataclass(frozen=True, slots=True)
class Reference:
    """How one network is checked.

    Attributes:
        sizes: Sizes of the network's symbols to try; none of them is the tracing size.
        feeds: Fresh inputs at the given sizes, from a seed.
        outputs: What the torch class makes of them, by output name; outputs left out are not compared.
        least: Sizes below which the class does not run or is ill-conditioned, where the network serves them.
    """

    sizes: Sequence[Sizes]
    feeds: Callable[[Sizes, int], dict[str, NDArray[Any]]]
    outputs: Callable[[Arrays], dict[str, NDArray[Any]]]
    least: Sizes = field(default_factory=dict[str, int])


def _text_encoder(sources: ModelSources, spec: NetworkSpec) -> Reference:
    """Left-padded to the context and masked, as published; the graph sees the real tokens alone."""
    model: Any = sources.text_encoder.component().load()
    connectors: Any = sources.checkpoint.component("connectors").load()
    context = sources.text_encoder.context_length
    # transformers rounds this factor to the dtype of the weights: to bf16 in the published runs, but not in fp32.
    factor = model.embed_tokens.embed_scale
    factor.copy_(factor.bfloat16())

    def feeds(sizes: Sizes, seed: int) -> dict[str, NDArray[Any]]:
        generator = np.random.Generator(np.random.Philox(key=seed))
        return {"input_ids": generator.integers(3, model.config.vocab_size, (1, sizes["n"]), np.int64)}

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        ids = torch.from_numpy(feeds["input_ids"])
        padded = torch.nn.functional.pad(ids, (context - ids.shape[1], 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (context - ids.shape[1], 0))
        states = model(input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        video, audio, _ = connectors(torch.stack(states, dim=-1).flatten(2), mask)
        return {"video_context": video.numpy(), "audio_context": audio.numpy()}

    return Reference([{"n": n} for n in (1, 23, context)], feeds, outputs)


def log_mel(waveform: Tensor, front_end: Mapping[str, Any], mel_filters: NDArray[np.float32]) -> Tensor:
    """Natural-log mel spectrogram [1, channels, T, bins] of a waveform [1, channels, samples].

    Args:
        waveform: fp32.
        front_end: ``preprocessing.stft`` of the checkpoint's audio config.
        mel_filters: [bins, frequencies] or [frequencies, bins].
    """
    size, hop = int(front_end["filter_length"]), int(front_end["hop_length"])
    window = torch.hann_window(size)
    spectrum = torch.stft(waveform[0], size, hop, size, window, center=True, pad_mode="reflect", return_complex=True)
    filters = torch.from_numpy(mel_filters)
    filters = filters if filters.shape[0] == spectrum.shape[1] else filters.T
    return torch.log(torch.clamp(spectrum.abs().transpose(1, 2) @ filters, min=1e-5)).unsqueeze(0)


def _slaney_filters(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Slaney-scale, area-normalised mel filters [frequencies, bins], from transformers."""
    from transformers.audio_utils import mel_filter_bank

    mel, size = config["preprocessing"]["mel"], config["preprocessing"]["stft"]["filter_length"]
    filters = mel_filter_bank(
        num_frequency_bins=size // 2 + 1,
        num_mel_filters=mel["n_mel_channels"],
        min_frequency=float(mel["mel_fmin"]),
        max_frequency=float(mel["mel_fmax"]),
        sampling_rate=config["model"]["params"]["sampling_rate"],
        norm="slaney",
        mel_scale="slaney",
    )
    return filters.astype(np.float32)


def _audio_encoder(sources: ModelSources, spec: NetworkSpec) -> Reference:
    config = sources.checkpoint.config["audio_vae"]
    vae: Any = sources.checkpoint.component("audio_vae").load()
    filters = _slaney_filters(config)

    def feeds(sizes: Sizes, seed: int) -> dict[str, NDArray[Any]]:
        return {name: 0.3 * value for name, value in random_feeds(spec, sizes, seed).items()}

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        mel = log_mel(torch.from_numpy(feeds["waveform"]), config["preprocessing"]["stft"], filters)
        moments = vae.encoder(mel)
        tokens = moments[:, : moments.shape[1] // 2].transpose(1, 2).flatten(2)
        return {"audio_tokens": ((tokens - vae.latents_mean) / vae.latents_std).numpy()}

    return Reference([{"samples": 2400}, {"samples": 31_337}], feeds, outputs)


def _normalised(vae: Any, latent: Tensor) -> Tensor:
    return (latent - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)


def _unnormalised(vae: Any, latent: Tensor) -> Tensor:
    return latent * vae.latents_std.view(1, -1, 1, 1, 1) + vae.latents_mean.view(1, -1, 1, 1, 1)


def _image_encoder(sources: ModelSources, spec: NetworkSpec) -> Reference:
    vae: Any = sources.checkpoint.component("video_vae").load()

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        moments = vae.encoder(torch.from_numpy(feeds["image"]))
        latent = _normalised(vae, moments[:, : vae.latents_mean.shape[0]])
        return {"image_tokens": latent.flatten(2).transpose(1, 2).numpy()}

    sizes = [{"h": 1, "w": 1}, {"h": 4, "w": 5}]
    return Reference(sizes, lambda sizes, seed: random_feeds(spec, sizes, seed), outputs)


def _upsampler(sources: ModelSources, spec: NetworkSpec) -> Reference:
    vae: Any = sources.checkpoint.component("video_vae").load()
    model: Any = sources.upsampler.component().load()

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        upsampled = model(_unnormalised(vae, torch.from_numpy(feeds["latent"])))
        return {spec.outputs[0].name: _normalised(vae, upsampled).numpy()}

    sizes = [{"f": 2, "h": 2, "w": 1}, {"f": 5, "h": 3, "w": 7}]
    # torch does not normalise a group of one value, which a model as narrow as tiny has at the smallest size, and of
    # two values it makes 1 and -1 whatever their difference: rounding errors come out as large as values.
    return Reference(sizes, lambda sizes, seed: random_feeds(spec, sizes, seed), outputs, {"f": 2, "h": 2})


def _video_decoder(sources: ModelSources, spec: NetworkSpec) -> Reference:
    """Whole clips in one chunk; that a stream of chunks gives the same is for the tests to show."""
    vae: Any = sources.checkpoint.component("video_vae").load()

    def feeds(sizes: Sizes, seed: int) -> dict[str, NDArray[Any]]:
        return random_feeds(spec, {"p": 1, "q": 1, "c": 0, **sizes}, seed)

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        pixels = vae.decoder(_unnormalised(vae, torch.from_numpy(feeds["latent"])))
        return {"frames": rgb_to_yuv420(pixels[0].transpose(0, 1).numpy())}

    return Reference([{"n": 2, "h": 1, "w": 1}, {"n": 9, "h": 3, "w": 2}], feeds, outputs)


@contextmanager
def _own_timesteps(model: Any, video: Tensor, audio: Tensor) -> Generator[None]:
    """Feed the A<->V scale/shift of both streams from their own timesteps (rules R2 and R3)."""
    with ExitStack() as stack:
        for module, timestep in (
            (model.av_cross_attn_video_scale_shift, video),
            (model.av_cross_attn_audio_scale_shift, audio),
        ):

            def replace(_module: Any, args: Any, kwargs: Any, timestep: Tensor = timestep) -> Any:
                return (timestep.flatten(), *args[1:]), kwargs

            handle = module.register_forward_pre_hook(replace, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def denoise_velocity(
    model: Any, feeds: Arrays, coordinates: tuple[Tensor, Tensor], semantics: Semantics
) -> NDArray[np.float32]:
    """``velocity_of`` for arrays."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in feeds.items()}
    return velocity_of(model, tensors, coordinates, semantics).numpy()


def velocity_of(
    model: Any, tensors: Mapping[str, Tensor], coordinates: tuple[Tensor, Tensor], semantics: Semantics
) -> Tensor:
    """Velocity [1, Nv, channels] of the diffusers DiT for frozen audio, by the rules of ``semantics``.

    Args:
        model: ``LTX2VideoTransformer3DModel``.
        tensors: The denoiser network's feeds, on the model's device; RoPE tables among them are not used.
        coordinates: Patch bounds of video [1, 3, Nv, 2] and audio [1, 1, Na, 2], as the class prepares them.
        semantics: Modulation rules.
    """
    scale = float(model.config.timestep_scale_multiplier)
    sigma = tensors["sigma"] * scale
    video_timestep = tensors["mask"][..., 0] * sigma
    audio_timestep = torch.zeros(1, tensors["audio_tokens"].shape[1], device=sigma.device)
    with ExitStack() as stack:
        if semantics is not Semantics.R1:
            stack.enter_context(_own_timesteps(model, video_timestep, audio_timestep))
        video, _ = model(
            hidden_states=tensors["latent"],
            audio_hidden_states=tensors["audio_tokens"],
            encoder_hidden_states=tensors["video_context"],
            audio_encoder_hidden_states=tensors["audio_context"],
            timestep=video_timestep,
            audio_timestep=audio_timestep,
            sigma=sigma,
            audio_sigma=torch.zeros_like(sigma) if semantics is Semantics.R3 else sigma,
            video_coords=coordinates[0],
            audio_coords=coordinates[1],
            use_cross_timestep=True,
            return_dict=False,
        )
    return video


def _denoiser(sources: ModelSources, spec: NetworkSpec) -> Reference:
    model: Any = sources.checkpoint.component("transformer").load()
    semantics: Any = spec.module.pre.semantics  # type: ignore[union-attr]  # a DenoiseStep
    seconds, height, width = sources.checkpoint.config["transformer"]["positional_embedding_max_pos"]
    count, cross = spec_width(spec, "rope_time"), spec_width(spec, "rope_audio")
    theta = float(model.config.rope_theta)
    video, audio = ((theta ** np.linspace(0.0, 1.0, n) * np.pi / 2.0).astype(np.float32) for n in (count, cross))
    grid = RopeGrid(video, audio, (seconds, height, width))
    rate = Fraction(25)

    def feeds(sizes: Sizes, seed: int) -> dict[str, NDArray[Any]]:
        shape = LatentShape(sizes["f"], sizes["h"], sizes["w"])
        made = random_feeds(spec, {**sizes, "Nv": shape.tokens}, seed)
        row = (np.arange(shape.tokens) >= shape.tokens_per_frame).astype(np.int64)
        strength = np.float32(0.7 if seed % 2 else 1.0)
        made["token_row"] = row
        made["mask"] = np.where(row == 0, np.float32(1) - strength, np.float32(1)).reshape(1, -1, 1)
        made["sigma"], made["sigma_next"] = np.array([0.725], np.float32), np.array([0.421875], np.float32)
        return {**made, **rope_tables(grid, shape, rate, sizes["Na"])}

    def outputs(feeds: Arrays) -> dict[str, NDArray[Any]]:
        f, h, w = (feeds[f"rope_{axis}"].shape[1] for axis in ("time", "height", "width"))
        coordinates = (
            model.rope.prepare_video_coords(1, f, h, w, "cpu", fps=float(rate)),
            model.audio_rope.prepare_audio_coords(1, feeds["audio_tokens"].shape[1], "cpu"),
        )
        velocity = denoise_velocity(model, feeds, coordinates, semantics)
        sigma, sigma_next = feeds["sigma"][0], feeds["sigma_next"][0]
        latent, clean, mask = feeds["latent"], feeds["clean"], feeds["mask"]
        x0 = (latent - velocity * mask * sigma) * mask + clean * (1 - mask)
        return {"latent_next": latent + (latent - x0) / sigma * (sigma_next - sigma)}

    return Reference([{"f": 2, "h": 1, "w": 1, "Na": 1}, {"f": 4, "h": 3, "w": 5, "Na": 31}], feeds, outputs)


def spec_width(spec: NetworkSpec, port: str) -> int:
    """Last axis of an input."""
    return int(next(p for p in spec.inputs if p.name == port).shape[-1])


REFERENCES: Mapping[str, Callable[[ModelSources, NetworkSpec], Reference]] = {
    "text_encoder": _text_encoder,
    "audio_encoder": _audio_encoder,
    "image_encoder": _image_encoder,
    "denoiser": _denoiser,
    "upsampler": _upsampler,
    "video_decoder": _video_decoder,
}
