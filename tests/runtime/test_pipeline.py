# SPDX-License-Identifier: Apache-2.0
"""The whole way on fake and toy networks: exact clips, events in order, and nothing left behind by what ends early."""

import dataclasses
import hashlib
import io
import json
import math
import subprocess
import sys
import types
import wave
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from ltxrt.errors import EngineError, MediaError, OutputError, RequestError, VerificationError
from ltxrt.pipeline import Pipeline
from ltxrt.preset import load_preset
from ltxrt.readback import check_clip
from ltxrt.request import Request
from ltxrt.result import STAGES, Fragment, Progress, Result
from ltxrt.testing import FakeCapture, fake_engines, fake_pipeline

NTSC = {23.976: Fraction(24000, 1001), 29.97: Fraction(30000, 1001), 59.94: Fraction(60000, 1001)}
RATES = {**{rate: Fraction(rate) for rate in (1, 12.5, 24, 25, 30, 60)}, **NTSC}


@pytest.fixture(scope="module")
def pipeline():
    return fake_pipeline()


@pytest.fixture
def speech(tmp_path_factory):
    """Half a second and a bit of 44.1 kHz noise."""
    path = tmp_path_factory.mktemp("media") / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(np.random.default_rng(0).integers(-5000, 5000, 23_333, np.int16).tobytes())
    return path


@pytest.fixture
def face(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "face.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return path


def request(speech, **fields):
    return Request(**{"prompt": "a face", "input_audio": speech, "seed": 1, "resolution": "128x128", **fields})


def kept_engines(pipeline, **changed):
    """A pipeline whose engines the test holds: ``(pipeline, engines)``."""
    engines = dataclasses.replace(fake_engines(), **changed)
    store = types.SimpleNamespace(backend=pipeline.store.backend, engines=lambda preset: engines)
    return dataclasses.replace(pipeline, store=store), engines


class Failing:
    """An engine that raises instead of its ``turn``-th run or replay."""

    def __init__(self, engine, error, turn=1):
        self._engine, self._error, self._left = engine, error, turn
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs

    def run(self, feeds):
        self._left -= 1
        if self._left <= 0:
            raise self._error
        return self._engine.run(feeds)

    def capture(self, feeds):
        return FakeCapture(self, {name: value.copy() for name, value in feeds.items()})


# --- clips ---


@pytest.mark.parametrize("decimal", RATES)
@pytest.mark.parametrize("match", [True, False])
@pytest.mark.parametrize("sound", [True, False])
def test_clips_are_exact_at_every_rate(pipeline, speech, face, tmp_path, decimal, match, sound):
    rate, output = RATES[decimal], tmp_path / "clip.mp4"
    frames = math.ceil(Fraction(23_333, 44_100) * rate) if match else 11
    for image in (None, face):
        made = request(
            speech,
            frames_per_second=decimal,
            match_audio_length=match,
            num_frames=11,
            generate_audio=sound,
            input_image=image,
        )
        result = pipeline.render(made, output)
        report = check_clip(output, result.expectation)
        assert report.ok, report.problems
        assert (report.frames, report.frame_rate, report.width, report.height) == (frames, rate, 128, 128)
        assert report.video_duration_seconds == frames / rate
        assert report.ai_marked
        assert report.audio_samples == (round(frames / rate * 44_100) if sound else None)
        assert result.image_strength == (None if image is None else 0.7)
        assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("decimal", [1, 23.976, 60])
@pytest.mark.parametrize("frames", [9, 33])
def test_the_stream_of_bytes_is_a_clip(pipeline, speech, decimal, frames):
    pieces = list(
        pipeline.generate(request(speech, frames_per_second=decimal, match_audio_length=False, num_frames=frames))
    )
    assert len(pieces) > 1
    assert all(pieces)
    with av.open(io.BytesIO(b"".join(pieces))) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [index / RATES[decimal] for index in range(frames)]
    with av.open(io.BytesIO(b"".join(pieces))) as container:
        first = next(container.decode(audio=0))
    assert first.pts == 0


def test_the_first_piece_plays_alone(pipeline, speech):
    stream = pipeline.generate(request(speech, match_audio_length=False, num_frames=41))
    with av.open(io.BytesIO(next(stream))) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert pictures
    assert all(picture.shape == (128, 128, 3) for picture in pictures)
    assert np.ptp(pictures[0].astype(int)) <= 2  # grey
    stream.close()


# --- events ---


def test_events_come_in_the_order_of_the_stages(pipeline, speech):
    events = list(pipeline.events(request(speech, match_audio_length=False, num_frames=41)))
    assert isinstance(events[-1], Result)
    assert sum(isinstance(event, Result) for event in events) == 1
    progress = [event for event in events if isinstance(event, Progress)]
    order = [STAGES.index(event.stage) for event in progress]
    assert order == sorted(order)
    assert set(order) == set(range(len(STAGES)))
    for stage, steps in {"denoise_1": 8, "denoise_2": 3, "upsample": 1, "encode": 1}.items():
        assert [(event.step, event.steps) for event in progress if event.stage == stage] == [
            (step, steps) for step in range(1, steps + 1)
        ]
    assert progress[:2] == [Progress("load", 0, 1), Progress("load", 1, 1)]
    decoded = [event for event in progress if event.stage == "decode"]
    assert [event.step for event in decoded] == sorted({event.step for event in decoded})
    assert (decoded[-1].step, {event.steps for event in decoded}) == (41, {41})
    first_fragment = next(index for index, event in enumerate(events) if isinstance(event, Fragment))
    assert events.index(decoded[0]) == first_fragment + 1


@pytest.mark.parametrize("quality", ["low", "medium", "high", "maximum"])
def test_every_preset_takes_its_own_steps(pipeline, speech, quality):
    preset, (kept, engines) = load_preset(quality), kept_engines(pipeline)
    made = request(speech, video_quality=quality, match_audio_length=False, num_frames=9)
    *_, result = kept.events(made)
    taken = [(float(call["sigma"][0]), float(call["sigma_next"][0])) for call in engines.denoiser.calls]
    expected = [*pairwise(preset.stage_1_sigmas), *pairwise(preset.stage_2_sigmas)]
    np.testing.assert_array_equal(taken, np.float32(expected))
    assert result.video_quality == quality


def test_both_stages_and_the_encoders_see_their_own_sizes(pipeline, speech, face):
    kept, engines = kept_engines(pipeline)
    made = request(speech, resolution="192x128", match_audio_length=False, num_frames=12, input_image=face)
    list(kept.generate(made))
    assert [call["image"].shape[3:] for call in engines.image_encoder.calls] == [(64, 96), (128, 192)]
    tokens = [call["latent"].shape[1] for call in engines.denoiser.calls]
    assert tokens == [3 * 2 * 3] * 8 + [3 * 4 * 6] * 3  # 12 frames take 17, which are 3 latents
    assert engines.upsampler.calls[0]["latent"].shape == (1, 128, 3, 2, 3)
    assert [call["latent"].shape[2] for call in engines.video_decoder.calls] == [1, 1, 1]
    assert len(engines.text_encoder.calls) == len(engines.audio_encoder.calls) == 1


def test_the_result_tells_what_was_done(pipeline, speech):
    made = request(speech, seed=77, prompt="word " * 30, negative_prompt="hands", frames_per_second=29.97)
    *_, result = pipeline.events(made)
    plain = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert plain["seed"] == 77
    assert (plain["frames"], plain["frames_generated"]) == (16, 17)
    assert plain["frames_per_second"] == "30000/1001"
    assert plain["model"] == "fake"
    assert plain["engine"] == "onnxruntime-cpu"
    assert [note.split(" ")[0] for note in plain["notes"]] == ["negative_prompt", "audio", "prompt"]
    assert plain["notes"][-1] == "prompt cut by 15 tokens to the model's context"
    stages = ["plan", "load", "encode", "denoise_1", "upsample", "denoise_2", "decode", "mux"]
    assert list(plain["stage_seconds"]) == stages
    assert sum(plain["stage_seconds"].values()) <= plain["wall_seconds"] + 1e-3
    networks = {"text_encoder", "audio_encoder", "denoiser", "upsampler", "video_decoder"}
    assert set(plain["backend_seconds"]) == {*networks, "media_encoders"}


def test_a_seed_that_was_drawn_is_told(pipeline, speech):
    seeds = {list(pipeline.events(request(speech, seed=None)))[-1].seed for _ in range(2)}
    assert len(seeds) == 2


# --- streaming ---


def test_the_first_bytes_leave_before_the_rest_is_decoded(pipeline, speech):
    kept, engines = kept_engines(pipeline)
    made = request(speech, match_audio_length=False, num_frames=121)
    calls = []
    for event in kept.events(made):
        if isinstance(event, Fragment):
            calls.append(len(engines.video_decoder.calls))
        result = event
    # 16 latents, of which the first and the last come alone.
    chunks = 2 + math.ceil(14 / load_preset("high").decode_chunk_latents)
    assert len(engines.video_decoder.calls) == chunks > 2
    assert calls[:2] == [1, 2]
    marks = result.marks_seconds
    assert marks["last_denoise_step"] < marks["first_fragment"] < marks["last_chunk_decoded"] < result.wall_seconds


def test_nothing_runs_until_it_is_asked_for(pipeline, speech):
    kept, engines = kept_engines(pipeline)
    events = kept.events(request(speech))
    assert engines.text_encoder.calls == []
    for event in events:
        if isinstance(event, Progress) and event.stage == "denoise_1":
            break
    assert len(engines.denoiser.calls) == 1
    events.close()
    assert len(engines.denoiser.calls) == 1


@pytest.mark.parametrize("method", ["events", "generate", "render_events"])
def test_a_closed_clip_stops(pipeline, speech, tmp_path, method):
    kept, engines = kept_engines(pipeline)
    output = () if method != "render_events" else (tmp_path / "clip.mp4",)
    running = getattr(kept, method)(request(speech, match_audio_length=False, num_frames=121), *output)
    for _ in running:
        if engines.video_decoder.calls:
            break
    assert len(engines.video_decoder.calls) == 1
    assert bool(list(tmp_path.iterdir())) == (method == "render_events")
    running.close()
    assert list(running) == []
    assert len(engines.video_decoder.calls) == 1
    assert list(tmp_path.iterdir()) == []


# --- refusals ---


@pytest.mark.parametrize(
    ("field", "path", "problem"),
    [
        ("input_audio", "missing.wav", "does not exist"),
        ("input_image", "missing.png", "does not exist"),
        ("input_audio", __file__, "is not audio"),
    ],
)
@pytest.mark.parametrize("method", ["events", "generate", "render_events", "render"])
def test_bad_media_is_refused_at_the_call(pipeline, speech, tmp_path, method, field, path, problem):
    arguments = (tmp_path / "clip.mp4",) if method.startswith("render") else ()
    made = request(speech, **{field: path})
    with pytest.raises(MediaError, match=problem):
        getattr(pipeline, method)(made, *arguments)  # not consumed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["render_events", "render"])
def test_a_destination_that_cannot_be_written_is_refused_at_the_call(pipeline, speech, tmp_path, method):
    with pytest.raises(OutputError, match="does not exist"):
        getattr(pipeline, method)(request(speech), tmp_path / "no folder" / "clip.mp4")
    with pytest.raises(OutputError, match="is a folder"):
        getattr(pipeline, method)(request(speech), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_is_never_started_writes_nothing(pipeline, speech, tmp_path):
    events = pipeline.render_events(request(speech), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_a_preset_that_the_bundle_lacks(toy_bundle, speech):
    pipeline = Pipeline.open(toy_bundle, threads=1)
    with pytest.raises(RequestError, match="low, high in this bundle"):
        pipeline.events(request(speech, video_quality="maximum"))


# --- failures on the way ---


@pytest.mark.parametrize("error", [EngineError("out of memory"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize(
    ("network", "turn"),
    [
        ("text_encoder", 1),
        ("denoiser", 1),
        ("denoiser", 10),
        ("upsampler", 1),
        ("video_decoder", 1),
        ("video_decoder", 2),
    ],
)
def test_what_fails_on_the_way_leaves_nothing(pipeline, speech, tmp_path, network, turn, error):
    failing = Failing(getattr(fake_engines(), network), error, turn)
    kept, _ = kept_engines(pipeline, **{network: failing})
    output = tmp_path / "clip.mp4"
    output.write_bytes(b"an earlier clip")
    with pytest.raises(type(error)):
        kept.render(request(speech, match_audio_length=False, num_frames=41), output)
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_bytes() == b"an earlier clip"


def test_a_clip_that_is_not_what_it_should_be_is_not_kept(pipeline, speech, tmp_path, monkeypatch):
    real = Result.expectation.fget
    other = property(lambda self: dataclasses.replace(real(self), frames=self.frames + 1))
    monkeypatch.setattr(Result, "expectation", other)
    with pytest.raises(VerificationError, match="frames"):
        pipeline.render(request(speech), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_between_two_events_leaves_nothing(pipeline, speech, tmp_path):
    def interrupted():
        for event in pipeline.render_events(request(speech), tmp_path / "clip.mp4"):
            if isinstance(event, Progress) and event.stage == "decode":
                raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# --- the same on networks that run ---


@pytest.fixture
def toy(toy_bundle):
    return Pipeline.open(toy_bundle, threads=1)


def test_toy_networks_make_a_clip(toy, speech, face, tmp_path):
    output = tmp_path / "clip.mp4"
    made = request(speech, resolution="auto", input_image=face, match_audio_length=False, num_frames=25)
    result = toy.render(made, output)
    report = check_clip(output, result.expectation)
    assert report.ok, report.problems
    assert (result.model, result.engine) == ("toy", "onnxruntime-cpu")
    assert result.width * result.height <= 128 * 192
    assert "prompt cut" not in " ".join(result.notes)


def test_the_first_frame_holds_at_full_strength(toy, speech, tmp_path):
    path = tmp_path / "white.png"
    Image.new("RGB", (128, 128), "white").save(path)
    pictures = {}
    for strength in (1.0, 0.0):
        made = request(speech, input_image=path, image_strength=strength, match_audio_length=False, num_frames=17)
        with av.open(io.BytesIO(b"".join(toy.generate(made)))) as container:
            pictures[strength] = [frame.to_ndarray()[:128].mean() for frame in container.decode(video=0)]
    # The toy encoder's token is the picture's mean, 1, and the toy decoder shows 128 + 64 of it.
    assert abs(pictures[1.0][0] - 192) < 3
    assert abs(pictures[0.0][0] - 192) > 10
    assert abs(pictures[1.0][-1] - 192) > 10


RENDER = """
import hashlib, sys
from ltxrt.pipeline import Pipeline
from ltxrt.request import Request
bundle, audio, seed = sys.argv[1:]
request = Request(prompt="a face", input_audio=audio, seed=int(seed), resolution="128x128")
print(hashlib.sha256(b"".join(Pipeline.open(bundle).generate(request))).hexdigest())
"""


def test_the_same_request_gives_the_same_bytes_in_another_process(toy, toy_bundle, speech):
    def elsewhere(seed):
        command = [sys.executable, "-c", RENDER, str(toy_bundle), str(speech), str(seed)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    here = hashlib.sha256(b"".join(toy.generate(request(speech, seed=3)))).hexdigest()
    assert elsewhere(3) == here
    assert elsewhere(4) != here
