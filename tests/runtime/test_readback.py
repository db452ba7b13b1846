# SPDX-License-Identifier: Apache-2.0
"""Every fault that a clip can have, planted: each is found, and nothing else is reported."""

import io
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet

from ltxrt.clip_file import faststart
from ltxrt.errors import MediaError, VerificationError
from ltxrt.media import AudioTrack
from ltxrt.mp4_boxes import top_level_boxes
from ltxrt.mux import STORED_TAGS, FragmentMuxer, MuxOptions
from ltxrt.readback import ClipReport, Expectation, check_clip, require

FRAMES, RATE, SAMPLES = 30, Fraction(24), 60_000
EXPECTED = Expectation(frames=FRAMES, frame_rate=RATE, width=64, height=64, audio_samples=SAMPLES, audio_rate=48_000)
KeepPacket = Callable[[Packet], bool]


def failed(report: ClipReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.fixture(scope="module")
def stream() -> bytes:
    """A fragmented clip of ours with sound."""
    random = np.random.default_rng(11)
    frames = random.integers(16, 236, (FRAMES, 96, 64), dtype=np.uint8)
    track = AudioTrack(random.normal(0, 0.1, (2, SAMPLES)).astype(np.float32), 48_000)
    options = MuxOptions(
        width=64,
        height=64,
        frame_rate=RATE,
        crf=28,
        x264_preset="superfast",
        audio_bitrate=96_000,
        tags={},
    )
    with FragmentMuxer(options, track) as muxer:
        return muxer.write(frames[:8]) + muxer.write(frames[8:]) + muxer.finish()


@pytest.fixture
def clip(tmp_path: Path, stream: bytes) -> Path:
    """The same as a finished file."""
    (tmp_path / "stream.mp4").write_bytes(stream)
    faststart(tmp_path / "stream.mp4", tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def remuxed(
    clip: Path,
    keep: KeepPacket = lambda _: True,
    *,
    video_only: bool = False,
    tagged: bool = True,
    form: str = "mp4",
    **options: str,
) -> Path:
    """The clip through FFmpeg's muxer again, with a fault; ``keep`` may also change the packets it keeps."""
    target = clip.with_name(f"fault.{form}")
    settings = {"movflags": "faststart", **options} if form == "mp4" else options
    with av.open(str(clip)) as reader, av.open(str(target), "w", format=form, options=settings) as writer:
        if tagged:
            writer.metadata.update({tag: reader.metadata.get(tag, "") for tag in STORED_TAGS})
        wanted = reader.streams.video if video_only else reader.streams
        copies = {stream.index: writer.add_stream_from_template(stream, opaque=True) for stream in wanted}
        for packet in reader.demux(*wanted):
            if packet.dts is not None and keep(packet):
                packet.stream = copies[packet.stream_index]
                writer.mux_one(packet)
    return target


def test_a_clip_of_ours_passes_every_check(clip: Path) -> None:
    report = check_clip(clip, EXPECTED)
    assert failed(report) == set()
    assert report.ok
    assert report.problems == ()
    assert len(report.checks) == 14
    assert (report.frames, report.frame_rate, report.width, report.height) == (FRAMES, RATE, 64, 64)
    assert (report.video_start_seconds, report.audio_start_seconds) == (0, 0)
    assert report.video_duration_seconds == report.audio_duration_seconds == Fraction(FRAMES) / RATE
    assert (report.audio_samples, report.audio_rate) == (SAMPLES, 48_000)
    assert report.constant_frame_rate
    assert report.ai_marked
    require(report)


def test_a_clip_without_sound_passes(clip: Path) -> None:
    silent = remuxed(clip, video_only=True)
    report = check_clip(silent, replace(EXPECTED, audio_samples=None, audio_rate=None))
    assert report.ok
    assert (report.audio_start_seconds, report.audio_duration_seconds, report.audio_samples) == (None, None, None)
    assert failed(check_clip(silent, EXPECTED)) == {"expected_audio_rate", "expected_audio_samples"}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"frames": FRAMES + 1}, "expected_frames"),
        ({"frame_rate": Fraction(24_000, 1001)}, "expected_frame_rate"),
        ({"width": 128}, "expected_size"),
        ({"audio_samples": SAMPLES + 1}, "expected_audio_samples"),
        ({"audio_rate": 44_100}, "expected_audio_rate"),
    ],
)
def test_what_was_not_expected_is_named(clip: Path, changes: dict[str, Any], name: str) -> None:
    report = check_clip(clip, replace(EXPECTED, **changes))
    assert failed(report) == {name}
    with pytest.raises(VerificationError, match=f"failed its read-back check: {name}: ") as failure:
        require(report)
    assert "\n" not in str(failure.value)


def test_a_fragmented_clip_only_fails_for_that(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(stream)
    report = check_clip(tmp_path / "clip.mp4", EXPECTED)
    assert failed(report) == {"faststart"}
    assert not report.faststart


def test_an_index_at_the_end_is_found(clip: Path) -> None:
    assert failed(check_clip(remuxed(clip, movflags="write_colr"), EXPECTED)) == {"faststart"}


def test_missing_tags_are_found(clip: Path) -> None:
    report = check_clip(remuxed(clip, tagged=False), EXPECTED)
    assert failed(report) == {"ai_marked"}
    assert not report.ai_marked


def test_a_missing_or_wrong_colour_box_is_found(clip: Path) -> None:
    data = clip.read_bytes()
    for box in (b"free", b"colr"):
        changed = data.replace(b"colrnclx\0\1", box + b"nclx\0\5")
        assert changed != data
        clip.write_bytes(changed)
        assert failed(check_clip(clip, EXPECTED)) == {"colour_bt709"}


def test_an_untagged_stream_is_found(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as writer:
        coder = writer.add_stream("libx264", rate=24, options={"bf": "0"})
        coder.width = coder.height = 64
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((96, 64), 90, np.uint8), format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            writer.mux(coder.encode(frame))
        writer.mux(coder.encode(None))
    report = check_clip(path)
    assert failed(report) == {"colour_bt709", "ai_marked"}
    assert report.colour == (0, 2, 2, 2)


def delayed(clip: Path, samples: int) -> Path:
    def delay(packet: Packet) -> bool:
        if packet.stream.type == "audio":
            packet.pts += samples
            packet.dts = packet.pts
        return True

    return remuxed(clip, delay, movie_timescale="48000")


@pytest.mark.parametrize("samples", [48, 1024, 9600])
def test_sound_that_starts_late_is_found(clip: Path, samples: int) -> None:
    """A shift shorter than the priming plays a part of it; the rest of a longer one is a gap."""
    report = check_clip(delayed(clip, samples))
    gap = max(0, samples - 1024)
    assert "no_priming_gap" in failed(report)
    assert ("starts_at_zero" in failed(report)) == (gap > 0)
    assert report.audio_start_seconds == Fraction(gap, 48_000)


def test_sound_that_starts_early_has_lost_samples(clip: Path) -> None:
    assert failed(check_clip(delayed(clip, -48), EXPECTED)) == {"expected_audio_samples"}


def test_priming_that_is_played_is_found(clip: Path) -> None:
    report = check_clip(remuxed(clip, use_editlist="0", avoid_negative_ts="make_non_negative"))
    assert "no_priming_gap" in failed(report)


@pytest.mark.parametrize("dropped", [1, 2, 10])
def test_sound_that_ends_early_is_found(clip: Path, dropped: int) -> None:
    def cut(packet: Packet) -> bool:
        return packet.stream.type == "video" or packet.pts < SAMPLES - 1024 * dropped

    report = check_clip(remuxed(clip, cut), EXPECTED)
    # One packet less is less than one AAC frame, which only the expectation can tell.
    assert failed(report) - {"ends_together"} == {"expected_audio_samples"}
    assert ("ends_together" in failed(report)) == (dropped > 1)


def test_a_dropped_frame_is_found(clip: Path) -> None:
    report = check_clip(remuxed(clip, lambda packet: packet.stream.type == "audio" or packet.pts != 29 * 512), EXPECTED)
    assert "expected_frames" in failed(report)
    assert "ends_together" in failed(report)
    assert "constant_frame_rate" not in failed(report)


def test_an_uneven_frame_interval_is_found(clip: Path) -> None:
    def jitter(packet: Packet) -> bool:
        if packet.stream.type == "video" and packet.pts == 10 * 512:
            packet.pts += 1
            packet.dts += 1
        return True

    report = check_clip(remuxed(clip, jitter), EXPECTED)
    assert failed(report) == {"constant_frame_rate"}
    assert not report.constant_frame_rate


def test_a_fragment_that_is_missing_is_found(tmp_path: Path, stream: bytes) -> None:
    spans = list(top_level_boxes(stream))
    assert [span.kind for span in spans] == ["ftyp", "moov", "moof", "mdat", "moof", "mdat"]
    early, late = spans[1].end, spans[3].end
    (tmp_path / "clip.mp4").write_bytes(stream[:early] + stream[late:])
    report = check_clip(tmp_path / "clip.mp4")
    assert {"starts_at_zero", "constant_frame_rate"} <= failed(report)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.9999])
def test_a_truncated_file_is_found(clip: Path, share: float) -> None:
    data = clip.read_bytes()
    clip.write_bytes(data[: int(len(data) * share)])
    assert "decodes" in failed(check_clip(clip))


def test_damaged_media_are_found(clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    (media,) = (span for span in top_level_boxes(bytes(data)) if span.kind == "mdat")
    middle = (media.start + media.end) // 2
    data[middle : middle + 2000] = bytes(2000)
    clip.write_bytes(data)
    assert "decodes" in failed(check_clip(clip, EXPECTED))


def test_what_is_no_mp4_video_is_refused(tmp_path: Path, clip: Path) -> None:
    with av.open(str(clip)) as reader, av.open(str(tmp_path / "sound.mp4"), "w") as writer:
        copy = writer.add_stream_from_template(reader.streams.audio[0])
        for packet in reader.demux(audio=0):
            if packet.dts is not None:
                packet.stream = copy
                writer.mux_one(packet)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    (tmp_path / "header.mp4").write_bytes(clip.read_bytes()[:100])
    remuxed(clip, form="matroska")
    for name, problem in (
        ("missing.mp4", "does not exist"),
        (".", "is a folder"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "is not an MP4 file"),
        ("fault.matroska", "is not an MP4 file"),
        ("header.mp4", "has no movie header"),
        ("sound.mp4", "has no video track"),
    ):
        with pytest.raises(MediaError, match=problem) as refused:
            check_clip(tmp_path / name)
        assert refused.value.field == "file"
        assert "\n" not in str(refused.value)


def test_a_video_of_somebody_else_is_measured_not_refused(tmp_path: Path) -> None:
    """B-frames, sound that is no AAC and no tags: facts are right, and what is missing is named."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as writer:
        video = writer.add_stream("libx264", rate=25, options={"bf": "3"})
        video.width = video.height = 64
        audio = writer.add_stream("libmp3lame", rate=48_000, layout="mono")
        for index in range(25):
            still = av.VideoFrame.from_ndarray(np.full((96, 64), index, np.uint8), format="yuv420p")
            still.pts, still.time_base = index, Fraction(1, 25)
            writer.mux(video.encode(still))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = 48_000, 0, Fraction(1, 48_000)
        writer.mux(audio.encode(tone))
        writer.mux([*video.encode(None), *audio.encode(None)])
    report = check_clip(path)
    assert failed(report) == {"colour_bt709", "faststart", "ai_marked"}
    assert (report.frames, report.frame_rate, report.video_duration_seconds) == (25, 25, 1)


def test_checking_reads_any_path_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.chdir(tmp_path)
    clip.rename(tmp_path / "http:clip %d.mp4")
    assert check_clip(Path("http:clip %d.mp4"), EXPECTED).ok


def test_every_cut_of_the_file_ends_in_a_report_or_a_media_error(clip: Path) -> None:
    data = clip.read_bytes()
    (index,) = (span for span in top_level_boxes(data) if span.kind == "moov")
    verdicts = io.StringIO()
    for length in range(0, index.end, 37):
        clip.write_bytes(data[:length])
        with pytest.raises(MediaError) as refused:
            check_clip(clip)
        verdicts.write(refused.value.problem)
    assert "truncated" in verdicts.getvalue()
