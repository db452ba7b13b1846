# SPDX-License-Identifier: Apache-2.0
"""Training sounds: right length and level, different every time, and test voices that are kept apart."""

import numpy as np
import pytest

from ltxrt_export.tiny.mouth import SAMPLE_RATE, frame_times, mouth_track
from ltxrt_export.tiny.sound import (
    TEST_VOICES,
    TRAINING_VOICES,
    espeak,
    espeak_available,
    silence,
    speech,
    tones,
    track,
)


@pytest.mark.parametrize("make", [silence, speech, tones, track])
@pytest.mark.parametrize("seconds", [0.2, 1.237])
def test_length_and_level(make: object, seconds: float) -> None:
    assert callable(make)
    for seed in range(6):
        sound = make(np.random.default_rng(seed), seconds)
        assert sound.shape == (round(seconds * SAMPLE_RATE),)
        assert sound.dtype == np.float32
        assert np.isfinite(sound).all()
        assert np.abs(sound).max() <= 1.5


def test_a_seed_decides_everything() -> None:
    first, again, other = (speech(np.random.default_rng(seed), 1.0) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_speech_moves_the_mouth() -> None:
    times = frame_times(96, 24)
    tracks = [mouth_track(speech(np.random.default_rng(seed), 4.0), times) for seed in range(8)]
    assert np.mean([track.opening.std() for track in tracks]) > 0.08
    assert np.mean([track.width.std() for track in tracks]) > 0.05


def test_silence_does_not() -> None:
    for seed in range(8):
        assert mouth_track(silence(np.random.default_rng(seed), 1.0), frame_times(24, 24)).opening.max() < 0.03


def test_recordings_are_mixed_in() -> None:
    marker = np.full(SAMPLE_RATE, 0.123, np.float32)
    sounds = [track(np.random.default_rng(seed), 0.3, [marker]) for seed in range(40)]
    flat = [sound for sound in sounds if np.ptp(sound) < 1e-6 and sound.max() > 0.02]
    assert 8 < len(flat) < 32


def test_test_voices_are_kept_apart() -> None:
    assert not set(TEST_VOICES) & set(TRAINING_VOICES)


@pytest.mark.skipif(not espeak_available(), reason="espeak-ng is not installed")
def test_espeak_speaks() -> None:
    sound = espeak(np.random.default_rng(1), held_out=True)
    assert 1.0 < len(sound) / SAMPLE_RATE < 12
    assert mouth_track(sound, frame_times(24, 24)).opening.max() > 0.2
