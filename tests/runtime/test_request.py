# SPDX-License-Identifier: Apache-2.0
"""The request's contract: twelve fields, their defaults and ranges, and one kind of refusal for all else."""

import json
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.errors import RequestError
from ltxrt.request import NAMED_SIZES, Request, Size

# The contract, written out once more: name to default; None where there is none to state.
DEFAULTS = {
    "input_image": None,
    "match_audio_length": True,
    "num_frames": 121,
    "resolution": "auto",
    "frames_per_second": 24,
    "image_strength": 0.7,
    "generate_audio": True,
    "video_quality": "high",
    "negative_prompt": (
        "color distortion, overexposure, static, blurry details, subtitles, style, artwork, painting, frame, still, "
        "dim overall tone, worst quality, low quality, JPEG compression artifacts, ugly, mutilated, extra fingers, "
        "poorly drawn hands, poorly drawn face, deformed, disfigured, malformed limbs, fused fingers, motionless "
        "frame, cluttered background, three legs, crowded background, walking backwards"
    ),
    "seed": None,
}
FIELDS = ("prompt", "input_audio", *DEFAULTS)
NAN, INF = float("nan"), float("inf")
NO_TEXT = [None, 1, 1.5, True, b"text", ["text"], {"text": 1}, pathlib.Path("text")]
NO_SWITCH = [None, 0, 1, 1.0, "true", "no", "", [], np.int64(1)]
NO_NUMBER = [None, True, False, "24", "", b"24", [24], {}, 1j, NAN, INF, -INF, np.nan, np.array([24, 24])]


def request(**fields):
    return Request(**{"prompt": "a face", "input_audio": "speech.wav", **fields})


def refused(**fields):
    with pytest.raises(RequestError) as caught:
        request(**fields)
    return caught.value


# --- what is taken ---


def test_defaults_are_the_contract():
    made = request()
    assert tuple(Request.model_fields) == FIELDS
    assert made.model_dump() == {"prompt": "a face", "input_audio": "speech.wav", **DEFAULTS}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x" * 10_000),
        ("prompt", " x\n"),
        ("num_frames", 9),
        ("num_frames", 120),  # any count, not only 8k + 1
        ("num_frames", 481),
        ("frames_per_second", 1),
        ("frames_per_second", 23.976),
        ("frames_per_second", 60),
        ("image_strength", 0),
        ("image_strength", 1),
        ("video_quality", "low"),
        ("video_quality", "medium"),
        ("video_quality", "maximum"),
        ("match_audio_length", False),
        ("generate_audio", False),
        ("negative_prompt", ""),
        ("negative_prompt", "x" * 10_000),
        ("input_image", "face.png"),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("seed", None),
    ],
)
def test_edges_are_taken_as_they_are(field, value):
    assert getattr(request(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_frames", 121.0, 121),  # an integer by JSON schema
        ("num_frames", np.int64(97), 97),
        ("frames_per_second", np.float32(12.5), 12.5),
        ("frames_per_second", Fraction(25, 2), 12.5),
        ("seed", np.uint64(7), 7),
        ("input_audio", pathlib.Path("a/b.wav"), "a/b.wav"),
        ("input_image", pathlib.Path("b.png"), "b.png"),
    ],
)
def test_numbers_and_paths_of_other_types_become_plain(field, value, expected):
    taken = getattr(request(**{field: value}), field)
    assert taken == expected
    assert type(taken) is type(expected)


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_named_sizes_are_on_the_grid(name):
    assert request(resolution=name).resolution == name
    assert all(side % 64 == 0 for side in NAMED_SIZES[name])


def test_named_sizes_are_the_contract():
    assert NAMED_SIZES == {
        "square_hd": (1024, 1024),
        "square": (512, 512),
        "portrait_4_3": (768, 1024),
        "portrait_16_9": (576, 1024),
        "landscape_4_3": (1024, 768),
        "landscape_16_9": (1024, 576),
    }


@pytest.mark.parametrize(
    "written", ["640x384", "640X384", "640 x 384", {"width": 640, "height": 384}, Size(width=640, height=384)]
)
def test_a_free_size_may_be_written_in_three_ways(written):
    assert request(resolution=written).resolution == Size(width=640, height=384)


def test_the_smallest_and_the_largest_size():
    assert request(resolution="128x2048").resolution == Size(width=128, height=2048)


@pytest.mark.parametrize("random", [None, -1, -1.0])
def test_a_seed_that_is_not_given_is_drawn(random):
    made = request(seed=random)
    assert made.seed is None
    drawn = {made.resolved_seed() for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_a_seed_that_is_given_is_kept():
    assert request(seed=7).resolved_seed() == 7


def test_the_preset_is_named_by_the_quality():
    assert request(video_quality="low").preset_name == "low"


def test_a_request_cannot_be_changed():
    made = request()
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        request(resolution="640x384").resolution.width = 64


# --- what is refused ---


@pytest.mark.parametrize("value", ["", " \n\t ", "x" * 10_001, "\ud800", *NO_TEXT])
def test_prompts_that_are_refused(value):
    assert refused(prompt=value).field == "prompt"


@pytest.mark.parametrize("value", ["", None, 1, b"a.wav", ["a.wav"], True])
def test_audio_that_is_refused(value):
    assert refused(input_audio=value).field == "input_audio"


@pytest.mark.parametrize("value", ["", 1, b"a.png", ["a.png"], True])
def test_images_that_are_refused(value):
    assert refused(input_image=value).field == "input_image"


@pytest.mark.parametrize("field", ["match_audio_length", "generate_audio"])
@pytest.mark.parametrize("value", NO_SWITCH)
def test_switches_that_are_refused(field, value):
    assert refused(**{field: value}).field == field


@pytest.mark.parametrize("value", [8, 482, -121, 0, 120.5, 1e300, *NO_NUMBER])
def test_frame_counts_that_are_refused(value):
    assert refused(num_frames=value).field == "num_frames"


@pytest.mark.parametrize("value", [0, 0.999, 60.001, -24, 1e300, *NO_NUMBER])
def test_frame_rates_that_are_refused(value):
    assert refused(frames_per_second=value).field == "frames_per_second"


@pytest.mark.parametrize("value", [-0.001, 1.001, 2, *NO_NUMBER])
def test_image_strengths_that_are_refused(value):
    assert refused(image_strength=value).field == "image_strength"


@pytest.mark.parametrize("value", [-2, 2**63, 0.5, *NO_NUMBER[1:]])
def test_seeds_that_are_refused(value):
    assert refused(seed=value).field == "seed"


@pytest.mark.parametrize("value", ["", "High", "ultra", None, 2, ["high"], b"high"])
def test_qualities_that_are_refused(value):
    error = refused(video_quality=value)
    assert error.field == "video_quality"
    assert error.allowed == "low, medium, high, maximum"


@pytest.mark.parametrize("value", ["x" * 10_001, *NO_TEXT])
def test_negative_prompts_that_are_refused(value):
    assert refused(negative_prompt=value).field == "negative_prompt"


@pytest.mark.parametrize(
    "value",
    [
        "640x383",
        "64x640",
        "640x2112",
        "640x",
        "640",
        "640x384x3",
        "-640x384",
        "640x384\n",
        "999999x64",
        "Auto",
        "1080p",
        "",
        None,
        640,
        (640, 384),
        {"width": 640},
        {"width": 640, "height": 384, "depth": 3},
        {"width": "640", "height": 384},
        {"width": 640.5, "height": 384},
        {"width": NAN, "height": 384},
        {"width": True, "height": 384},
    ],
)
def test_sizes_that_are_refused_are_shown_as_they_came(value):
    error = refused(resolution=value)
    assert error.field == "resolution"
    assert error.value is value or error.value == value
    assert "WIDTHxHEIGHT" in error.allowed


@pytest.mark.parametrize("field", ["prompt", "input_audio"])
def test_a_missing_field_is_named(field):
    given_fields = {"prompt": "a face", "input_audio": "speech.wav"}
    del given_fields[field]
    with pytest.raises(RequestError, match=f"^{field}: None is not allowed; allowed: "):
        Request(**given_fields)


@pytest.mark.parametrize("field", ["steps", "Prompt", "self", "fields", "a\nb", "", "x" * 500, "__class__"])
def test_an_unknown_field_is_named_and_the_known_ones_are_listed(field):
    error = refused(**{field: 3})
    assert (error.field, error.value) == (field, 3)
    assert all(name in error.allowed for name in FIELDS)
    assert len(str(error).splitlines()) == 1


def test_the_message_is_one_line_with_all_there_is_to_know():
    error = refused(num_frames=8)
    assert str(error) == "num_frames: 8 is not allowed; allowed: a whole number from 9 to 481"
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize("field", ["num_frames", "frames_per_second", "image_strength", "seed", "resolution"])
def test_a_number_too_long_to_write_is_refused(field):
    assert refused(**{field: 10**5000}).field == field


wild = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.fractions()
    | st.from_regex(r"\A[0-9]{1,5}x[0-9]{1,5}\Z"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["width", "height"]), inner),
    max_leaves=4,
)


def made_or_refused(fields):
    try:
        return Request(**fields)
    except RequestError as error:
        return error


@given(fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(), wild, max_size=4), whole=st.booleans())
def test_anything_at_all_is_a_request_or_a_request_error(fields, whole):
    made = made_or_refused({**({"prompt": "a face", "input_audio": "speech.wav"} if whole else {}), **fields})
    if isinstance(made, RequestError):
        assert made.field in {*fields, "prompt", "input_audio"}
        assert made.allowed
        assert len(str(made).splitlines()) == 1
        return
    assert made.prompt
    assert 9 <= made.num_frames <= 481
    assert 1 <= made.frames_per_second <= 60
    assert 0 <= made.image_strength <= 1
    assert made.seed is None or 0 <= made.seed < 2**63
    width, height = (
        (made.resolution.width, made.resolution.height)
        if isinstance(made.resolution, Size)
        else NAMED_SIZES.get(made.resolution, (64 * 2, 64 * 2))
    )
    assert all(128 <= side <= 2048 and side % 64 == 0 for side in (width, height))


# --- the JSON schema ---


def test_the_schema_states_the_contract():
    schema = Request.model_json_schema()
    properties = schema["properties"]
    assert tuple(properties) == FIELDS
    assert schema["required"] == ["prompt", "input_audio"]
    assert schema["additionalProperties"] is False
    assert schema["description"] == "One clip to make."
    assert {name: properties[name]["default"] for name in DEFAULTS} == DEFAULTS
    assert all(properties[name]["description"] for name in FIELDS)
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("field", "kind", "least", "most"),
    [
        ("num_frames", "integer", 9, 481),
        ("frames_per_second", "number", 1, 60),
        ("image_strength", "number", 0, 1),
        ("seed", "integer", 0, 2**63 - 1),
    ],
)
def test_the_schema_states_ranges(field, kind, least, most):
    entry = Request.model_json_schema()["properties"][field]
    entry = next((option for option in entry.get("anyOf", ()) if option["type"] == kind), entry)
    assert (entry["type"], entry["minimum"], entry["maximum"]) == (kind, least, most)


def test_the_schema_states_the_sizes():
    schema = Request.model_json_schema()
    named, free = schema["properties"]["resolution"]["anyOf"]
    assert named["enum"] == ["auto", *NAMED_SIZES]
    size = schema["$defs"][free["$ref"].rsplit("/", 1)[1]]
    for side in ("width", "height"):
        assert size["properties"][side] | {"title": ""} == {
            "type": "integer",
            "minimum": 128,
            "maximum": 2048,
            "multipleOf": 64,
            "title": "",
        }


def test_a_request_survives_json():
    made = request(resolution="640x384", seed=5, frames_per_second=23.976)
    assert Request(**json.loads(made.model_dump_json())) == made
    assert math.isclose(made.frames_per_second, 23.976)
