# SPDX-License-Identifier: Apache-2.0
"""The inference hub's shape over real HTTP: sync, queue, events, models, refusals."""

import base64
import json
import threading
import time

import pytest

from ltxrt.readback import check_clip
from ltxrt.request import DEFAULT_NEGATIVE_PROMPT, Request


def body(sound, **fields):
    return {
        "model": "ltx-2-3-quality-audio-to-video",
        "prompt": "a face",
        "input_audio": sound,
        "resolution": "128x128",
        "seed": 3,
        **fields,
    }


def until(client, generation_id, *states, seconds=30):
    end = time.monotonic() + seconds
    while True:
        job = client.get(f"/api/ai/queue/{generation_id}").json()
        if job["status"] in states:
            return job
        assert time.monotonic() < end, job
        time.sleep(0.05)


def queued(client, sound, **fields):
    answer = client.post("/api/ai/queue", json=body(sound, **fields))
    assert answer.status_code == 200, answer.text
    (generation,) = answer.json()["generations"]
    assert generation["status"] == "queued"
    return generation["generation_id"]


def test_generate_waits_for_the_clip(client, sound, tmp_path):
    answer = client.post("/api/ai/videos/generate", json=body(sound))
    assert answer.status_code == 200, answer.text
    result = answer.json()
    assert (result["model"], result["seed"]) == ("ltx-2-3-quality-audio-to-video", 3)
    assert abs(result["created"] - time.time()) < 60
    assert "denoise_2;dur=" in answer.headers["server-timing"]
    clip = client.get(result["videos"][0]["url"], headers={"Authorization": ""})
    assert clip.headers["content-type"] == "video/mp4"
    (tmp_path / "clip.mp4").write_bytes(clip.content)
    assert check_clip(tmp_path / "clip.mp4").frames == 12  # half a second at 24 frames


def test_generate_as_text(client, sound):
    answer = client.post("/api/ai/videos/generate", json=body(sound, response_format="b64_json"))
    assert base64.b64decode(answer.json()["videos"][0]["b64_json"])[4:8] == b"ftyp"


def test_queue(client, sound):
    name = queued(client, sound, target_namespace="mine")
    job = until(client, name, "succeeded")
    assert (job["model_name"], job["media_type"], job["error_message"]) == (body("")["model"], "video", None)
    assert job["enqueued_at"] <= job["started_at"] <= job["completed_at"]
    assert (job["prompt"], job["seed"], job["negative_prompt"]) == ("a face", 3, DEFAULT_NEGATIVE_PROMPT)
    assert job["input_audio"] == "data:audio/wav;…"
    assert set(Request.model_fields) <= set(job)
    assert client.get(job["result_url"]).status_code == 200
    listed = client.get("/api/ai/queue", params={"status": "succeeded"}).json()
    assert name in [job["generation_id"] for job in listed["generations"]]
    assert listed["count"] == len(listed["generations"])
    assert name not in [job["generation_id"] for job in client.get("/api/ai/queue").json()["generations"]]


def test_several_generations_have_their_own_seeds(client, sound):
    answer = client.post("/api/ai/queue", json=body(sound, num_generations=3)).json()
    names = [generation["generation_id"] for generation in answer["generations"]]
    jobs = [until(client, name, "succeeded") for name in names]
    assert [job["seed"] for job in jobs] == [3, 4, 5]


def test_cancel_waiting_and_running(client, sound):
    running = queued(client, sound, prompt="steps=300 pause=0.1")
    waiting = queued(client, sound)
    until(client, running, "processing")
    for name in (waiting, running):
        answer = client.delete(f"/api/ai/queue/{name}")
        assert answer.json() == {"status": "success", "generation_id": name}
    assert client.get(f"/api/ai/queue/{waiting}").json()["status"] == "cancelled"
    until(client, running, "cancelled", seconds=5)
    client.delete(f"/api/ai/queue/{running}")
    assert client.get(f"/api/ai/queue/{running}").json()["status"] == "cancelled"


def test_a_caller_who_goes_away_cancels(server, client, sound):
    with server.client() as impatient, pytest.raises(Exception, match="timed out"):
        impatient.post("/api/ai/videos/generate", json=body(sound, prompt="steps=300 pause=0.1"), timeout=3)
    end = time.monotonic() + 10
    while client.get("/api/ai/queue").json()["count"]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_idempotency_key(client, sound):
    key = {"Idempotency-Key": "once"}
    answers = [client.post("/api/ai/queue", json=body(sound), headers=key).json() for _ in range(2)]
    assert answers[0]["generations"][0]["generation_id"] == answers[1]["generations"][0]["generation_id"]
    other = client.post("/api/ai/queue", json=body(sound, seed=4), headers=key)
    assert other.status_code == 422
    assert other.json()["error"]["type"] == "idempotency_mismatch"


def test_events(server, client, sound):
    got, awaited, opened = [], [], threading.Event()

    def listen():
        with server.client() as listener, listener.stream("GET", "/api/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            opened.set()
            for line in stream.iter_lines():
                got.append(line)
                if line.startswith("data:") and '"succeeded"' in line and any(name in line for name in awaited):
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    assert opened.wait(10)
    time.sleep(0.3)
    failed = queued(client, sound, prompt="engine")
    name = queued(client, sound, prompt="steps=2")
    awaited.append(name)
    thread.join(30)
    assert not thread.is_alive()
    # As the documented shell client reads it: whole lines, compact JSON.
    assert "event: media_generation_completed" in got
    data = [json.loads(line[6:]) for line in got if line.startswith("data: ")]
    assert f'"generation_id":"{name}"' in "".join(got)
    ends = {event["generation_id"]: event for event in data if event["status"] in ("succeeded", "failed")}
    assert ends[failed]["error"] == "denoiser: out of memory"
    assert client.get(ends[name]["url"]).status_code == 200
    assert any(event["status"] == "progress" and event["stage"] == "denoise_2" for event in data)


def test_models(client):
    (model,) = client.get("/api/ai/models").json()["data"]
    assert client.get(f"/api/ai/models/{model['id']}").json() == model
    assert client.get("/api/ai/models/search", params={"search": "AUDIO"}).json()["data"] == [model]
    assert client.get("/api/ai/models/search", params={"search": "cooking"}).json()["data"] == []
    schema = model["json_request_schema"]
    assert schema == model["request_schema"]
    assert list(schema["properties"]) == schema["x-order"] == list(Request.model_fields)
    assert schema["required"] == ["prompt", "input_audio"]
    assert schema["properties"]["input_audio"]["renderType"] == "audio-url"
    assert (
        schema["properties"]["num_frames"] | {"default": 121, "minimum": 9, "maximum": 481}
        == (schema["properties"]["num_frames"])
    )
    assert client.get("/api/ai/models/other").json()["error"]["message"] == "Model not found: other"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"num_frames": 482}, "num_frames"),
        ({"num_frames": "121"}, "num_frames"),
        ({"resolution": "700x700"}, "resolution"),
        ({"image_strength": 2}, "image_strength"),
        ({"loras": []}, "loras"),
        ({"input_audio": "/etc/passwd"}, "input_audio"),
        ({"input_audio": "data:audio/wav;base64,AAAA"}, "input_audio"),
        ({"input_image": "https://127.0.0.1/x.png"}, "input_image"),
        ({"frames_per_second": 1, "num_frames": 481, "match_audio_length": "no"}, "match_audio_length"),
    ],
)
def test_refusals_name_the_field(client, sound, change, field):
    answer = client.post("/api/ai/queue", json=body(sound) | change)
    assert answer.status_code == 422
    refused = answer.json()
    assert refused["status"] == "error"
    assert refused["error"]["type"] == refused["status_message"]
    assert refused["error"]["detail"].startswith(f"{field}")


def test_other_refusals(client, sound, server):
    assert client.post("/api/ai/queue", json=body(sound, model="other")).status_code == 404
    assert client.post("/api/ai/queue", json=body(sound, model={})).status_code == 404
    assert client.post("/api/ai/videos/generate", json=body(sound, response_format=[])).status_code == 422
    assert client.post("/api/ai/queue", json=body(sound, num_generations=5)).status_code == 422
    assert client.post("/api/ai/queue", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/api/ai/queue", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    half = rb'{"prompt": "\ud800", "input_audio": "x"}'
    assert client.post("/api/ai/queue", content=half, headers={"Content-Type": "application/json"}).status_code == 400
    assert client.get("/api/ai/queue", params={"status": "odd"}).status_code == 422
    assert client.get("/api/ai/queue/unknown").json()["error"]["type"] == "resource_not_found"
    assert client.get("/api/ai/nothing").status_code == 404
    assert client.put("/api/ai/queue").status_code == 405
    for key in (None, "wrong", ""):
        with server.client(key) as stranger:
            answer = stranger.get("/api/ai/queue")
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthenticated")


def test_jobs_are_their_owner_s(server, client, sound):
    name = queued(client, sound)
    with server.client("other") as other:
        assert other.get(f"/api/ai/queue/{name}").status_code == 404
        assert other.delete(f"/api/ai/queue/{name}").status_code == 404
        assert other.get("/api/ai/queue").json()["count"] == 0
    until(client, name, "succeeded")
