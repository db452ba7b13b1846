# SPDX-License-Identifier: Apache-2.0
"""``/v1/videos`` with the stock client of OpenAI, and by hand what that client does not do."""

import io
import warnings

import openai
import pytest
from PIL import Image

from ltxrt.readback import check_clip


@pytest.fixture(autouse=True)
def _quiet():
    # The client's own notes about the end of the hosted service.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture
def stock(server):
    with openai.OpenAI(api_key="secret", base_url=f"{server.url}/v1", max_retries=0) as opened:
        yield opened


def extra(sound, **fields):
    return {"input_audio": sound, "seed": 3, **fields}


def test_create_and_poll_and_download(stock, sound, tmp_path):
    video = stock.videos.create_and_poll(
        model="ltx-2-3-quality-audio-to-video",
        prompt="a face",
        size="128x192",
        extra_body=extra(sound, match_audio_length=True, image_strength=0.5),
    )
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "128x192", "0.5")
    assert video.created_at <= video.completed_at < video.expires_at
    assert video.error is None
    stock.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
    assert check_clip(tmp_path / "clip.mp4").frames == 12
    assert stock.videos.retrieve(video.id).id == video.id
    assert video.id in [each.id for each in stock.videos.list(limit=100)]
    assert stock.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        stock.videos.retrieve(video.id)


def test_seconds_and_a_picture_as_file(stock, sound):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    video = stock.videos.create_and_poll(
        prompt="a face",
        size="128x128",
        seconds="0.75",
        input_reference=("face.png", picture.getvalue(), "image/png"),
        extra_body=extra(sound),
    )
    assert (video.status, video.seconds, video.model_extra["result"]["image_strength"]) == ("completed", "0.75", 0.7)


def test_failures(stock, sound):
    video = stock.videos.create_and_poll(prompt="engine", size="128x128", extra_body=extra(sound))
    assert (video.status, video.error.code) == ("failed", "engine_error")
    with pytest.raises(openai.UnprocessableEntityError, match="resolution") as error:
        stock.videos.create(prompt="a face", size="720x1280", extra_body=extra(sound))
    assert (error.value.code, error.value.param) == ("invalid_params", "resolution")
    with pytest.raises(openai.NotFoundError):
        stock.videos.create(prompt="a face", model="sora-2", extra_body=extra(sound))
    with (
        openai.OpenAI(api_key="wrong", base_url=stock.base_url, max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.videos.list()


def test_json_references_and_sync(client, sound):
    fields = {"prompt": "a face", "size": "128x128", "audio_reference": {"audio_url": sound}, "fps": 12}
    answer = client.post("/v1/videos/sync", json=fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.content[4:8] == b"ftyp"
    assert float(answer.headers["x-inference-time-s"]) > 0
    video = client.get(f"/v1/videos/{answer.headers['x-job-id']}").json()
    assert (video["result"]["frames"], video["result"]["frames_per_second"]) == (6, "12")


def test_audio_as_file_part(client, speech):
    parts = {"input_audio": ("a.m3u8", speech.read_bytes())}
    answer = client.post("/v1/videos", data={"prompt": "a face", "resolution": "128x128"}, files=parts)
    assert answer.status_code == 200, answer.text
    assert answer.headers["openai-poll-after-ms"] == "500"
    cancelled = client.post(f"/v1/videos/{answer.json()['id']}/cancel").json()
    assert cancelled["id"] == answer.json()["id"]


def test_ranges(client, sound):
    fields = {"prompt": "a face", "size": "128x128", "input_audio": sound}
    made = client.post("/v1/videos/sync", json=fields)
    address = f"/v1/videos/{made.headers['x-job-id']}/content"
    part = client.get(address, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(made.content)}"
    assert part.headers["etag"]
    assert client.get(address, headers={"Range": "bytes=99999999-"}).status_code == 416


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"seconds": "long"}, 422),
        ({"seconds": "1e400"}, 422),
        ({"audio_reference": "{broken"}, 422),
        ({"input_audio": None}, 422),
        ({"response_format": "url"}, 422),
    ],
)
def test_refusals_are_problem_details(client, sound, fields, status):
    answer = client.post("/v1/videos", json={"prompt": "a face", "input_audio": sound, **fields})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:ltxrt:problem:{problem['error']['type']}"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["errors"][0]["pointer"] == f"/{problem['error']['param']}"


def test_pages(client, sound):
    assert client.get("/v1/videos", params={"limit": 0}).status_code == 422
    for _ in range(2):
        client.post("/v1/videos", json={"prompt": "a face", "size": "128x128", "input_audio": sound})
    first = client.get("/v1/videos", params={"limit": 1}).json()
    assert (len(first["data"]), first["has_more"]) == (1, True)
    second = client.get("/v1/videos", params={"limit": 1, "after": first["last_id"]}).json()
    assert second["data"][0]["id"] != first["last_id"]
    assert client.get("/v1/videos", params={"order": "asc"}).json()["data"][0]["id"] != first["first_id"]


def test_content_before_the_end(client, sound):
    fields = {"prompt": "steps=300 pause=0.1", "size": "128x128", "input_audio": sound}
    name = client.post("/v1/videos", json=fields).json()["id"]
    answer = client.get(f"/v1/videos/{name}/content")
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "not_finished")
    assert client.delete(f"/v1/videos/{name}").json()["deleted"]
