# SPDX-License-Identifier: Apache-2.0
"""The queue and run routes with the stock client of fal, which a TLS proxy would bring to these addresses."""

import fal_client
import pytest
from fal_client import client as fal_module

APP = "fal-ai/ltx-2.3-quality/audio-to-video"


@pytest.fixture
def stock(server, monkeypatch):
    monkeypatch.setattr(fal_module, "RUN_URL_FORMAT", f"{server.url}/fal/run/")
    monkeypatch.setattr(fal_module, "QUEUE_URL_FORMAT", f"{server.url}/fal/queue/")
    client = fal_client.SyncClient(key="secret")
    yield client
    client._client.close()


def arguments(sound, **fields):
    return {"prompt": "a face", "audio_url": sound, "resolution": "128x128", "seed": 3, **fields}


def test_submit_status_result(stock, sound, client):
    handle = stock.submit(APP, arguments(sound, guidance_scale=1))
    seen = [type(status).__name__ for status in handle.iter_events(with_logs=True, interval=0.05)]
    assert seen[-1] == "Completed"
    assert set(seen) <= {"Queued", "InProgress", "Completed"}
    output = handle.get()
    assert (output["seed"], output["prompt"], output["video"]["content_type"]) == (3, "a face", "video/mp4")
    clip = client.get(output["video"]["url"])
    assert len(clip.content) == output["video"]["file_size"]
    assert stock.result(APP, handle.request_id) == output


def test_subscribe(stock, sound):
    positions = []
    output = stock.subscribe(APP, arguments(sound), on_queue_update=positions.append)
    assert output["video"]["file_name"] == "clip.mp4"
    assert positions


def test_run(stock, sound):
    assert stock.run(APP, arguments(sound))["seed"] == 3


def test_cancel(stock, sound):
    handle = stock.submit(APP, arguments(sound, prompt="steps=300 pause=0.1"))
    handle.cancel()
    status = [*handle.iter_events(interval=0.05)][-1]
    assert (status.error, status.error_type) == ("the job was cancelled", "cancelled")
    with pytest.raises(fal_client.FalClientError):
        handle.get()


@pytest.mark.parametrize("change", [{"guidance_scale": 3}, {"num_frames": 5}, {"audio_url": "/etc/passwd"}])
def test_refusals(client, sound, change):
    answer = client.post(f"/fal/queue/{APP}", json=arguments(sound, **change))
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    name = {"audio_url": "input_audio"}.get(*change, *change)
    assert detail["loc"] == ["body", name]
    assert name in detail["msg"]
    assert client.post(f"/fal/queue/{APP}?fal_webhook=https://x.example", json=arguments(sound)).status_code == 422


def test_key_scheme(server, sound):
    with server.client(None) as client:
        answer = client.get(
            "/fal/queue/fal-ai/ltx-2.3-quality/requests/x/status", headers={"Authorization": "Key secret"}
        )
        assert answer.status_code == 404
        answer = client.get("/fal/queue/fal-ai/ltx-2.3-quality/requests/x/status")
        assert (answer.status_code, answer.json()["error_type"]) == (401, "unauthenticated")
