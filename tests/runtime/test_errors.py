# SPDX-License-Identifier: Apache-2.0
"""The exception tree: exit codes, builtins as second bases, one-line messages, and a trip through pickle."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt import errors
from ltxrt.errors import LtxrtError, MediaError, RequestError, shown

EXIT_CODES = {
    "LtxrtError": 1,
    "RequestError": 3,
    "MediaError": 4,
    "BundleError": 5,
    "EngineError": 6,
    "CapacityError": 6,
    "OutputError": 7,
    "VerificationError": 8,
    "ExportError": 9,
}


def test_exit_codes_are_the_documented_ones():
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == EXIT_CODES
    for name, code in EXIT_CODES.items():
        (line,) = [line for line in (errors.__doc__ or "").splitlines() if f" {name} " in f"{line} "]
        assert str(code) in line.split()


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("RequestError", ValueError), ("MediaError", ValueError), ("EngineError", RuntimeError), ("OutputError", OSError)],
)
def test_the_builtin_that_a_caller_would_expect_catches_it(name, builtin):
    assert issubclass(getattr(errors, name), builtin)
    assert issubclass(getattr(errors, name), LtxrtError)


def test_a_refusal_says_field_value_and_what_is_allowed():
    error = RequestError("num_frames", 8, "a whole number from 9 to 481")
    assert (error.field, error.value, error.allowed) == ("num_frames", 8, "a whole number from 9 to 481")
    assert str(error) == "num_frames: 8 is not allowed; allowed: a whole number from 9 to 481"
    media = MediaError("input_audio", "a.wav", "is empty", "a WAV file")
    assert str(media) == "input_audio: 'a.wav' is empty; allowed: a WAV file"
    assert media.problem == "is empty"


@pytest.mark.parametrize(
    "error", [RequestError("seed", -2, "0 or more"), MediaError("input_audio", "a.wav", "is empty", "a WAV file")]
)
def test_a_refusal_survives_pickle_and_copy(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


class TwoLines:
    def __repr__(self):
        return "first\n  second"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        ("two  spaces", "'two  spaces'"),
        (np.eye(2), "array([[1., 0.], [0., 1.]])"),
        (TwoLines(), "first second"),
        (10**5000, "int too long to write"),
        ("x" * 200, "'" + "x" * 118 + "…"),
    ],
    ids=["newline", "spaces", "array", "repr", "long-int", "long-text"],
)
def test_a_value_is_shown_on_one_line(value, text):
    assert shown(value) == text


@given(field=st.text(), value=st.text() | st.integers() | st.lists(st.text()))
def test_every_message_is_one_short_line(field, value):
    for error in (RequestError(field, value, "x"), MediaError(field, value, "is odd", "x")):
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 250
        assert error.field == field
