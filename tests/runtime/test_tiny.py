# SPDX-License-Identifier: Apache-2.0
"""The product itself on the bundle that ships with it: real networks, real codecs, the whole way."""

import subprocess
import sys
from pathlib import Path

import pytest

from ltxrt.media import bundled_speech
from ltxrt.pipeline import Pipeline
from ltxrt.readback import check_clip
from ltxrt.request import Request
from ltxrt.result import Fragment, Progress, Result


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.open()


def speech(**fields: object) -> Request:
    return Request(**{"prompt": "A face speaks.", "input_audio": str(bundled_speech()), "seed": 7, **fields})


_RENDER = """
import hashlib, sys
from ltxrt import Pipeline, Request
request = Request(prompt="A face speaks.", input_audio=sys.argv[1], seed=int(sys.argv[2]), num_frames=17,
                  match_audio_length=False, resolution="128x128", video_quality="low")
print(hashlib.sha256(b"".join(Pipeline.open().generate(request))).hexdigest())
"""


def rendered_elsewhere(seed: int) -> str:
    command = [sys.executable, "-c", _RENDER, str(bundled_speech()), str(seed)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_same_request_same_bytes_in_two_processes_and_another_seed_others() -> None:
    first, second, other = rendered_elsewhere(7), rendered_elsewhere(7), rendered_elsewhere(8)
    assert first == second
    assert first != other


@pytest.mark.parametrize("quality", ["low", "medium", "high", "maximum"])
def test_every_preset_makes_a_checked_clip(pipeline: Pipeline, tmp_path: Path, quality: str) -> None:
    output = tmp_path / "clip.mp4"
    request = speech(video_quality=quality, num_frames=25, match_audio_length=False, resolution="128x192")
    result = pipeline.render(request, output)
    report = check_clip(output, result.expectation)
    assert report.ok, report.problems
    assert (report.frames, report.width, report.height) == (25, 128, 192)
    assert list(tmp_path.iterdir()) == [output]


def test_one_frame_clip_and_no_audio_track(pipeline: Pipeline, tmp_path: Path) -> None:
    """Five seconds at one frame a second; the model makes 9 frames, the clip has 5."""
    output = tmp_path / "clip.mp4"
    result = pipeline.render(speech(frames_per_second=1, generate_audio=False, resolution="128x128"), output)
    report = check_clip(output, result.expectation)
    assert report.ok, report.problems
    assert (report.frames, result.frames_generated, report.audio_samples) == (5, 9, None)


def test_the_stream_leaves_early_and_costs_little(pipeline: Pipeline) -> None:
    """First fragment before the last chunk is decoded and within 300 ms of the last step; Python under 10 %."""
    request = speech(resolution="192x192")
    for _ in range(2):  # the second run is warm: sessions are loaded
        events = list(pipeline.events(request))
    result = events[-1]
    assert isinstance(result, Result)
    assert result.frames == 118
    marks = result.marks_seconds
    assert marks["last_denoise_step"] < marks["first_fragment"] < marks["last_chunk_decoded"]
    assert marks["first_fragment"] - marks["last_denoise_step"] < 0.3
    elsewhere = sum(result.backend_seconds.values()) + result.stage_seconds["plan"]
    assert result.wall_seconds - elsewhere < 0.1 * result.wall_seconds
    assert sum(isinstance(event, Fragment) for event in events) > 2


def test_a_clip_shorter_than_the_look_ahead_leaves_in_pieces(pipeline: Pipeline) -> None:
    """41 frames are one call of the decoder; encoding them all first would only add to the wait."""
    request = speech(resolution="128x128", match_audio_length=False, num_frames=41)
    events = list(pipeline.events(request))
    encoded = [event for event in events if isinstance(event, Progress) and event.stage == "decode"]
    assert [event.step for event in encoded] == [32, 41]
    first = next(index for index, event in enumerate(events) if isinstance(event, Fragment))
    assert first < events.index(encoded[-1])
