# SPDX-License-Identifier: Apache-2.0
"""Chunked decoding equals decoding at once, shown on a streaming decoder that is small enough to do both by hand."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt.decode import FrameChunk, VideoDecoder
from ltxrt.errors import EngineError
from ltxrt.manifest import StateEntry, StreamEntry
from ltxrt.shapes import chunk_lengths

RATE = Fraction(30000, 1001)
CHANNELS, HEIGHT, WIDTH = 2, 3, 4
TAPS = (0.25, 0.5, 0.3)


def averaged(frames):
    """Three taps over time, frames on the third axis, without padding."""
    count = frames.shape[2] - 2
    return sum(tap * frames[:, :, start : start + count] for start, tap in enumerate(TAPS))


def expanded(latents):
    """Eight different frames from each latent, [1, 1, 8 t, 2 h, 2 w]."""
    mixed = latents[:, :1] - 0.5 * latents[:, 1:]
    shades = np.linspace(0.5, 1.5, 8).reshape(8, 1, 1)
    frames = mixed[:, :, :, None] * shades
    count = 8 * latents.shape[2]
    return frames.reshape(1, 1, count, *latents.shape[3:]).repeat(2, axis=3).repeat(2, axis=4)


def i420(frames):
    """Luma from the frames, flat chroma, [n, 3 h, 2 w] uint8."""
    luma = np.clip(np.rint(frames[0, 0] * 40 + 128), 0, 255).astype(np.uint8)
    return np.concatenate([luma, np.full((len(luma), HEIGHT, 2 * WIDTH), 128, np.uint8)], axis=1)


def held(frames):
    """The edge frames repeated once, as at a clip's true ends."""
    return np.concatenate([frames[:, :, :1], frames, frames[:, :, -1:]], axis=2)


def decoded_at_once(latent):
    return i420(averaged(held(expanded(averaged(held(latent.astype(np.float64))))[:, :, 7:])))


class StreamingDecoder:
    """The same arithmetic a chunk at a time: each average keeps its last two inputs and emits one frame late."""

    name = "video_decoder"
    stream = StreamEntry(
        states=(
            StateEntry(name="latents", channels=CHANNELS, spatial_scale=1),
            StateEntry(name="frames", channels=1, spatial_scale=2),
        ),
        first_chunk_latents=2,
    )

    def __init__(self):
        self.lengths = []
        self.flags = []

    def run(self, feeds):
        first, last = feeds["first"].size == 1, feeds["last"].size == 1
        assert feeds["latent"].flags.c_contiguous
        self.lengths.append(feeds["latent"].shape[2])
        self.flags.append((first, last))
        latents, kept_latents = self._average(feeds["latents"], feeds["latent"].astype(np.float64), first, last)
        pixels = expanded(latents)[:, :, 7 if first else 0 :]
        frames, kept_frames = self._average(feeds["frames"], pixels, first, last)
        return {"frames": i420(frames), "next_latents": kept_latents, "next_frames": kept_frames}

    @staticmethod
    def _average(state, values, first, last):
        assert state.shape[2] == (0 if first else 2)
        assert (state.shape[1], *state.shape[3:]) == (values.shape[1], *values.shape[3:])
        edges = [values[:, :, :1]] if first else [state]
        whole = np.concatenate([*edges, values, *([values[:, :, -1:]] if last else [])], axis=2)
        return averaged(whole), whole[:, :, -2:]


def latent_of(count, seed=0):
    return np.random.default_rng(seed).standard_normal((1, CHANNELS, count, HEIGHT, WIDTH)).astype(np.float32)


def decoder(chunk_latents, first=2, engine=None):
    stream = StreamEntry(states=StreamingDecoder.stream.states, first_chunk_latents=first)
    return VideoDecoder(engine or StreamingDecoder(), stream, chunk_latents)


# --- lengths ---


@given(latents=st.integers(1, 100), first=st.integers(1, 20), rest=st.integers(1, 20))
def test_chunk_lengths(latents, first, rest):
    lengths = chunk_lengths(latents, first, rest)
    assert sum(lengths) == latents
    assert lengths[0] == min(first, latents)
    assert all(length == rest for length in lengths[1:-2])
    assert all(1 <= length <= rest for length in lengths[1:])
    assert len(lengths) == 1 or lengths[-1] == 1


def test_examples_of_chunk_lengths():
    assert chunk_lengths(16, 15, 8) == [15, 1]
    assert chunk_lengths(61, 15, 8) == [15, 8, 8, 8, 8, 8, 5, 1]
    assert chunk_lengths(32, 15, 8) == [15, 8, 8, 1]
    assert chunk_lengths(2, 15, 8) == [2]


# --- frames ---


@settings(max_examples=60)
@given(
    count=st.integers(2, 24),
    first=st.integers(2, 8),
    chunk_latents=st.integers(1, 9),
    dropped=st.integers(0, 7),
    seed=st.integers(0, 99),
)
def test_chunked_is_unchunked(count, first, chunk_latents, dropped, seed):
    latent = latent_of(count, seed)
    frames = 8 * (count - 1) + 1 - dropped
    whole = decoded_at_once(latent)
    assert len(whole) == 8 * (count - 1) + 1
    chunks = list(decoder(chunk_latents, first).chunks(latent, frames, RATE))
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole[:frames])
    assert all(chunk.frames.dtype == np.uint8 and len(chunk.frames) for chunk in chunks)


def test_chunks_say_where_they_are():
    chunks = list(decoder(4).chunks(latent_of(12), 85, RATE))
    assert len(chunks) > 2
    index = 0
    for chunk in chunks:
        assert chunk.first_index == index
        assert chunk.rate == RATE
        assert chunk.pts_seconds == Fraction(index * 1001, 30000)
        assert isinstance(chunk.pts_seconds, Fraction)
        index += len(chunk.frames)
    assert index == 85


@pytest.mark.parametrize("index", [0, 1, 480])
def test_presentation_times_are_exact(index):
    frames = np.zeros((1, 3, 2), np.uint8)
    assert FrameChunk(frames, index, Fraction(24000, 1001)).pts_seconds == Fraction(1001 * index, 24000)


def test_the_ends_are_flagged():
    engine = StreamingDecoder()
    list(decoder(3, engine=engine).chunks(latent_of(9), 65, RATE))
    assert engine.lengths == [2, 3, 3, 1]
    assert engine.flags == [(True, False), (False, False), (False, False), (False, True)]
    short = StreamingDecoder()
    list(decoder(3, first=15, engine=short).chunks(latent_of(2), 9, RATE))
    assert (short.lengths, short.flags) == ([2], [(True, True)])


def test_a_first_chunk_that_gives_no_frame_yet_is_not_handed_out():
    chunks = list(decoder(8, first=2).chunks(latent_of(4), 25, RATE))
    assert chunk_lengths(4, 2, 8) == [2, 1, 1]
    assert [chunk.first_index for chunk in chunks] == [0, 8]


def test_chunks_nobody_needs_are_not_decoded():
    engine = StreamingDecoder()
    latent = latent_of(20)
    chunks = list(decoder(2, engine=engine).chunks(latent, 20, RATE))
    assert engine.lengths == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in chunks]), decoded_at_once(latent)[:20])


def test_a_chunk_is_decoded_when_it_is_asked_for():
    engine = StreamingDecoder()
    chunks = decoder(2, first=3, engine=engine).chunks(latent_of(20), 153, RATE)
    assert engine.lengths == []
    next(chunks)
    assert engine.lengths == [3]
    next(chunks)
    assert engine.lengths == [3, 2]
    chunks.close()
    assert engine.lengths == [3, 2]


def test_frames_that_the_network_does_not_give_are_missed():
    with pytest.raises(EngineError, match="video_decoder: 3 latent frames gave 17 frames, 18 are needed"):
        list(decoder(2).chunks(latent_of(3), 18, RATE))
