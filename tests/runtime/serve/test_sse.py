# SPDX-License-Identifier: Apache-2.0
"""Events of one job: every step, in order, again from where a caller lost them, and then the end."""

import json


def fields(sound, **change):
    return {"prompt": "a face", "input_audio": sound, "resolution": "128x128", "seed": 3, **change}


def read(client, path, last=None):
    """Events as (id, name, data), until the server ends the stream."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with client.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = b"".join(answer.iter_bytes())
    assert b"\r" not in text
    events = []
    for block in text.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if lines:
            events.append((lines.get("id"), lines["event"], json.loads(lines["data"])))
    return events


def test_events_of_a_job_and_reconnect(client, sound):
    name = client.post("/v1/videos", json=fields(sound)).json()["id"]
    path = f"/v1/videos/{name}/events"
    events = read(client, path)
    names = [event[1] for event in events if event[0]]
    assert names[:2] == ["queued", "processing"]
    assert names[-1] == "succeeded"
    steps = [data for _, kind, data in events if kind == "progress"]
    assert [step["stage"] for step in steps][-1] == "decode"
    assert all({"step", "steps", "progress", "seconds_left"} <= step.keys() for step in steps)
    assert events[-1][2]["result"]["seed"] == 3
    numbers = [int(event[0]) for event in events if event[0]]
    assert numbers == sorted(set(numbers))
    again = read(client, path, last=numbers[4])
    assert [int(event[0]) for event in again if event[0]] == numbers[5:]
    assert read(client, path, last=numbers[-1]) == []


def test_position_of_a_waiting_job(server, client, sound):
    first = client.post("/v1/videos", json=fields(sound, prompt="steps=600 pause=0.1")).json()["id"]
    second = client.post("/v1/videos", json=fields(sound)).json()["id"]
    kinds = []
    with server.client() as listener, listener.stream("GET", f"/v1/videos/{second}/events") as answer:
        for line in answer.iter_lines():
            if line == "event: position":
                client.delete(f"/v1/videos/{first}")
            if line.startswith("event: "):
                kinds.append(line[7:])
            if kinds[-1:] == ["position"] and line.startswith("data: "):
                assert json.loads(line[6:])["queue_position"] in (0, 1)
    assert list(dict.fromkeys(kinds)) == ["queued", "position", "processing", "progress", "succeeded"]


def test_refusals(client):
    assert client.get("/v1/videos/unknown/events").status_code == 404
    assert client.get("/api/events", headers={"Last-Event-ID": "x"}).status_code == 400


def test_a_long_past_is_read_in_parts(client, sound):
    """More events than are read at once: none is lost, none comes twice."""
    name = client.post("/v1/videos", json=fields(sound, prompt="steps=450 pause=0.001")).json()["id"]
    client.get(f"/v1/videos/{name}/events").read()
    events = read(client, f"/v1/videos/{name}/events")
    numbers = [int(event[0]) for event in events if event[0]]
    assert len(numbers) > 450
    assert numbers == sorted(set(numbers))
    assert events[-1][1] == "succeeded"
