# SPDX-License-Identifier: Apache-2.0
"""The sound's packets: the same in pieces and ahead, from a thread that ends when nobody wants them any more."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
from av.container import OutputContainer
from av.error import FFmpegError
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt.audio_feed import AudioFeed
from ltxrt.media import AudioTrack

RATE = 48_000


def noise(seconds: float) -> AudioTrack:
    samples = np.random.default_rng(1).normal(0, 0.1, (2, round(seconds * RATE))).astype(np.float32)
    return AudioTrack(samples, RATE)


@contextmanager
def container() -> Iterator[OutputContainer]:
    with av.open(io.BytesIO(), "w", format="mp4") as opened:
        yield opened


def packets(feed: AudioFeed, ends: list[Fraction | None]) -> list[tuple[int | None, bytes]]:
    return [(packet.pts, bytes(packet)) for end in ends for packet in feed.until(end)]


@settings(max_examples=10, deadline=None)
@given(ends=st.lists(st.fractions(0, 1), max_size=5).map(sorted))
def test_ahead_gives_the_same_packets(ends: list[Fraction]) -> None:
    track = noise(1)
    with container() as one, container() as other:
        feed, ahead = AudioFeed(one, track, 128_000), AudioFeed(other, track, 128_000)
        ahead.encode_ahead()
        ahead.encode_ahead()  # the second time changes nothing
        expected = packets(feed, [*ends, None])
        assert packets(ahead, [*ends, None]) == expected
    assert len(expected) == 48  # of 1024 samples, the priming included


def test_packets_reach_the_asked_end_and_no_further() -> None:
    with container() as opened:
        feed = AudioFeed(opened, noise(1), 128_000)
        feed.encode_ahead()
        found = feed.until(Fraction(1, 2))
    end = max((packet.pts or 0) + (packet.duration or 0) for packet in found)
    assert RATE // 2 <= end < RATE // 2 + 1024


def test_what_fails_ahead_is_raised_where_packets_are_asked_for() -> None:
    track = noise(0.2)
    track.samples[0, 2000] = np.nan
    with container() as opened:
        feed = AudioFeed(opened, track, 128_000)
        feed.encode_ahead()
        with pytest.raises(FFmpegError):
            feed.until(Fraction(1))


def test_stopping_ends_the_thread() -> None:
    # A minute of sound takes 0.9 s and more.
    with container() as opened:
        feed = AudioFeed(opened, noise(60), 128_000)
        feed.encode_ahead()
        assert any(thread.name.startswith("ltxrt-aac") for thread in threading.enumerate())
        start = time.perf_counter()
        feed.stop()
        assert time.perf_counter() - start < 0.5
