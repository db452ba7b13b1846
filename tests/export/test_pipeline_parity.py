# SPDX-License-Identifier: Apache-2.0
"""The whole way, stage by stage, against a pipeline assembled here from the diffusers and transformers classes."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers.audio_utils import mel_filter_bank

from ltxrt.decode import VideoDecoder
from ltxrt.denoise import DenoiseStage
from ltxrt.encoders import Conditioning, TextContexts, encode_audio, encode_image, encode_text
from ltxrt.engine_store import Engines
from ltxrt.image import first_frame
from ltxrt.latent import to_grid
from ltxrt.media import bundled_speech, conditioning_waveform, read_audio
from ltxrt.noise import gaussian
from ltxrt.pipeline import Pipeline
from ltxrt.shapes import PixelShape
from ltxrt.upsample import upsample
from ltxrt_export.checkpoint import Checkpoint, Gemma, Upsampler
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.references import denoise_velocity, log_mel
from ltxrt_export.tiny_bundle import shipped_tiny

PROMPT = "A green-skinned face on a red background speaks."
CANVAS = PixelShape(25, 128, 192)
RATE = Fraction(24)
STAGE_1 = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)
SEED = 11


@dataclass
class Classes:
    """The torch side, on the very files that the bundle holds."""

    context: int
    tokenizer: Tokenizer
    text_model: Any
    connectors: Any
    audio_config: Any
    audio_vae: Any
    vae: Any
    transformer: Any
    upsampler: Any


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.open()


@pytest.fixture(scope="module")
def engines(pipeline: Pipeline) -> Engines:
    return pipeline.store.engines("high")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Classes:
    paths = shipped_tiny(tmp_path_factory.mktemp("tiny"))
    checkpoint, gemma = Checkpoint.open(paths.checkpoint), Gemma.open(paths.text_encoder)
    return Classes(
        context=gemma.context_length,
        tokenizer=Tokenizer.from_file(str(gemma.tokenizer_path)),
        text_model=gemma.component().load(),
        connectors=checkpoint.component("connectors").load(),
        audio_config=checkpoint.config["audio_vae"],
        audio_vae=checkpoint.component("audio_vae").load(),
        vae=checkpoint.component("video_vae").load(),
        transformer=checkpoint.component("transformer").load(),
        upsampler=Upsampler.open(paths.upsampler).component().load(),
    )


def reference_text(classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """As published: left-padded to the whole context, masked."""
    ids = classes.tokenizer.encode(PROMPT).ids
    padding = classes.context - len(ids)
    padded = torch.tensor([[0] * padding + ids])
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    with torch.no_grad():
        states = classes.text_model(
            input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        video, audio, _ = classes.connectors(torch.stack(states, dim=-1).flatten(2), mask)
    return video.numpy(), audio.numpy()


def reference_audio(classes: Classes, waveform: np.ndarray, tokens: int) -> np.ndarray:
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").astype(np.float32)
    with torch.no_grad():
        mel = log_mel(torch.from_numpy(waveform), classes.audio_config["preprocessing"]["stft"], filters)
        moments = classes.audio_vae.encoder(mel)
        latent = moments[:, : moments.shape[1] // 2].transpose(1, 2).flatten(2)
        return ((latent - classes.audio_vae.latents_mean) / classes.audio_vae.latents_std).numpy()[:, :tokens]


def normalised(classes: Classes, latent: torch.Tensor) -> torch.Tensor:
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (classes.vae.latents_mean, classes.vae.latents_std))
    return (latent - mean) / std


def unnormalised(classes: Classes, latent: torch.Tensor) -> torch.Tensor:
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (classes.vae.latents_mean, classes.vae.latents_std))
    return latent * std + mean


def reference_image(classes: Classes, image: np.ndarray, canvas: PixelShape) -> np.ndarray:
    pixels = torch.from_numpy(first_frame(image, canvas.width, canvas.height, 33))
    with torch.no_grad():
        latent = normalised(classes, classes.vae.encoder(pixels)[:, : classes.vae.latents_mean.shape[0]])
    return latent.flatten(2).transpose(1, 2).numpy()


def reference_stage(
    classes: Classes, number: int, canvas: PixelShape, initial: np.ndarray, conditioning: Conditioning
) -> np.ndarray:
    """Euler sampling written out, on the diffusers DiT with its own position tables."""
    sigmas = (STAGE_1, STAGE_2)[number - 1]
    shape, model = canvas.to_latent(), classes.transformer
    clean, mask = initial.copy(), np.ones((1, shape.tokens, 1), np.float32)
    if conditioning.first_frames is not None:
        clean[:, : shape.tokens_per_frame] = conditioning.first_frames[number - 1]
        mask[:, : shape.tokens_per_frame] = 1 - conditioning.image_strength
    noise = gaussian(SEED, number, initial.shape)
    x = clean * (1 - mask) + (initial * (1 - sigmas[0]) + noise * sigmas[0]) * mask
    coordinates = (
        model.rope.prepare_video_coords(1, *shape, "cpu", fps=float(RATE)),
        model.audio_rope.prepare_audio_coords(1, conditioning.audio_tokens.shape[1], "cpu"),
    )
    for sigma, sigma_next in pairwise(sigmas):
        feeds = {
            "latent": x.astype(np.float32),
            "mask": mask,
            "audio_tokens": conditioning.audio_tokens,
            "video_context": conditioning.text.video,
            "audio_context": conditioning.text.audio,
            "sigma": np.array([sigma], np.float32),
        }
        with torch.no_grad():
            velocity = denoise_velocity(model, feeds, coordinates, Semantics.R3)
        x0 = (x - velocity * mask * sigma) * mask + clean * (1 - mask)
        x = x + (x - x0) / sigma * (sigma_next - sigma)
    return x.astype(np.float32)


def reference_upsample(classes: Classes, tokens: np.ndarray, canvas: PixelShape) -> np.ndarray:
    grid = torch.from_numpy(to_grid(tokens, canvas.to_latent()))
    with torch.no_grad():
        up = normalised(classes, classes.upsampler(unnormalised(classes, grid)))
    return up.flatten(2).transpose(1, 2).numpy()


def last(steps: Any) -> np.ndarray:
    return [step.latent for step in steps][-1]


@pytest.mark.parametrize("strength", [None, 1.0, 0.7])
def test_every_stage_matches_the_classes(
    pipeline: Pipeline, engines: Engines, classes: Classes, strength: float | None
) -> None:
    track = read_audio(bundled_speech())
    text = encode_text(engines.text_encoder, pipeline.tokenizer.encode(PROMPT))
    video, audio = reference_text(classes)
    assert error(text.video, video) < 1e-4
    assert error(text.audio, audio) < 1e-4

    tokens = encode_audio(engines.audio_encoder, track, CANVAS.frames, RATE)
    waveform = conditioning_waveform(track, round(CANVAS.frames / RATE * 16000))
    expected_tokens = reference_audio(classes, waveform, tokens.shape[1])
    assert error(tokens, expected_tokens) < 1e-4

    frames = expected_frames = None
    if strength is not None:
        image = np.random.default_rng(5).integers(0, 256, (90, 160, 3), np.uint8)
        frames = encode_image(engines.image_encoder, image, CANVAS, 33)
        expected_frames = (
            reference_image(classes, image, CANVAS.halved()),
            reference_image(classes, image, CANVAS),
        )
        assert all(error(*pair) < 1e-4 for pair in zip(frames, expected_frames, strict=True))

    ours = Conditioning(text=text, audio_tokens=tokens, first_frames=frames, image_strength=strength or 0.0)
    theirs = Conditioning(
        text=TextContexts(video, audio),
        audio_tokens=expected_tokens,
        first_frames=expected_frames,
        image_strength=strength or 0.0,
    )
    half, full = CANVAS.halved(), CANVAS
    channels = pipeline.bundle.manifest.model.latent_channels

    def stage(number: int, canvas: PixelShape, sigmas: tuple[float, ...]) -> DenoiseStage:
        return DenoiseStage(
            number=number,
            engine=engines.denoiser,
            rope=pipeline.bundle.rope,
            shape=canvas.to_latent(),
            channels=channels,
            rate=RATE,
            sigmas=sigmas,
        )

    found = last(stage(1, half, STAGE_1).run(ours, None, SEED))
    expected = reference_stage(classes, 1, half, np.zeros_like(found), theirs)
    assert error(found, expected) < 1e-3

    found = upsample(engines.upsampler, found, half.to_latent())
    expected = reference_upsample(classes, expected, half)
    assert error(found, expected) < 1e-3

    found = last(stage(2, full, STAGE_2).run(ours, found, SEED))
    expected = reference_stage(classes, 2, full, expected, theirs)
    assert error(found, expected) < 1e-3
    if strength == 1.0:
        held = full.to_latent().tokens_per_frame
        assert frames is not None
        np.testing.assert_array_equal(found[:, :held], frames[1])

    decoder = VideoDecoder(engines.video_decoder, pipeline.bundle.manifest.model.stream, 2)
    chunks = list(decoder.chunks(to_grid(found, full.to_latent()), CANVAS.frames, RATE))
    assert sum(len(chunk.frames) for chunk in chunks) == CANVAS.frames
    luma = np.concatenate([chunk.frames for chunk in chunks])[:, : CANVAS.height]
    with torch.no_grad():
        rgb = classes.vae.decoder(unnormalised(classes, torch.from_numpy(to_grid(expected, full.to_latent()))))
    unit = ((rgb[0].numpy() + 1) / 2).clip(0, 1)
    expected_luma = 16 + 219 * (0.2126 * unit[0] + 0.7152 * unit[1] + 0.0722 * unit[2])
    assert np.abs(luma - expected_luma).mean() < 1.0


def test_a_stream_of_chunks_equals_one_chunk(pipeline: Pipeline, engines: Engines) -> None:
    shape = PixelShape(121, 128, 128).to_latent()
    channels = pipeline.bundle.manifest.model.latent_channels
    latent = np.random.default_rng(3).standard_normal((1, channels, *shape)).astype(np.float32)
    stream = pipeline.bundle.manifest.model.stream
    assert stream.first_chunk_latents < shape.frames

    def decoded(first_chunk_latents: int, chunk_latents: int) -> np.ndarray:
        entry = stream.model_copy(update={"first_chunk_latents": first_chunk_latents})
        chunks = VideoDecoder(engines.video_decoder, entry, chunk_latents).chunks(latent, 121, RATE)
        return np.concatenate([chunk.frames for chunk in chunks])

    whole, chunked = decoded(shape.frames, 1), decoded(stream.first_chunk_latents, 3)
    assert len(chunked) == 121
    # Another blocking of the same sums: fp32 rounding may move a sample over an 8-bit tie, nothing more.
    difference = np.abs(whole.astype(int) - chunked.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4
