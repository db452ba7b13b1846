# SPDX-License-Identifier: Apache-2.0
"""Media files for the tests of the runtime, made on the spot."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

MakeAudio = Callable[..., Path]
MakeWav = Callable[[NDArray[np.generic], int, str], bytes]
Speechlike = Callable[..., NDArray[np.float32]]

# WAV stores 8 bits unsigned, more bits signed, and floats under format tag 3.
_PCM_DTYPES = {"u8": "u1", "s16": "<i2", "s32": "<i4", "f32": "<f4", "f64": "<f8"}


def _wav_bytes(samples: NDArray[np.generic], rate: int, kind: str) -> bytes:
    """A WAV file, written without FFmpeg.

    Args:
        samples: ``[channels, samples]``; for ``s24`` int32 values within 24 bits.
        rate: Samples per second.
        kind: ``u8``, ``s16``, ``s24``, ``s32``, ``f32`` or ``f64``.
    """
    channels = samples.shape[0]
    if kind == "s24":
        data = np.ascontiguousarray(samples.T, "<i4").view("u1").reshape(-1, 4)[:, :3].tobytes()
    else:
        data = np.ascontiguousarray(samples.T, _PCM_DTYPES[kind]).tobytes()
    width = int(kind[1:]) // 8
    form = struct.pack(
        "<HHIIHH", 3 if kind[0] == "f" else 1, channels, rate, rate * channels * width, channels * width, width * 8
    )
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _speechlike(samples: int, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """A decaying chirp from 200 Hz up, different in every channel: it correlates with itself in one place only."""
    time = np.arange(samples) / rate
    rows = [
        0.6 * np.sin(2 * np.pi * (200 + 60 * index + 300 * time) * time) * (1 - 0.5 * time / time[-1])
        for index in range(channels)
    ]
    return np.asarray(rows, np.float32)


@pytest.fixture(scope="session")
def wav_bytes() -> MakeWav:
    """``wav_bytes(samples, rate, kind)``: see ``_wav_bytes``."""
    return _wav_bytes


@pytest.fixture(scope="session")
def speechlike() -> Speechlike:
    """``speechlike(samples, rate, channels=1)``: see ``_speechlike``."""
    return _speechlike


@pytest.fixture
def make_audio(tmp_path: Path) -> MakeAudio:
    """Encodes ``[channels, samples]`` float32 with FFmpeg: ``make_audio(samples, rate, "mp3", "libmp3lame")``."""

    def encode(
        samples: NDArray[np.float32], rate: int, container: str, codec: str, *, layout: str = "", video: bool = False
    ) -> Path:
        path = tmp_path / f"{codec}-{rate}-{samples.shape[0]}.{container}"
        layout = layout or ("mono", "stereo")[samples.shape[0] - 1]
        with av.open(str(path), "w", format=container) as output:
            picture = output.add_stream("mpeg4", rate=10) if video else None
            stream = output.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
            if picture is not None:
                picture.width = picture.height = 16
                picture.pix_fmt = "yuv420p"
                for index in range(5):
                    still = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
                    still.pts, still.time_base = index, Fraction(1, 10)
                    output.mux(picture.encode(still))
                output.mux(picture.encode(None))
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path

    return encode


@pytest.fixture
def silent_video(tmp_path: Path) -> Path:
    """An MP4 of five frames without an audio track."""
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    return path
