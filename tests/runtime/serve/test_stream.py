# SPDX-License-Identifier: Apache-2.0
"""The clip while it is made: its first bytes come before its end, and whoever goes away cancels it."""

import io
import time

import av
import pytest

from ltxrt.mp4_boxes import top_level_boxes


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
