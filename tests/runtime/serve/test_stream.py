# SPDX-License-Identifier: Apache-2.0
"""The clip while it is made: its first bytes come before its end, and whoever goes away cancels it."""

import io
import time
from types import SimpleNamespace

import av
import pytest

from ltxrt.mp4_boxes import top_level_boxes
from ltxrt.serve.clip_job import live_name
from ltxrt.serve.problems import ProblemError
from ltxrt.serve.stream import _Growing


def fields(sound, **change):
    return {"prompt": "a face", "input_audio": sound, "resolution": "128x128", "seed": 3, **change}


def frames(data):
    with av.open(io.BytesIO(data), format="mp4") as container:
        return sum(1 for _ in container.decode(video=0))


def test_stream_is_a_fragmented_mp4(client, sound):
    with client.stream(
        "POST", "/v1/videos/stream", json=fields(sound, num_frames=49, match_audio_length=False)
    ) as answer:
        assert answer.status_code == 200
        assert (answer.headers["content-type"], answer.headers["x-seed"]) == ("video/mp4", "3")
        data = b"".join(answer.iter_bytes())
    kinds = [box.kind for box in top_level_boxes(memoryview(data))]
    assert kinds[:2] == ["ftyp", "moov"]
    assert kinds.count("moof") > 1
    assert frames(data) == 49
    job = client.get(f"/api/ai/queue/{answer.headers['x-job-id']}").json()
    assert job["status"] == "succeeded"


@pytest.mark.parametrize("path", ["/api/ai/videos/generate", "/v1/videos/sync"])
def test_accept_asks_for_the_stream(client, sound, path):
    answer = client.post(path, json=fields(sound), headers={"Accept": "video/mp4"})
    assert [box.kind for box in top_level_boxes(memoryview(answer.content))].count("moof") >= 1
    assert frames(answer.content) == 12


def test_a_failure_before_the_first_byte_is_an_error(client, sound):
    answer = client.post("/v1/videos/stream", json=fields(sound, prompt="engine"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "generation_failed")
    assert "engine_error" in answer.json()["detail"]


def test_who_goes_away_cancels(server, client, sound):
    with server.client() as impatient, pytest.raises(Exception, match="timed out"):
        impatient.post("/v1/videos/stream", json=fields(sound, prompt="steps=300 pause=0.1"), timeout=3)
    end = time.monotonic() + 10
    while client.get("/api/ai/queue").json()["count"]:
        assert time.monotonic() < end
        time.sleep(0.05)


class Files:
    """As much of a job layer as a stream reads."""

    def __init__(self, folder):
        self.folder = folder

    def live(self, job):
        return self.folder / live_name(job.attempts)

    def clip(self, job):
        return None


def attempt(number):
    return SimpleNamespace(attempts=number)


def test_a_stream_goes_on_in_the_next_attempt_s_file(tmp_path):
    clip = _Growing(Files(tmp_path))
    clip.follow(attempt(0))
    assert clip.read() == b""
    (tmp_path / "live-1.mp4").write_bytes(b"abcdef")
    clip.follow(attempt(1))
    assert clip.read() == b"abcdef"
    clip.follow(attempt(2))  # claimed again, and nothing written yet
    assert clip.read() == b""
    second = tmp_path / "live-2.mp4"
    second.write_bytes(b"abc")
    clip.follow(attempt(2))
    assert clip.read() == b""
    with pytest.raises(ProblemError, match="made again"):
        clip.require_attempt(2)
    second.write_bytes(b"abcdefgh")
    assert clip.read() == b"gh"
    clip.require_attempt(2)
    assert clip.sent == 8
    clip.close()


def test_a_stream_does_not_go_on_in_another_clip(tmp_path):
    clip = _Growing(Files(tmp_path))
    (tmp_path / "live-1.mp4").write_bytes(b"abcdef")
    clip.follow(attempt(1))
    clip.read()
    with pytest.raises(ProblemError, match="made again"):
        clip.require_attempt(2)
    (tmp_path / "live-2.mp4").write_bytes(b"abcdEFgh")
    clip.follow(attempt(2))
    with pytest.raises(ProblemError, match="made again"):
        clip.read()
    clip.close()
