# SPDX-License-Identifier: Apache-2.0
"""The whole way, stage by stage, against a pipeline assembled from the diffusers and transformers classes."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ltxrt.decode import VideoDecoder
from ltxrt.denoise import DenoiseStage
from ltxrt.encoders import Conditioning, TextContexts, encode_audio, encode_image, encode_text
from ltxrt.engine_store import Engines
from ltxrt.latent import to_grid
from ltxrt.media import bundled_speech, conditioning_waveform, read_audio
from ltxrt.pipeline import Pipeline
from ltxrt.shapes import PixelShape
from ltxrt.upsample import upsample

PROMPT = "A green-skinned face on a red background speaks."
CANVAS = PixelShape(25, 128, 192)
RATE = Fraction(24)
STAGE_1 = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)
SEED = 11


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


def last(steps: Any) -> np.ndarray:
    return [step.latent for step in steps][-1]


@pytest.mark.parametrize("strength", [None, 1.0, 0.7])
def test_every_stage_matches_the_classes(
    pipeline: Pipeline, engines: Engines, torch_pipeline: Any, strength: float | None
) -> None:
    track = read_audio(bundled_speech())
    text = encode_text(engines.text_encoder, pipeline.tokenizer.encode(PROMPT))
    video, audio = torch_pipeline.text(PROMPT)
    assert error(text.video, video) < 1e-4
    assert error(text.audio, audio) < 1e-4

    tokens = encode_audio(engines.audio_encoder, track, CANVAS.frames, RATE)
    waveform = conditioning_waveform(track, round(CANVAS.frames / RATE * 16000))
    expected_tokens = torch_pipeline.audio(waveform, tokens.shape[1])
    assert error(tokens, expected_tokens) < 1e-4

    frames = expected_frames = None
    if strength is not None:
        image = np.random.default_rng(5).integers(0, 256, (90, 160, 3), np.uint8)
        frames = encode_image(engines.image_encoder, image, CANVAS, 33)
        expected_frames = (
            torch_pipeline.image(image, CANVAS.halved()),
            torch_pipeline.image(image, CANVAS),
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
    expected = torch_pipeline.stage((1, STAGE_1), half, RATE, np.zeros_like(found), theirs, SEED)
    assert error(found, expected) < 1e-3

    found = upsample(engines.upsampler, found, half.to_latent())
    expected = torch_pipeline.upsample(expected, half)
    assert error(found, expected) < 1e-3

    found = last(stage(2, full, STAGE_2).run(ours, found, SEED))
    expected = torch_pipeline.stage((2, STAGE_2), full, RATE, expected, theirs, SEED)
    assert error(found, expected) < 1e-3
    if strength == 1.0:
        held = full.to_latent().tokens_per_frame
        assert frames is not None
        np.testing.assert_array_equal(found[:, :held], frames[1])

    decoder = VideoDecoder(engines.video_decoder, pipeline.bundle.manifest.model.stream, 2)
    chunks = list(decoder.chunks(to_grid(found, full.to_latent()), CANVAS.frames, RATE))
    assert sum(len(chunk.frames) for chunk in chunks) == CANVAS.frames
    luma = np.concatenate([chunk.frames for chunk in chunks])[:, : CANVAS.height]
    unit = ((torch_pipeline.decode(expected, full).numpy().swapaxes(0, 1) + 1) / 2).clip(0, 1)
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
