# SPDX-License-Identifier: Apache-2.0
"""One pipeline serves several threads at once, and each gets what it would have got alone."""

import hashlib
import threading
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ltxrt.errors import MediaError
from ltxrt.pipeline import Pipeline
from ltxrt.readback import check_clip
from ltxrt.request import Request


@pytest.fixture
def speech(tmp_path):
    path = tmp_path / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).integers(-5000, 5000, 20_000, np.int16).tobytes())
    return path


@pytest.fixture
def pipeline(toy_bundle):
    return Pipeline.open(toy_bundle, threads=1)


def requests(speech):
    sizes, rates = ("128x128", "192x128", "128x192"), (24, 12.5, 29.97)
    return [
        Request(
            prompt="a face " * (index + 1),
            input_audio=speech,
            seed=index,
            resolution=sizes[index % 3],
            frames_per_second=rates[index // 2 % 3],
            match_audio_length=False,
            num_frames=9 + 4 * index,
            video_quality=("low", "high")[index % 2],
        )
        for index in range(6)
    ]


def digest(pipeline, request):
    return hashlib.sha256(b"".join(pipeline.generate(request))).hexdigest()


def test_threads_get_what_they_would_have_got_alone(pipeline, toy_bundle, speech):
    everyone = requests(speech)
    alone = [digest(Pipeline.open(toy_bundle, threads=1), request) for request in everyone]
    assert len(set(alone)) == len(alone)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda request: digest(pipeline, request), everyone * 2)) == alone * 2


def test_interleaved_clips_do_not_mix(pipeline, speech):
    everyone = requests(speech)[:3]
    running = [pipeline.generate(request) for request in everyone]
    digests = [hashlib.sha256() for _ in running]
    # One piece of each in turn, from one thread.
    for _ in range(1000):
        for stream, found in zip(running, digests, strict=True):
            found.update(next(stream, b""))
    assert [found.hexdigest() for found in digests] == [digest(pipeline, request) for request in everyone]


def test_a_refused_and_a_cancelled_clip_disturb_nobody(pipeline, speech):
    request = requests(speech)[3]
    alone = digest(pipeline, request)
    done = threading.Event()

    def disturb():
        while not done.is_set():
            with pytest.raises(MediaError):
                pipeline.generate(request.model_copy(update={"input_audio": "missing"}))
            stream = pipeline.generate(request)
            next(stream)
            stream.close()

    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        found = [digest(pipeline, request) for _ in range(3)]
        done.set()
        disturbing.result()
    assert found == [alone] * 3


def test_two_clips_of_one_name_leave_one_whole_clip(pipeline, speech, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    request = requests(speech)[1]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: pipeline.render(request, folder / "clip.mp4"), range(2)))
    assert [path.name for path in folder.iterdir()] == ["clip.mp4"]
    assert check_clip(folder / "clip.mp4", results[0].expectation).ok
