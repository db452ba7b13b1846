# SPDX-License-Identifier: Apache-2.0
"""The finished file: whole, checked and renamed into place, or not there at all."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ltxrt.clip_file import ClipFile, check_destination, faststart
from ltxrt.errors import OutputError, VerificationError
from ltxrt.media import AudioTrack
from ltxrt.mp4_boxes import read_boxes
from ltxrt.mux import AI_DISCLOSURE, FragmentMuxer, MuxOptions
from ltxrt.readback import Expectation

EXPECTED = Expectation(frames=24, frame_rate=Fraction(24), width=64, height=64, audio_samples=48_000, audio_rate=48_000)


@pytest.fixture(scope="module")
def fragments() -> list[bytes]:
    """One second of noise at 24 frames a second with sound, in three fragments."""
    random = np.random.default_rng(5)
    frames = random.integers(16, 236, (24, 96, 64), dtype=np.uint8)
    track = AudioTrack(random.normal(0, 0.1, (2, 48_000)).astype(np.float32), 48_000)
    options = MuxOptions(
        width=64,
        height=64,
        frame_rate=Fraction(24),
        crf=23,
        x264_preset="superfast",
        audio_bitrate=128_000,
        tags={"title": "Noise", "model": "tiny"},
    )
    with FragmentMuxer(options, track) as muxer:
        return [*(muxer.write(frames[start : start + 8]) for start in range(0, 24, 8)), muxer.finish()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(destination: Path, fragments: list[bytes]) -> None:
    with ClipFile(destination) as clip:
        for fragment in fragments:
            clip.append(fragment)
        clip.commit(EXPECTED)


def interrupted(destination: Path, fragments: list[bytes]) -> None:
    with ClipFile(destination) as clip:
        clip.append(fragments[0])
        raise KeyboardInterrupt


def test_commit_leaves_one_checked_faststart_file(tmp_path: Path, fragments: list[bytes]) -> None:
    with ClipFile(tmp_path / "clip.mp4") as clip:
        for fragment in fragments:
            clip.append(fragment)
        assert "clip.mp4" not in files(tmp_path)
        report = clip.commit(EXPECTED)
    assert report.ok
    assert report.faststart
    assert files(tmp_path) == ["clip.mp4"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "clip.mp4").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_remux_keeps_every_packet_tag_and_the_edit_list(tmp_path: Path, fragments: list[bytes]) -> None:
    source, result = tmp_path / "stream.mp4", tmp_path / "clip.mp4"
    source.write_bytes(b"".join(fragments))
    faststart(source, result)
    coded: list[list[tuple[int, bytes]]] = []
    for path in (source, result):
        with av.open(str(path)) as container:
            coded.append(sorted((packet.stream_index, bytes(packet)) for packet in container.demux()))
            assert container.metadata["title"] == "Noise"
            assert container.metadata["comment"] == AI_DISCLOSURE
            assert container.metadata["description"].endswith("Model: tiny.")
    assert coded[0] == coded[1]
    boxes = read_boxes(result)
    audio, video = boxes.track("soun"), boxes.track("vide")
    assert audio is not None
    assert video is not None
    assert boxes.is_faststart
    assert audio.edits[0].media_time == 1024
    assert Fraction(boxes.declared_duration, boxes.timescale) == 1
    assert audio.declared_duration == audio.media_duration == 48_000 + 1024
    assert video.colour == (1, 1, 1, False)
    assert files(tmp_path) == ["clip.mp4", "stream.mp4"]


@pytest.mark.parametrize(
    ("rate", "samples", "ticks"),
    [
        (Fraction(25), 44_100, 12_800 * 441),
        (Fraction(24_000, 1001), 48_048, 24_000 * 147),
        (Fraction(59_999, 1001), 18_394, 59_999),  # a common scale would need 32 bits
    ],
    ids=str,
)
def test_the_movie_time_scale_rounds_no_end(tmp_path: Path, rate: Fraction, samples: int, ticks: int) -> None:
    options = MuxOptions(
        width=64, height=64, frame_rate=rate, crf=23, x264_preset="superfast", audio_bitrate=96_000, tags={}
    )
    track = AudioTrack(np.zeros((1, samples), np.float32), 44_100)
    count = round(samples * rate / 44_100)
    with FragmentMuxer(options, track) as muxer, ClipFile(tmp_path / "clip.mp4") as clip:
        clip.append(muxer.write(np.full((count, 96, 64), 90, np.uint8)))
        clip.append(muxer.finish())
        report = clip.commit()
    boxes = read_boxes(tmp_path / "clip.mp4")
    assert boxes.timescale == ticks
    assert report.audio_samples == samples
    assert report.video_duration_seconds == count / rate
    assert (
        0
        <= Fraction(boxes.declared_duration, ticks) - max(Fraction(samples, 44_100), count / rate)
        < Fraction(1, ticks)
    )


def test_leaving_early_leaves_nothing(tmp_path: Path, fragments: list[bytes]) -> None:
    def stream() -> Iterator[int]:
        with ClipFile(tmp_path / "clip.mp4") as clip:
            for fragment in fragments:
                clip.append(fragment)
                yield len(fragment)

    running = stream()
    next(running)
    assert len(files(tmp_path)) == 1
    running.close()
    assert files(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "clip.mp4", fragments)
    assert files(tmp_path) == []


def test_an_earlier_file_stays_until_a_whole_one_replaces_it(tmp_path: Path, fragments: list[bytes]) -> None:
    destination = tmp_path / "clip.mp4"
    destination.write_bytes(b"earlier")
    with pytest.raises(OutputError, match="cannot be written"):
        write(destination, [fragments[0][:100]])
    assert destination.read_bytes() == b"earlier"
    write(destination, fragments)
    assert destination.stat().st_size > 1000
    assert files(tmp_path) == ["clip.mp4"]


def test_a_clip_that_is_not_as_expected_is_not_delivered(tmp_path: Path, fragments: list[bytes]) -> None:
    with ClipFile(tmp_path / "clip.mp4") as clip:
        for fragment in fragments[:2]:
            clip.append(fragment)
        with pytest.raises(VerificationError, match=r"expected_frames: 16, expected 24"):
            clip.commit(EXPECTED)
    assert files(tmp_path) == []


def test_nothing_written_is_no_clip(tmp_path: Path) -> None:
    with ClipFile(tmp_path / "clip.mp4") as clip, pytest.raises(OutputError, match=r"clip\.mp4: cannot be written"):
        clip.commit()
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["a:b %d é 'x.mp4", "-y.mp4", "http:clip.mp4", "no ending", "..mp4"])
def test_any_file_name_is_only_a_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fragments: list[bytes], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path(name), fragments)
    assert files(tmp_path) == [name]


def test_destinations_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "file").touch()
    for name, problem in (
        ("folder", "is a folder"),
        ("missing/clip.mp4", "does not exist"),
        ("file/clip.mp4", "does not exist"),
        ("pipe.mp4", "is not a regular file"),
        (f"{'x' * 300}.mp4", "File name too long"),
    ):
        with pytest.raises(OutputError, match=problem) as refused:
            ClipFile(tmp_path / name)
        assert "\n" not in str(refused.value)
        assert str(tmp_path / name) in str(refused.value)
    assert files(tmp_path) == ["file", "folder", "pipe.mp4"]
    check_destination(tmp_path / "clip.mp4")


def test_faststart_of_something_else_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a clip")
    with pytest.raises(OutputError, match=r"clip\.mp4: cannot be written \(Invalid data"):
        faststart(tmp_path / "text.mp4", tmp_path / "clip.mp4")
    assert files(tmp_path) == ["text.mp4"]


_ATTEMPT = """
import os, resource, sys
from pathlib import Path
from ltxrt.clip_file import ClipFile
from ltxrt.errors import OutputError
stream, folder, limit, user = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if user:
    os.setuid(user)
try:
    with ClipFile(folder / "clip.mp4") as clip:
        for start in range(0, len(stream), 5000):
            clip.append(stream[start : start + 5000])
        clip.commit()
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def attempt(stream: Path, folder: Path, limit: int = 0, user: int = 0) -> subprocess.CompletedProcess[str]:
    """Write the clip in a process of its own, held to files of ``limit`` bytes or to another user's rights."""
    return subprocess.run(
        [sys.executable, "-c", _ATTEMPT, str(stream), str(folder), str(limit), str(user)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95, 0.9999])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, fragments: list[bytes], share: float
) -> None:
    stream, folder = tmp_path / "stream", tmp_path / "out"
    stream.write_bytes(b"".join(fragments))
    folder.mkdir()
    # The finished file is smaller than the stream: the last limits pass append and stop the remux.
    write(tmp_path / "whole.mp4", fragments)
    result = attempt(stream, folder, limit=int(share * (tmp_path / "whole.mp4").stat().st_size))
    assert (result.returncode, result.stderr) == (7, "")
    assert result.stdout.startswith(f"{folder / 'clip.mp4'}: cannot be written (File too large")
    assert result.stdout.count("\n") == 1
    assert files(folder) == []


def test_a_small_file_system_that_fills_up_leaves_nothing(tmp_path: Path, fragments: list[bytes]) -> None:
    stream, folder = tmp_path / "stream", tmp_path / "out"
    stream.write_bytes(b"".join(fragments))
    folder.mkdir()
    # Room for the stream but not for the finished file beside it.
    size = int(stream.stat().st_size * 1.5)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        result = attempt(stream, folder)
        left = files(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert (result.returncode, result.stderr) == (7, "")
    assert "cannot be written (No space left on device" in result.stdout
    assert left == []


def test_a_folder_without_permission_is_refused(fragments: list[bytes]) -> None:
    # Root may write anywhere, so root tries as nobody, who cannot come into pytest's own temporary folder.
    user = 65_534 if os.geteuid() == 0 else 0
    with tempfile.TemporaryDirectory() as name:
        stream, folder = Path(name) / "stream", Path(name) / "out"
        Path(name).chmod(0o755)
        stream.write_bytes(b"".join(fragments))
        folder.mkdir(mode=0o555)
        result = attempt(stream, folder, user=user)
        assert (result.returncode, result.stderr) == (7, "")
        assert result.stdout.strip().endswith("cannot be written (permission denied)")
        assert files(folder) == []
