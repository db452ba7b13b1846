# SPDX-License-Identifier: Apache-2.0
"""Fragments: exact times at every frame rate, playable from the first one, the same bytes every time."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ltxrt.clip_file import ClipFile, faststart
from ltxrt.errors import OutputError
from ltxrt.media import AudioTrack
from ltxrt.mp4_boxes import read_boxes, top_level_boxes
from ltxrt.mux import AI_DISCLOSURE, FragmentMuxer, MuxOptions
from ltxrt.readback import Expectation
from ltxrt.shapes import frame_rate, samples_for_frames

RATES = (1, 12.5, 23.976, 24, 25, 29.97, 30, 59.94, 60, 7.3)
AUDIO = (None, (44_100, 1), (44_100, 2), (48_000, 1), (48_000, 2))
AAC_FRAME = 1024


def options(rate: Fraction, width: int = 64, height: int = 64, **changes: object) -> MuxOptions:
    values = {"crf": 23, "x264_preset": "veryfast", "audio_bitrate": 128_000, "tags": {"model": "tiny"}}
    return MuxOptions(width=width, height=height, frame_rate=rate, **{**values, **changes})


def pictures(count: int, width: int = 64, height: int = 64) -> NDArray[np.uint8]:
    """A drifting texture; chroma stays grey."""
    row, column = np.mgrid[0:height, 0:width]
    frames = np.full((count, height * 3 // 2, width), 128, np.uint8)
    for index in range(count):
        frames[index, :height] = 120 + 60 * np.sin((column + 2 * index) / 9) * np.cos((row - index) / 7)
    return frames


def sound(count: int, rate: int, channels: int) -> AudioTrack:
    """Noise that lasts as long as asked: it correlates with itself at one lag only."""
    noise = np.random.default_rng(7).normal(0, 0.1, (channels, count))
    return AudioTrack(noise.astype(np.float32), rate)


def fragments(muxer: FragmentMuxer, frames: NDArray[np.uint8], sizes: Iterator[int] | int = 8) -> Iterator[bytes]:
    """What the muxer returns for chunks of those sizes."""
    with muxer:
        start = 0
        while start < len(frames):
            size = sizes if isinstance(sizes, int) else next(sizes)
            yield muxer.write(frames[start : start + size])
            start += size
        yield muxer.finish()


def stream(rate: Fraction, count: int, audio: AudioTrack | None) -> bytes:
    return b"".join(fragments(FragmentMuxer(options(rate), audio), pictures(count)))


def video_times(clip: bytes | Path) -> list[Fraction]:
    with av.open(io.BytesIO(clip) if isinstance(clip, bytes) else str(clip)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def heard(clip: bytes | Path) -> tuple[Fraction, NDArray[np.float32]]:
    """When the sound starts, and its samples ``[channels, n]``, gaps refused."""
    with av.open(io.BytesIO(clip) if isinstance(clip, bytes) else str(clip)) as container:
        frames = list(container.decode(audio=0))
    for before, after in pairwise(frames):
        assert after.pts == before.pts + before.samples
    return frames[0].pts * frames[0].time_base, np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


@pytest.mark.parametrize("audio_format", AUDIO, ids=str)
@pytest.mark.parametrize("decimal", RATES)
def test_times_are_exact_in_the_stream_and_in_the_file(
    tmp_path: Path, decimal: float, audio_format: tuple[int, int] | None
) -> None:
    rate = frame_rate(decimal)
    for count in (1, 2, 9, 25):
        audio, samples = None, None
        if audio_format is not None:
            samples = samples_for_frames(count, rate, audio_format[0])
            audio = sound(samples, *audio_format)
        path = tmp_path / "clip.mp4"
        data = b""
        with ClipFile(path) as clip:
            for fragment in fragments(FragmentMuxer(options(rate), audio), pictures(count)):
                data += fragment
                clip.append(fragment)
            # Exact counts and both tracks' exact ends are among the checks of commit.
            clip.commit(
                Expectation(
                    frames=count,
                    frame_rate=rate,
                    width=64,
                    height=64,
                    audio_samples=samples,
                    audio_rate=audio and audio.sample_rate,
                )
            )
        for found in (data, path):
            assert video_times(found) == [index / rate for index in range(count)]
            if samples is not None:
                start, waveform = heard(found)
                assert start == 0
                assert 0 <= waveform.shape[1] - samples < AAC_FRAME


def test_a_long_clip_at_an_ntsc_rate_is_exact(tmp_path: Path) -> None:
    rate = Fraction(24_000, 1001)
    data = stream(rate, 121, sound(samples_for_frames(121, rate, 44_100), 44_100, 2))
    (tmp_path / "stream.mp4").write_bytes(data)
    boxes = read_boxes(tmp_path / "stream.mp4")
    video, audio = boxes.track("vide"), boxes.track("soun")
    assert video is not None
    assert audio is not None
    assert video_times(data) == [index / rate for index in range(121)]
    assert Fraction(video.media_duration, video.timescale) == 121 / rate
    assert audio.media_duration - audio.edits[0].media_time == samples_for_frames(121, rate, 44_100)
    assert video.contiguous
    assert audio.contiguous


@pytest.mark.parametrize("audio", [None, sound(50_000, 48_000, 2)], ids=["silent", "sound"])
def test_every_write_returns_a_fragment_that_plays(audio: AudioTrack | None) -> None:
    prefix = b""
    for index, fragment in enumerate(fragments(FragmentMuxer(options(Fraction(24)), audio), pictures(25))):
        if index == 0:
            assert [span.kind for span in top_level_boxes(fragment)] == ["ftyp", "moov", "moof", "mdat"]
        elif index < 4:
            assert [span.kind for span in top_level_boxes(fragment)] == ["moof", "mdat"]
        prefix += fragment
        written = min(8 * (index + 1), 25)
        assert len(video_times(prefix)) == written
        if audio is not None:
            start, waveform = heard(prefix)
            assert start == 0
            assert waveform.shape[1] >= written * 2000


def test_sound_and_picture_stay_together_to_the_sample(tmp_path: Path) -> None:
    rate, flash = Fraction(30_000, 1001), 13
    frames = pictures(30)
    frames[:, :64] = 16
    frames[flash, :64] = 235
    track = sound(samples_for_frames(30, rate, 48_000), 48_000, 1)
    onset = round(flash / rate * 48_000)
    track.samples[:, :onset] *= 0.01
    data = b"".join(fragments(FragmentMuxer(options(rate), track), frames))
    (tmp_path / "stream.mp4").write_bytes(data)
    faststart(tmp_path / "stream.mp4", tmp_path / "clip.mp4")
    for found in (data, tmp_path / "clip.mp4"):
        with av.open(io.BytesIO(found) if isinstance(found, bytes) else str(found)) as container:
            lit = [f.pts * f.time_base for f in container.decode(video=0) if f.to_ndarray()[:64].mean() > 150]
        start, waveform = heard(found)
        lags = np.correlate(waveform[0, : track.samples.shape[1]], track.samples[0], "full")
        lag_seconds = (int(np.argmax(lags)) - track.samples.shape[1] + 1) / 48_000
        loud = int(np.argmax(np.abs(waveform[0]) > 0.1)) / 48_000
        assert lit == [flash / rate]
        assert start == 0
        assert lag_seconds == 0
        assert abs(loud - float(lit[0])) < 0.001


def test_sound_beyond_the_last_frame_leaves_with_finish() -> None:
    *_, last = chunks = list(fragments(FragmentMuxer(options(Fraction(24)), sound(96_000, 48_000, 1)), pictures(24)))
    assert [span.kind for span in top_level_boxes(last)] == ["moof", "mdat"]
    assert 96_000 <= heard(b"".join(chunks))[1].shape[1] < 96_000 + AAC_FRAME


def test_sound_that_ends_early_ends_there() -> None:
    data = stream(Fraction(24), 24, sound(3_000, 48_000, 1))
    assert 3_000 <= heard(data)[1].shape[1] < 3_000 + AAC_FRAME
    assert len(video_times(data)) == 24


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6), ahead=st.booleans())
def test_the_finished_file_does_not_depend_on_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ahead: bool
) -> None:
    rate, count = Fraction(25), sum(sizes)
    folder = tmp_path_factory.mktemp("chunks")
    audio = sound(samples_for_frames(count, rate, 44_100), 44_100, 2)
    digests = set[str]()
    for name, chunked in (("whole", count), ("chunked", iter(sizes))):
        muxer = FragmentMuxer(options(rate), audio)
        if ahead and name == "chunked":
            muxer.encode_audio_ahead()
        (folder / name).write_bytes(b"".join(fragments(muxer, pictures(count), chunked)))
        faststart(folder / name, folder / f"{name}.mp4")
        digests.add(hashlib.sha256((folder / f"{name}.mp4").read_bytes()).hexdigest())
    assert len(digests) == 1


_CLIP_HASH = """
import hashlib, os, sys
from fractions import Fraction
import numpy as np
from ltxrt.media import AudioTrack
from ltxrt.mux import FragmentMuxer, MuxOptions
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
random = np.random.default_rng(3)
frames = random.integers(16, 236, (20, 384, 256), dtype=np.uint8)
track = AudioTrack(random.normal(0, 0.1, (2, 40_000)).astype(np.float32), 48_000)
options = MuxOptions(
    width=256, height=256, frame_rate=Fraction(24), crf=19, x264_preset="veryfast", audio_bitrate=192_000, tags={}
)
with FragmentMuxer(options, track) as muxer:
    data = b"".join([muxer.write(frames[:9]), muxer.write(frames[9:]), muxer.finish()])
print(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets the processor affinity")
def test_bytes_depend_neither_on_the_process_nor_on_its_cores() -> None:
    digests = [
        subprocess.run([sys.executable, "-c", _CLIP_HASH, cores], capture_output=True, text=True, check=True).stdout
        for cores in ("1", "64")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64


def test_the_video_is_coded_as_promised() -> None:
    with av.open(io.BytesIO(stream(Fraction(24), 121, None))) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.profile, codec.pix_fmt) == ("h264", "High", "yuv420p")
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    assert keys[0] == 0
    assert max(after - before for before, after in pairwise([*keys, 121])) <= 48


def test_colour_is_tagged_and_left_as_it_is() -> None:
    frames = np.full((9, 96, 64), 128, np.uint8)
    frames[:, :64] = 63  # BT.709 limited-range red: Y 63, U 102, V 240
    frames[:, 64:80], frames[:, 80:] = 102, 240
    data = b"".join(fragments(FragmentMuxer(options(Fraction(24), crf=4), None), frames))
    with av.open(io.BytesIO(data)) as container:
        decoded = next(container.decode(video=0))
    assert (decoded.color_range, decoded.color_primaries, decoded.color_trc, decoded.colorspace) == (1, 1, 1, 1)
    assert np.abs(decoded.to_ndarray().astype(int) - frames[0]).max() <= 2


def test_tags_are_stored_and_the_disclosure_cannot_be_replaced() -> None:
    chosen = {"title": "A clip", "model": "ltx-2.3", "synopsis": "somebody speaks"}
    muxer = FragmentMuxer(options(Fraction(24), tags=chosen), None)
    with av.open(io.BytesIO(b"".join(fragments(muxer, pictures(2))))) as container:
        found = container.metadata
    assert found["comment"] == AI_DISCLOSURE
    assert found["description"] == f"{AI_DISCLOSURE} Model: ltx-2.3."
    assert (found["title"], found["synopsis"]) == ("A clip", "somebody speaks")
    assert "creation_time" not in found
    with pytest.raises(ValueError, match=r"\['comment'\].*allowed are artist"):
        options(Fraction(24), tags={"comment": "made by hand"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 63}, "both sides must be even"),
        ({"height": 0}, "both sides must be even and at least 2"),
        ({"crf": 0}, "crf 0: must be 1 to 51"),
        ({"audio_bitrate": 0}, "audio_bitrate 0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, int], message: str) -> None:
    values = {"width": 64, "height": 64, **changes}
    with pytest.raises(ValueError, match=message):
        options(Fraction(24), **values)
    with pytest.raises(ValueError, match="frame_rate 0"):
        options(Fraction(0))


@pytest.mark.parametrize(
    "frames",
    [np.zeros((1, 96, 62), np.uint8), np.zeros((1, 96, 64), np.int16), np.zeros((96, 64), np.uint8)],
    ids=["width", "dtype", "rank"],
)
def test_frames_of_another_shape_are_refused(frames: NDArray[np.uint8]) -> None:
    with (
        FragmentMuxer(options(Fraction(24)), None) as muxer,
        pytest.raises(ValueError, match=r"expected uint8\[n, 96, 64\]"),
    ):
        muxer.write(frames)


@pytest.mark.parametrize("audio", [sound(0, 48_000, 1), sound(9, 22_050, 1)], ids=["empty", "rate"])
def test_audio_that_cannot_be_muxed_is_refused(audio: AudioTrack) -> None:
    with pytest.raises(ValueError, match="allowed rates are"):
        FragmentMuxer(options(Fraction(24)), audio)


def test_an_unknown_x264_preset_is_one_clear_error() -> None:
    with (
        FragmentMuxer(options(Fraction(24), x264_preset="brisk"), None) as muxer,
        pytest.raises(OutputError, match="encoding failed after 0 frames"),
    ):
        muxer.write(pictures(1))


@pytest.mark.parametrize("ahead", [True, False])
def test_sound_that_is_not_finite_is_one_clear_error(ahead: bool) -> None:
    track = sound(4096, 48_000, 1)
    track.samples[0, 2000] = np.nan
    with FragmentMuxer(options(Fraction(24)), track) as muxer:
        if ahead:
            muxer.encode_audio_ahead()
        with pytest.raises(OutputError, match="encoding failed after 24 frames"):
            muxer.write(pictures(24))


@pytest.mark.parametrize("channels", [1, 2])
def test_a_bit_rate_beyond_aac_is_capped(channels: int) -> None:
    muxer = FragmentMuxer(options(Fraction(24), audio_bitrate=900_000), sound(48_000, 48_000, channels))
    data = b"".join(fragments(muxer, pictures(24)))
    with av.open(io.BytesIO(data)) as container:
        coded = sum(packet.size for packet in container.demux(audio=0))
    assert coded * 8 <= 288_000 * channels * 1.1


def test_finish_and_close_may_be_called_twice_and_end_it() -> None:
    muxer = FragmentMuxer(options(Fraction(24)), None)
    muxer.write(pictures(2))
    assert muxer.finish() == b""
    assert muxer.finish() == b""
    muxer.close()
    with pytest.raises(ValueError, match="the muxer is closed"):
        muxer.write(pictures(1))


def test_no_frames_give_no_bytes() -> None:
    with FragmentMuxer(options(Fraction(24)), sound(2000, 48_000, 1)) as muxer:
        assert muxer.write(pictures(0)) == b""
        assert muxer.finish() == b""


def test_an_abandoned_stream_releases_its_encoders() -> None:
    muxer = FragmentMuxer(options(Fraction(24)), sound(9_000, 48_000, 1))
    running = fragments(muxer, pictures(25))
    next(running)
    running.close()
    with pytest.raises(ValueError, match="the muxer is closed"):
        muxer.write(pictures(1))


def test_counters_tell_frames_and_time() -> None:
    start = time.perf_counter()
    with FragmentMuxer(options(Fraction(24)), sound(50_000, 48_000, 2)) as muxer:
        muxer.write(pictures(9))
        first = muxer.seconds_encoding
        muxer.write(pictures(16))
        muxer.finish()
    assert muxer.frames_written == 25
    assert 0 < first < muxer.seconds_encoding < time.perf_counter() - start


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe")
def test_ffprobe_agrees(tmp_path: Path) -> None:
    rate = Fraction(24_000, 1001)
    (tmp_path / "stream.mp4").write_bytes(stream(rate, 25, sound(samples_for_frames(25, rate, 48_000), 48_000, 2)))
    faststart(tmp_path / "stream.mp4", tmp_path / "clip.mp4")
    probe = subprocess.run(
        ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", tmp_path / "clip.mp4"],
        capture_output=True,
        check=True,
    )
    video, audio = json.loads(probe.stdout)["streams"]
    assert (video["nb_frames"], video["nb_read_frames"], video["r_frame_rate"]) == ("25", "25", "24000/1001")
    assert (video["start_pts"], video["duration_ts"]) == (0, 25 * 1001)
    assert (audio["start_pts"], audio["duration_ts"], audio["time_base"]) == (0, 50_050, "1/48000")
    assert (video["color_range"], video["color_space"], video["chroma_location"]) == ("tv", "bt709", "center")
