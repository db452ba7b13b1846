# SPDX-License-Identifier: Apache-2.0
"""The drawn world and what is measured from it: colours and mouths come back from the pixels, at every size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt_export.tiny.captions import all_names, caption, held_out_captions, held_out_names, random_names
from ltxrt_export.tiny.measure import (
    CLOSED,
    energy_envelope,
    mouth_opening,
    nearest_colour,
    part_colours,
    pearson,
    psnr,
    synchrony,
)
from ltxrt_export.tiny.mouth import SAMPLE_RATE, MouthTrack, frame_times, mouth_track
from ltxrt_export.tiny.world import COLOURS, DEFAULTS, PARTS, Scene, render

SIZES = [(96, 96), (128, 128), (192, 192), (128, 256), (256, 128)]


def burst(seconds: float = 2.0, start: float = 0.5, stop: float = 1.0, hertz: float = 500.0) -> np.ndarray:
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.4 * np.sin(2 * np.pi * hertz * times) * ((times > start) & (times < stop))).astype(np.float32)


def scene(seed: int = 0, **names: str) -> Scene:
    return Scene.draw(np.random.default_rng(seed), {**DEFAULTS, **names})


def test_the_mouth_opens_with_the_sound_and_shuts_in_silence() -> None:
    times = frame_times(48, 24)
    opening = mouth_track(burst(), times).opening
    inside, outside = (times > 0.6) & (times < 0.9), (times < 0.4) | (times > 1.1)
    assert opening[inside].min() > 0.9
    assert opening[outside].max() < 0.01


def test_a_higher_sound_gives_a_wider_mouth() -> None:
    low, high = (mouth_track(burst(hertz=hertz), frame_times(48, 24)).width[17] for hertz in (300.0, 2500.0))
    assert high - low > 0.5


def test_outside_of_the_sound_is_silence() -> None:
    track = mouth_track(np.zeros(0, np.float32), frame_times(9, 25))
    assert track.opening.max() == 0


@pytest.mark.parametrize("size", SIZES)
def test_what_is_drawn_is_measured(size: tuple[int, int]) -> None:
    sound, count = burst(), 48
    times = frame_times(count, 24)
    names = {"background": "green", "skin": "pink", "shirt": "white"}
    pictures = render(scene(1, **names), mouth_track(sound, times), times, *size)
    assert pictures.shape == (count, *size, 3)
    envelope = energy_envelope(sound, count, 24)
    opening = mouth_opening(pictures)
    assert np.abs(opening - envelope).max() < 0.1
    assert synchrony(opening, envelope).lag == 0
    assert {part: nearest_colour(colour) for part, colour in part_colours(pictures).items()} == names


def test_a_closed_mouth_is_measured_as_closed() -> None:
    times = frame_times(24, 24)
    silence = mouth_track(np.zeros(SAMPLE_RATE, np.float32), times)
    assert mouth_opening(render(scene(), silence, times, 128, 128)).max() < CLOSED / 3


def test_eyes_shut_now_and_then() -> None:
    times = frame_times(240, 24)
    still = MouthTrack(np.zeros(240, np.float32), np.full(240, 0.5, np.float32))
    blinking, staring = scene(3), Scene(*(COLOURS[DEFAULTS[part]] for part in PARTS))
    assert blinking.blinks
    moved = np.abs(np.diff(render(blinking, still, times, 64, 64).astype(int), axis=0)).max()
    assert moved > 100
    assert np.ptp(render(staring, still, times, 64, 64), axis=0).max() == 0


def test_frame_rates_show_the_same_scene() -> None:
    slow, fast = frame_times(10, 10), frame_times(30, 30)
    sound = burst(1.0, 0.2, 0.6)
    drawn = [render(scene(2), mouth_track(sound, times), times, 64, 64) for times in (slow, fast)]
    # The middle of a slow frame is the middle of the second of three fast ones.
    assert np.abs(drawn[0].astype(int) - drawn[1][1::3]).max() <= 2


@given(lag=st.integers(-5, 5))
@settings(max_examples=11)
def test_a_lag_is_found(lag: int) -> None:
    wave = np.random.default_rng(1).random(80).astype(np.float32)
    envelope, mouth = wave[10:70], wave[10 - lag : 70 - lag]
    found = synchrony(mouth, envelope)
    assert found.lag == lag
    assert found.correlation == pytest.approx(1, abs=1e-5)


def test_correlation_of_what_does_not_vary_is_zero() -> None:
    assert pearson(np.ones(5, np.float32), np.arange(5, dtype=np.float32)) == 0


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == 100
    assert psnr(black, black + np.uint8(255)) == pytest.approx(0)


def test_held_out_prompts_are_never_drawn() -> None:
    held_out = held_out_names()
    assert len(held_out) == 64
    assert len(all_names()) == 336
    random = np.random.default_rng(5)
    drawn = [random_names(random) for _ in range(400)]
    assert not any(names in held_out for names in drawn)
    texts = {caption(random, names)[0] for names in drawn}
    assert not texts & {text for text, _ in held_out_captions()}


def test_captions_name_what_is_shown_or_leave_the_default() -> None:
    random = np.random.default_rng(6)
    for _ in range(300):
        names = random_names(random)
        text, shown = caption(random, names)
        for part in PARTS:
            assert shown[part] in (names[part], DEFAULTS[part])
            assert shown[part] == DEFAULTS[part] or shown[part] in text.lower()


def test_every_held_out_caption_names_its_colours() -> None:
    for text, names in held_out_captions():
        assert all(name in text.lower() for name in names.values())
