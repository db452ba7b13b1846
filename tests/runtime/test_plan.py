# SPDX-License-Identifier: Apache-2.0
"""Requests resolved: exact frames and samples for every rate, sizes within the budget, and what is refused."""

import dataclasses
import math
import re
import wave
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ltxrt import plan as plan_module
from ltxrt.errors import BundleError, MediaError, RequestError
from ltxrt.media import AudioTrack, for_output, read_audio
from ltxrt.plan import auto_size, plan_clip
from ltxrt.request import NAMED_SIZES, Request
from ltxrt.shapes import PixelShape
from ltxrt.testing import fake_pipeline

RATES = {
    1: Fraction(1),
    12.5: Fraction(25, 2),
    23.976: Fraction(24000, 1001),
    24: Fraction(24),
    25: Fraction(25),
    29.97: Fraction(30000, 1001),
    30: Fraction(30),
    59.94: Fraction(60000, 1001),
    60: Fraction(60),
}
SAMPLE_RATES = (8_000, 16_000, 44_100, 48_000)


@pytest.fixture(scope="module")
def bundle():
    return fake_pipeline().bundle


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    """``wav(samples, sample_rate, channels)``: the path of 16-bit noise, written by the standard library."""
    folder = tmp_path_factory.mktemp("wav")

    def write(samples, sample_rate, channels=1):
        path = folder / f"{samples}-{sample_rate}-{channels}.wav"
        if not path.exists():
            values = np.random.default_rng(samples).integers(-9000, 9000, (samples, channels), np.int16)
            with wave.open(str(path), "wb") as file:
                file.setnchannels(channels)
                file.setsampwidth(2)
                file.setframerate(sample_rate)
                file.writeframes(values.tobytes())
        return path

    return write


def planned(bundle, path, **fields):
    return plan_clip(Request(prompt="a face", input_audio=path, **fields), bundle)


# --- length ---


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sample_rate", SAMPLE_RATES)
@pytest.mark.parametrize("seconds", [0.4, 0.7003, 2.5, 4.91, 9])
def test_frames_and_samples_are_exact(bundle, wav, monkeypatch, seconds, sample_rate, channels):
    monkeypatch.setattr(plan_module, "read_audio", cache(read_audio))  # each file is opened once for all rates
    samples = round(seconds * sample_rate)
    path = wav(samples, sample_rate, channels)
    output_rate = sample_rate if sample_rate in (44_100, 48_000) else 48_000
    for decimal, rate in RATES.items():
        for match in (True, False):
            frames = math.ceil(Fraction(samples, sample_rate) * rate) if match else 57
            fields = {"frames_per_second": decimal, "match_audio_length": match, "num_frames": 57}
            if frames > 481:
                with pytest.raises(MediaError, match=f"takes {frames} frames at"):
                    planned(bundle, path, **fields)
                continue
            plan = planned(bundle, path, **fields)
            assert (plan.frames, plan.rate) == (frames, rate)
            assert plan.duration == frames / rate
            assert plan.canvas.frames % 8 == 1
            assert max(9, frames) <= plan.canvas.frames <= max(9, frames + 7)
            assert (plan.source.sample_count, plan.source.sample_rate) == (samples, sample_rate)
            track = plan.output_audio
            assert (track.sample_rate, track.channels) == (output_rate, channels)
            assert abs(track.sample_count - frames / rate * output_rate) <= Fraction(1, 2)


@pytest.mark.parametrize("frames", [9, 10, 16, 17, 120, 121, 480, 481])
def test_any_number_of_frames_is_kept(bundle, wav, frames):
    plan = planned(bundle, wav(3_200, 8_000), match_audio_length=False, num_frames=frames)
    assert plan.frames == frames
    assert plan.canvas.frames == min(count for count in range(9, 490, 8) if count >= frames)


def test_one_sample_more_is_one_frame_more(bundle, wav):
    assert planned(bundle, wav(48_000, 48_000)).frames == 24
    assert planned(bundle, wav(48_001, 48_000)).frames == 25
    assert planned(bundle, wav(1, 48_000)).frames == 1


@pytest.mark.parametrize("decimal", RATES)
def test_audio_that_is_too_long_names_the_longest_that_fits(bundle, monkeypatch, decimal):
    def track(samples):
        return lambda path: AudioTrack(np.zeros((1, samples), np.float32), 8_000)

    longest = math.floor(481 / RATES[decimal] * 8_000)
    monkeypatch.setattr(plan_module, "read_audio", track(longest + 1))
    with pytest.raises(MediaError) as caught:
        planned(bundle, "speech.wav", frames_per_second=decimal)
    assert (caught.value.field, caught.value.value) == ("input_audio", "speech.wav")
    assert len(str(caught.value).splitlines()) == 1
    named = Fraction(re.search(r"at most ([0-9.]+) s", caught.value.allowed)[1])
    assert 0 <= Fraction(longest, 8_000) - named < Fraction(1, 500)
    for samples in (longest, math.floor(named * 8_000)):
        monkeypatch.setattr(plan_module, "read_audio", track(samples))
        assert planned(bundle, "speech.wav", frames_per_second=decimal).frames == 481
    monkeypatch.setattr(plan_module, "read_audio", track(longest + 1))
    assert planned(bundle, "speech.wav", frames_per_second=decimal, match_audio_length=False).frames == 121


# --- sound ---


@pytest.mark.parametrize("sample_rate", [44_100, 48_000])
def test_the_callers_own_samples_go_into_the_file(bundle, wav, sample_rate):
    plan = planned(bundle, wav(sample_rate // 2 + 1, sample_rate, 2), frames_per_second=25)
    count = plan.source.sample_count
    np.testing.assert_array_equal(plan.output_audio.samples[:, :count], plan.source.samples)
    np.testing.assert_array_equal(plan.output_audio.samples[:, count:], 0)
    assert plan.output_audio.sample_count > count


@pytest.mark.parametrize("decimal", [23.976, 24, 59.94])
@pytest.mark.parametrize("sample_rate", [8_000, 16_000])
def test_other_rates_are_resampled_once_and_then_cut(bundle, wav, sample_rate, decimal):
    path = wav(round(2.71 * sample_rate), sample_rate)
    for frames in (9, 31, 121):
        plan = planned(bundle, path, frames_per_second=decimal, match_audio_length=False, num_frames=frames)
        whole = for_output(plan.source).samples[0]
        found = plan.output_audio.samples[0]
        faded = 240 if len(found) < len(whole) else 0  # the last 5 ms of a cut
        kept = min(len(whole), len(found)) - faded
        np.testing.assert_allclose(found[:kept], whole[:kept], atol=1e-6)
        if faded:
            fade = np.linspace(1, 0, faded + 1)[1:]
            np.testing.assert_allclose(found[kept:], whole[kept : len(found)] * fade, atol=1e-6)
        else:
            np.testing.assert_array_equal(found[kept:], 0)


def test_the_whole_track_conditions_the_clip_even_where_it_is_cut(bundle, wav):
    plan = planned(bundle, wav(96_000, 48_000), match_audio_length=False, num_frames=9)
    assert plan.source.sample_count == 96_000
    assert plan.output_audio.sample_count == 18_000


def test_no_track_is_none(bundle, wav):
    plan = planned(bundle, wav(48_000, 48_000), generate_audio=False)
    assert plan.output_audio is None
    assert plan.source.sample_count == 48_000
    assert plan.notes == ()


# --- notes ---


@pytest.mark.parametrize(
    ("samples", "fields", "note"),
    [
        (48_000, {}, None),
        (48_480, {}, "audio padded with 0.032 s of silence to end with the video"),
        (48_000, {"match_audio_length": False}, "audio padded with 4.042 s of silence to end with the video"),
        (480_000, {"match_audio_length": False}, "audio cut by 4.958 s to end with the video"),
        # 1001 / 24000 s a frame is 2002 samples: one missing is 0.02 ms, which is nothing to speak of.
        (48_047, {"frames_per_second": 23.976}, None),
    ],
)
def test_what_happened_to_the_sound_is_noted(bundle, wav, samples, fields, note):
    assert planned(bundle, wav(samples, 48_000), **fields).notes == (() if note is None else (note,))


@pytest.mark.parametrize(("prompt", "noted"), [("hands", True), ("", False), (None, False)])
def test_a_negative_prompt_that_does_nothing_is_noted(bundle, wav, prompt, noted):
    fields = {} if prompt is None else {"negative_prompt": prompt}
    notes = planned(bundle, wav(48_000, 48_000), **fields).notes
    assert ["negative_prompt has no effect" in note for note in notes] == [True] * noted


# --- seed and preset ---


def test_the_seed_is_settled_once(bundle, wav):
    assert planned(bundle, wav(48_000, 48_000), seed=12).seed == 12
    drawn = {planned(bundle, wav(48_000, 48_000)).seed for _ in range(3)}
    assert len(drawn) == 3


@pytest.mark.parametrize(("quality", "crf"), [("low", 28), ("medium", 23), ("high", 19), ("maximum", 14)])
def test_the_quality_chooses_the_preset(bundle, wav, quality, crf):
    preset = planned(bundle, wav(48_000, 48_000), video_quality=quality).preset
    assert (preset.name, preset.crf) == (quality, crf)


def test_a_preset_that_the_bundle_lacks_is_refused_before_any_media_is_read(bundle):
    presets = {name: keys for name, keys in bundle.manifest.presets.items() if name != "low"}
    lacking = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"presets": presets}))
    with pytest.raises(RequestError, match="medium, high, maximum in this bundle") as caught:
        planned(lacking, "no such file", video_quality="low")
    assert caught.value.field == "video_quality"


def test_a_schedule_that_the_checkpoint_was_not_distilled_for_is_refused(bundle):
    other = dataclasses.replace(bundle, sigmas=((1.0, 0.5, 0.0), bundle.sigmas[1]))
    with pytest.raises(BundleError, match="preset high, stage 1: sigmas"):
        planned(other, "no such file")


@pytest.mark.parametrize(("field", "error"), [("input_audio", MediaError), ("input_image", MediaError)])
def test_media_that_is_not_there_is_refused_by_field(bundle, wav, tmp_path, field, error):
    fields = {"input_audio": wav(48_000, 48_000), field: tmp_path / "missing"}
    with pytest.raises(error, match="does not exist") as caught:
        plan_clip(Request(prompt="a face", **fields), bundle)
    assert caught.value.field == field


# --- size ---


def uncapped(bundle):
    model = bundle.manifest.model.model_copy(update={"auto_pixels": None})
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("quality", "size"), [("low", (768, 448)), ("medium", (1024, 576)), ("high", (1024, 576)), ("maximum", (1280, 704))]
)
def test_without_an_image_the_size_is_landscape(bundle, wav, quality, size):
    canvas = planned(uncapped(bundle), wav(48_000, 48_000), video_quality=quality).canvas
    assert (canvas.width, canvas.height) == size


@pytest.mark.parametrize(
    ("pixels", "size"),
    [((640, 360), (1024, 576)), ((360, 640), (576, 1024)), ((500, 500), (768, 768)), ((400, 300), (896, 640))],
)
def test_the_image_gives_its_aspect(bundle, wav, tmp_path, pixels, size):
    Image.new("RGB", pixels, (10, 200, 90)).save(tmp_path / "face.png")
    plan = planned(uncapped(bundle), wav(48_000, 48_000), input_image=tmp_path / "face.png")
    assert (plan.canvas.width, plan.canvas.height) == size
    assert plan.image.shape == (pixels[1], pixels[0], 3)


def test_a_bundle_may_lower_the_budget_but_not_raise_it(bundle, wav):
    assert planned(bundle, wav(48_000, 48_000)).canvas == PixelShape(25, 64 * 2, 64 * 2)
    model = bundle.manifest.model.model_copy(update={"auto_pixels": 10**7})
    large = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"model": model}))
    assert planned(large, wav(48_000, 48_000)).canvas == PixelShape(25, 576, 1024)


@pytest.mark.parametrize("resolution", [*NAMED_SIZES, "640x384"])
def test_a_size_that_is_asked_for_is_taken_whatever_the_image(bundle, wav, tmp_path, resolution):
    Image.new("RGB", (64, 320)).save(tmp_path / "tall.png")
    plan = planned(bundle, wav(48_000, 48_000), resolution=resolution, input_image=tmp_path / "tall.png")
    assert (plan.canvas.width, plan.canvas.height) == NAMED_SIZES.get(resolution, (640, 384))


@given(
    aspect=st.fractions(min_value=Fraction(1, 16), max_value=16, max_denominator=4000),
    budget=st.integers(128 * 128, 2048 * 2048),
)
@example(aspect=Fraction(16, 9), budget=128 * 128)
@example(aspect=Fraction(1, 1), budget=2048 * 2048)
def test_auto_sizes_are_the_largest_of_about_that_aspect(aspect, budget):
    width, height = auto_size(aspect, budget)
    assert width % 64 == height % 64 == 0
    assert min(width, height) >= 128
    assert max(width, height) <= 2048
    assert budget / 2 <= width * height <= budget

    def off(size):
        return max(Fraction(*size) / aspect, aspect / Fraction(*size))

    every = [(w, h) for w in range(128, 2049, 64) for h in range(128, 2049, 64) if budget / 2 <= w * h <= budget]
    close = [size for size in every if off(size) <= Fraction(105, 100)]
    if close:
        assert off((width, height)) <= Fraction(105, 100)
        assert width * height == max(w * h for w, h in close)
    else:
        assert off((width, height)) == min(map(off, every))


@pytest.mark.parametrize(("budget", "size"), [(1, (128, 128)), (10**9, (2048, 2048))])
def test_budgets_beyond_all_sizes_give_the_nearest(budget, size):
    assert auto_size(Fraction(1), budget) == size
