# SPDX-License-Identifier: Apache-2.0
"""The result says what was made, in plain values, and what reading the file back must find."""

import dataclasses
import json
from fractions import Fraction

import pytest

from ltxrt.readback import Expectation
from ltxrt.result import STAGES, Result

MADE = Result(
    seed=2**63 - 1,
    frames=119,
    frames_generated=121,
    width=640,
    height=384,
    rate=Fraction(24000, 1001),
    video_quality="high",
    model="tiny",
    engine="onnxruntime-cpu",
    image_strength=0.7,
    audio_samples=238_238,
    audio_rate=48_000,
    notes=("a note", "another"),
    stage_seconds={"plan": 0.123456, "decode": 2.0},
    backend_seconds={"denoiser": 1.23456},
    marks_seconds={"first_fragment": 1.5},
    wall_seconds=9.926583,
)


def test_durations_and_factors():
    assert MADE.duration_seconds == pytest.approx(119 * 1001 / 24000, rel=1e-12)
    assert MADE.real_time_factor == pytest.approx(9.926583 / (119 * 1001 / 24000), rel=1e-12)


def test_json_holds_every_field_as_a_plain_value():
    plain = json.loads(json.dumps(MADE.as_json(), allow_nan=False))
    assert plain == MADE.as_json()
    assert plain["seed"] == 2**63 - 1
    assert plain["frames_per_second"] == "24000/1001"
    assert plain["notes"] == ["a note", "another"]
    assert plain["negative_prompt_used"] is False
    assert plain["stage_seconds"] == {"plan": 0.1235, "decode": 2.0}
    assert plain["duration_seconds"] == MADE.duration_seconds
    named_otherwise = {"rate": "frames_per_second"}
    for field in dataclasses.fields(Result):
        assert named_otherwise.get(field.name, field.name) in plain


@pytest.mark.parametrize(("samples", "rate"), [(238_238, 48_000), (None, None)])
def test_the_expectation_is_the_result(samples, rate):
    made = dataclasses.replace(MADE, audio_samples=samples, audio_rate=rate)
    assert made.expectation == Expectation(
        frames=119, frame_rate=Fraction(24000, 1001), width=640, height=384, audio_samples=samples, audio_rate=rate
    )


def test_a_clip_without_sound_and_image_is_plain_too():
    quiet = dataclasses.replace(MADE, audio_samples=None, audio_rate=None, image_strength=None, notes=())
    assert json.loads(json.dumps(quiet.as_json())) == quiet.as_json()


def test_a_result_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MADE.seed = 0


def test_stages_are_listed_in_order():
    assert STAGES == ("load", "encode", "denoise_1", "upsample", "denoise_2", "decode")
