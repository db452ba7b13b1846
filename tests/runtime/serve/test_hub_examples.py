# SPDX-License-Identifier: Apache-2.0
"""The three ways of calling that the hub documents, in the shell and in Python, with only host and key changed.

Commands, bodies and addresses are the documented ones, each in its minimal, basic and complete form; so is what the
shell's client relies on: whole lines of the event stream, compact JSON, a ``generation_id`` that ``jq`` finds. The
documented addresses of audio and image are not asked for: what the server fetches is a double that knows these two.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress

import httpx2
import pytest
from PIL import Image

AUDIO = "https://example.com/audio.mp3"
IMAGE = "https://hub.oxen.ai/api/repos/elau/assets/file/main/bloxy/bloxy_cropped_512x512.png"
MODEL = "ltx-2-3-quality-audio-to-video"
MINIMAL = {"model": MODEL, "prompt": "<prompt>", "input_audio": AUDIO}
BASIC = {**MINIMAL, "input_image": IMAGE}
COMPLETE = {
    **BASIC,
    "match_audio_length": True,
    "num_frames": 121,
    "resolution": "auto",
    "frames_per_second": 24,
    "image_strength": 0.7,
    "generate_audio": True,
    "video_quality": "high",
}
BODIES = {"minimal": MINIMAL, "basic": BASIC, "complete": COMPLETE}
TERMINAL = ("succeeded", "failed", "cancelled")

HEADERS = """-H "Content-Type: application/json" -H "Authorization: Bearer $OXEN_API_KEY" """
ENQUEUE = f"""GEN_ID=$(curl -s -X POST $HOST/api/ai/queue {HEADERS} -d '%s' | jq -r '.generations[0].generation_id')
"""
SYNC = f"curl -X POST $HOST/api/ai/videos/generate {HEADERS} -d '%s'"
POLL = (
    ENQUEUE
    + """while true; do
  STATUS=$(curl -s -H "Authorization: Bearer $OXEN_API_KEY" "$HOST/api/ai/queue/$GEN_ID" | jq -r '.status')
  case $STATUS in succeeded|failed|cancelled) break;; esac
  sleep 0.1
done
curl -s -H "Authorization: Bearer $OXEN_API_KEY" "$HOST/api/ai/queue/$GEN_ID" | jq ."""
)
EVENTS = (
    ENQUEUE
    + r"""curl -sN -H "Authorization: Bearer $OXEN_API_KEY" $HOST/api/events | awk -v id="$GEN_ID" '
  /^event: media_generation_completed$/ { wanted = 1; next }
  /^data: / && wanted {
    if (index($0, "\"generation_id\":\"" id "\"")) { print substr($0, 7); exit }
    wanted = 0
  }
' | jq ."""
)

needs_shell = pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "jq", "awk", "bash"))), reason="curl, jq or awk is not installed"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, serve_in, speech):
    """A server for which the documented files are what the world holds."""
    folder = tmp_path_factory.mktemp("hub")
    picture = folder / "picture.png"
    Image.new("RGB", (512, 512), "gold").save(picture)
    prelude = f"""
from pathlib import Path
import ltxrt.serve.inputs
def fetch(url, target, max_bytes, rules, resolver):
    target.write(Path({{{AUDIO!r}: {str(speech)!r}, {IMAGE!r}: {str(picture)!r}}}[url]).read_bytes())
ltxrt.serve.inputs.fetch = fetch
"""
    with serve_in(folder, prelude=prelude) as server:
        yield server


def shell(script, hub):
    """The JSON that a script prints; a curl that would listen on until the stream's next line is ended then."""
    environment = {**os.environ, "HOST": hub.url, "OXEN_API_KEY": "secret"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": environment, "start_new_session": True}
    with subprocess.Popen(["bash", "-c", script], **options) as process:
        said = b""
        while piece := process.stdout.read1():
            said += piece
            with suppress(ValueError):
                answer = json.loads(said)
                os.killpg(process.pid, signal.SIGTERM)
                return answer
    raise AssertionError(f"no JSON: {said}")


def is_clip(url):
    with httpx2.Client() as anyone:  # the result's address needs no key
        answer = anyone.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.content[4:8] == b"ftyp"
    return True


@needs_shell
@pytest.mark.parametrize("form", BODIES)
def test_sync_in_the_shell(hub, form):
    answer = shell(SYNC % json.dumps(BODIES[form], indent=2), hub)
    assert answer["model"] == MODEL
    assert is_clip(answer["videos"][0]["url"])


@needs_shell
@pytest.mark.parametrize("form", ["minimal", "complete"])
def test_queue_and_poll_in_the_shell(hub, form):
    generation = shell(POLL % json.dumps(BODIES[form], indent=2), hub)
    assert (generation["status"], generation["error_message"]) == ("succeeded", None)
    assert {**generation, **BODIES[form]} | {"model_name": MODEL} == {**generation, **BODIES[form]}
    assert is_clip(generation["result_url"])


@needs_shell
@pytest.mark.parametrize("form", ["minimal", "complete"])
def test_events_in_the_shell(hub, form):
    event = shell(EVENTS % json.dumps(BODIES[form], indent=2), hub)
    assert (event["status"], event["media_type"], event["model"]) == ("succeeded", "video", MODEL)
    assert is_clip(event["url"])


@needs_shell
def test_model_batch_and_cancel_in_the_shell(hub):
    key = '-H "Authorization: Bearer $OXEN_API_KEY"'
    model = shell(f"curl {key} $HOST/api/ai/models/{MODEL}", hub)
    assert model["json_request_schema"]["required"] == ["prompt", "input_audio"]
    batch = json.dumps({**MINIMAL, "num_generations": 4})
    script = f"""curl -s -X POST $HOST/api/ai/queue {HEADERS} -d '{batch}' >/dev/null
while true; do
  COUNT=$(curl -s {key} "$HOST/api/ai/queue?model={MODEL}" | jq .count)
  [ "$COUNT" -eq 0 ] && break
  sleep 0.1
done; echo "$COUNT" """
    assert shell(script, hub) == 0
    slow = json.dumps({**MINIMAL, "prompt": "steps=300 pause=0.1"})
    cancelled = shell(f'{ENQUEUE % slow} curl -s -X DELETE {key} "$HOST/api/ai/queue/$GEN_ID"', hub)
    assert cancelled["status"] == "success"


# --- the same in Python, which always runs ---


def sync(client, body):
    answer = client.post("/api/ai/videos/generate", json=body)
    answer.raise_for_status()
    return answer.json()["videos"][0]["url"]


def enqueued(client, body):
    answer = client.post("/api/ai/queue", json=body)
    answer.raise_for_status()
    return answer.json()["generations"][0]["generation_id"]


def polled(client, body):
    name = enqueued(client, body)
    while (generation := client.get(f"/api/ai/queue/{name}").json())["status"] not in TERMINAL:
        time.sleep(0.05)
    assert generation["status"] == "succeeded", generation
    return generation["result_url"]


COMPLETED = "event: media_generation_completed"


def completions(client):
    """The data of each completion, as the documented client reads the stream."""
    with client.stream("GET", "/api/events") as stream:
        event = None
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event == "media_generation_completed":
                yield json.loads(line.removeprefix("data: "))


def streamed(client, body):
    """Queue first and listen then, which the documented clients of the model's page do."""
    name = enqueued(client, body)
    time.sleep(0.5)  # the clip is finished by now, or nearly
    return next(event for event in completions(client) if event["generation_id"] == name)["url"]


@pytest.mark.parametrize(("way", "form"), [(sync, "basic"), (polled, "complete"), (streamed, "minimal")])
def test_in_python(hub, way, form):
    with hub.client() as client:
        assert is_clip(way(client, BODIES[form]))


def test_listening_first_in_python(hub):
    """The way of the queue's own page: every completion once, and none for what was cancelled."""
    seen, names, opened = [], [], threading.Event()

    def listen():
        with hub.client() as client, client.stream("GET", "/api/events") as stream:
            opened.set()
            for line in stream.iter_lines():
                seen.append(line)
                if len(names) == 3 and f'"{names[2]}","status":"succeeded"' in line:
                    return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert opened.wait(10)
    with hub.client() as client:
        cancelled = enqueued(client, {**MINIMAL, "prompt": "steps=300 pause=0.1"})
        client.delete(f"/api/ai/queue/{cancelled}")
        names += [enqueued(client, MINIMAL) for _ in range(3)]
    listener.join(30)
    assert not listener.is_alive()
    completed = [json.loads(line[6:]) for line, event in zip(seen[1:], seen, strict=False) if event == COMPLETED]
    assert [each["generation_id"] for each in completed if each["generation_id"] in (*names, cancelled)] == names


def test_what_was_documented_wrongly_is_said(hub):
    """A field of another model: the hub fails such a job later, here the call itself says so."""
    with hub.client() as client:
        answer = client.post("/api/ai/queue", json={**MINIMAL, "duration": 5})
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_params")
        assert "duration" in answer.json()["error"]["detail"]


def test_pictures_of_the_documented_size(hub):
    buffer = io.BytesIO()
    Image.new("RGB", (512, 512)).save(buffer, "PNG")
    with hub.client() as client:
        upload = client.post("/v1/uploads", content=buffer.getvalue()).json()["url"]
        assert is_clip(sync(client, {**MINIMAL, "input_image": upload}))
