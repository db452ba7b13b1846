# SPDX-License-Identifier: Apache-2.0
"""What the three encoders are fed, and how much of their answer is kept."""

from fractions import Fraction

import numpy as np
import pytest

from ltxrt.encoders import encode_audio, encode_image, encode_text
from ltxrt.errors import EngineError
from ltxrt.image import first_frame
from ltxrt.media import AudioTrack
from ltxrt.shapes import PixelShape
from ltxrt.tokenizer import TokenizedPrompt


class Recorder:
    """Answers with a function of its one feed and keeps what it was fed."""

    def __init__(self, answer):
        self.answer = answer
        self.feeds = []

    def run(self, feeds):
        self.feeds.append(feeds)
        return self.answer(**feeds)


def listener(short=0):
    """Tokens as the real encoder counts them, each holding its index."""

    def answer(waveform):
        count = waveform.shape[2] // 640 + 1 - short
        return {"audio_tokens": np.arange(count, dtype=np.float32).reshape(1, -1, 1).repeat(4, axis=2)}

    return Recorder(answer)


# --- text ---


def test_the_prompts_tokens_become_two_contexts():
    video, audio = np.ones((1, 8, 4), np.float32), np.zeros((1, 8, 2), np.float32)
    engine = Recorder(lambda input_ids: {"video_context": video, "audio_context": audio})
    ids = np.array([[1, 5, 6]], np.int64)
    contexts = encode_text(engine, TokenizedPrompt(ids, 0))
    assert engine.feeds == [{"input_ids": ids}]
    assert contexts.video is video
    assert contexts.audio is audio


# --- audio ---


@pytest.mark.parametrize(
    ("frames", "rate", "tokens", "samples"),
    [
        (121, Fraction(24), 126, 80_667),
        (121, Fraction(25), 121, 77_440),
        (97, Fraction(24), 101, 64_667),
        (9, Fraction(24), 9, 6_000),
        (121, Fraction(60), 50, 32_267),
        (9, Fraction(60), 4, 2_400),
        (9, Fraction(1), 225, 144_000),
        (121, Fraction(24000, 1001), 126, 80_747),
    ],
)
def test_audio_tokens_and_samples_are_those_of_the_frames(frames, rate, tokens, samples):
    engine = listener()
    track = AudioTrack(np.full((1, 16_000), 0.5, np.float32), 16_000)
    found = encode_audio(engine, track, frames, rate)
    waveform = engine.feeds[0]["waveform"]
    assert waveform.shape == (1, 2, samples)
    assert waveform.dtype == np.float32
    assert found.shape == (1, tokens, 4)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found[0, :, 0], np.arange(tokens))


def test_what_the_track_lacks_is_silence_on_both_channels():
    engine = listener()
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 4_000)).astype(np.float32)
    encode_audio(engine, AudioTrack(sound, 16_000), 9, Fraction(24))
    (waveform,) = engine.feeds[0]["waveform"]
    for channel in waveform:
        np.testing.assert_array_equal(channel[:4_000], sound[0])
        np.testing.assert_array_equal(channel[4_000:], 0)


def test_what_the_clip_does_not_reach_is_not_heard():
    engine = listener()
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 9_000)).astype(np.float32)
    encode_audio(engine, AudioTrack(sound, 16_000), 9, Fraction(24))
    np.testing.assert_array_equal(engine.feeds[0]["waveform"][0], sound[:, :6_000])


@pytest.mark.parametrize("frames", range(9, 482, 8))
@pytest.mark.parametrize(
    "rate", [Fraction(1), Fraction(25, 2), Fraction(24000, 1001), Fraction(24), Fraction(30000, 1001), Fraction(60)]
)
def test_the_real_encoders_count_always_suffices(frames, rate):
    encode_audio(listener(), AudioTrack(np.zeros((1, 1_600), np.float32), 16_000), frames, rate)


def test_too_few_tokens_are_an_error():
    track = AudioTrack(np.zeros((1, 1_600), np.float32), 16_000)
    with pytest.raises(EngineError, match="audio_encoder: 6000 samples gave 8 tokens, 9 are needed"):
        encode_audio(listener(short=2), track, 9, Fraction(24))


# --- first frame ---


def test_the_first_frame_is_encoded_at_the_size_of_each_stage():
    engine = Recorder(lambda image: {"image_tokens": np.full((1, 1, 4), image.shape[-1], np.float32)})
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    half, full = encode_image(engine, picture, PixelShape(9, 128, 192), crf=33)
    assert (half[0, 0, 0], full[0, 0, 0]) == (96, 192)
    for feeds, (width, height) in zip(engine.feeds, [(96, 64), (192, 128)], strict=True):
        assert feeds["image"].shape == (1, 3, 1, height, width)
        np.testing.assert_array_equal(feeds["image"], first_frame(picture, width, height, 33))
