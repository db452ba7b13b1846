# SPDX-License-Identifier: Apache-2.0
"""The shipped model: its bundle gives the frames of the torch classes, and they show a face that speaks.

``benchmarks/bench_quality.py`` asks the same of many more clips; here is what no change may break.
"""

import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltxrt.decode import FrameChunk, VideoDecoder
from ltxrt.encoders import Conditioning, TextContexts
from ltxrt.image import read_image
from ltxrt.media import bundled_speech, conditioning_waveform, read_audio
from ltxrt.pipeline import Pipeline
from ltxrt.preset import load_preset
from ltxrt.request import Request
from ltxrt.shapes import PixelShape, audio_token_count, frame_rate, samples_for_frames
from ltxrt_export.tiny.captions import held_out_captions
from ltxrt_export.tiny.measure import (
    CLOSED,
    energy_envelope,
    mouth_opening,
    nearest_colour,
    part_colours,
    psnr,
    rgb_pictures,
    synchrony,
)
from ltxrt_export.tiny.mouth import SAMPLE_RATE, MouthTrack, frame_times
from ltxrt_export.tiny.sound import speech
from ltxrt_export.tiny.world import PARTS, Scene, render
from ltxrt_kernels.rgb_to_yuv420.reference import rgb_to_yuv420

Film = Callable[[Request], np.ndarray]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.open()


@pytest.fixture
def film(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Film:
    """Runs a request to its end and gives the frames that the encoder got, [n, 3/2 H, W]."""
    kept: list[np.ndarray] = []

    class Kept(VideoDecoder):
        def chunks(self, latent: np.ndarray, frames: int, rate: Fraction) -> Iterator[FrameChunk]:
            for chunk in super().chunks(latent, frames, rate):
                kept.append(chunk.frames)
                yield chunk

    monkeypatch.setattr("ltxrt.pipeline.VideoDecoder", Kept)

    def run(request: Request) -> np.ndarray:
        kept.clear()
        assert b"".join(pipeline.generate(request))
        return np.concatenate(kept)

    return run


@pytest.fixture
def wav(tmp_path: Path) -> Callable[[np.ndarray], Path]:
    """Writes mono sound at 16 kHz as a file."""

    def write(sound: np.ndarray) -> Path:
        path = tmp_path / "sound.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(np.rint(sound * 32767).astype("<i2").tobytes())
        return path

    return write


def asked(sound: Path, index: int, **fields: Any) -> Request:
    """A request for the held-out prompt of that number; any field may be given."""
    usual = {"prompt": held_out_captions()[index][0], "resolution": "128x128", "seed": 500 + index}
    return Request(**{**usual, "input_audio": sound, "match_audio_length": False, **fields})


def torch_frames(torch_pipeline: Any, request: Request, canvas: PixelShape) -> np.ndarray:
    """What the classes make of a request, from the noise that the runtime draws for its seed."""
    rate, preset = frame_rate(request.frames_per_second), load_preset(request.preset_name)
    assert request.seed is not None
    samples = samples_for_frames(canvas.frames, rate, SAMPLE_RATE)
    waveform = conditioning_waveform(read_audio(request.input_audio), samples)
    half, image = canvas.halved(), request.input_image and read_image(request.input_image)
    conditioning = Conditioning(
        text=TextContexts(*torch_pipeline.text(request.prompt)),
        audio_tokens=torch_pipeline.audio(waveform, audio_token_count(canvas.frames, rate)),
        first_frames=None if image is None else tuple(torch_pipeline.image(image, size) for size in (half, canvas)),
        image_strength=request.image_strength,
    )
    start = np.zeros((1, half.to_latent().tokens, torch_pipeline.channels), np.float32)
    latent = torch_pipeline.stage((1, preset.stage_1_sigmas), half, rate, start, conditioning, request.seed)
    latent = torch_pipeline.upsample(latent, half)
    latent = torch_pipeline.stage((2, preset.stage_2_sigmas), canvas, rate, latent, conditioning, request.seed)
    return rgb_to_yuv420(torch_pipeline.decode(latent, canvas).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "strength"), [("low", None), ("high", None), ("high", 1.0), ("medium", 0.7)])
def test_final_frames_are_those_of_the_classes(
    film: Film, torch_pipeline: Any, tmp_path: Path, preset: str, strength: float | None
) -> None:
    canvas = PixelShape(49, 128, 192)
    fields: dict[str, Any] = {"num_frames": canvas.frames, "resolution": "192x128", "video_quality": preset}
    if strength is not None:
        scene = Scene.draw(np.random.default_rng(7), held_out_captions()[3][1])
        closed = MouthTrack(np.zeros(1, np.float32), np.full(1, 0.5, np.float32))
        picture = tmp_path / "first.png"
        Image.fromarray(render(scene, closed, frame_times(1, 24), 256, 384)[0]).save(picture)
        fields |= {"input_image": picture, "image_strength": strength}
    request = asked(bundled_speech(), 3, **fields)
    found, expected = film(request), torch_frames(torch_pipeline, request, canvas)
    assert found.shape == expected.shape
    assert psnr(found, expected) >= 45


def test_the_mouth_follows_made_up_speech(film: Film, wav: Callable[[np.ndarray], Path]) -> None:
    frames = 73
    sound = speech(np.random.default_rng(78), frames / 24)
    opening = mouth_opening(rgb_pictures(film(asked(wav(sound), 10, num_frames=frames))))
    found = synchrony(opening, energy_envelope(sound, frames, 24))
    assert found.correlation >= 0.7
    assert abs(found.lag) <= 1


@pytest.mark.parametrize("index", [20, 33, 47])
def test_the_colours_are_those_of_the_prompt(film: Film, index: int) -> None:
    pictures = rgb_pictures(film(asked(bundled_speech(), index, num_frames=25, video_quality="low")))
    shown = {part: nearest_colour(colour) for part, colour in part_colours(pictures).items()}
    names = held_out_captions()[index][1]
    assert shown == {part: names[part] for part in PARTS}


def test_the_mouth_stays_shut_in_silence(film: Film, wav: Callable[[np.ndarray], Path]) -> None:
    silent = np.zeros(2 * SAMPLE_RATE, np.float32)
    opening = mouth_opening(rgb_pictures(film(asked(wav(silent), 5, num_frames=49))))
    assert (opening < CLOSED).mean() >= 0.95
