# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: health, readiness, metrics, ids, headers, logs; and the caps around every exchange."""

import re
import socket
import time
from contextlib import suppress

import pytest


def test_open_routes(server):
    with server.client(None) as client:
        for path in ("/health", "/healthz", "/ping"):
            assert client.get(path).json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        for path in ("/metrics", "/version"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"


def test_answers_do_not_wait_for_acknowledgements(client):
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        client.get("/health")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.035  # a delayed acknowledgement takes 40 ms, every time


def test_metrics(client, sound):
    body = {"prompt": "a face", "input_audio": sound, "resolution": "128x128"}
    assert client.post("/api/ai/videos/generate", json=body).status_code == 200
    assert client.post("/api/ai/videos/generate", json={**body, "prompt": "engine"}).status_code == 500
    text = client.get("/metrics").text
    for name in (
        *('ltxrt_jobs_total{outcome="succeeded"}', 'ltxrt_jobs_total{outcome="failed"}'),
        *('ltxrt_stage_seconds_count{stage="denoise_2"}', "ltxrt_queue_wait_seconds_count"),
        *("ltxrt_real_time_factor_count", "ltxrt_worker_memory_bytes", 'ltxrt_http_requests_total{method="POST"'),
    ):
        (value,) = re.findall(rf"^{re.escape(name)}[^ ]* ([\d.e+]+)$", text, re.MULTILINE)[:1]
        assert float(value) > 0


def test_request_ids_and_headers(client):
    given = client.get("/health", headers={"X-Request-Id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    assert given.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in given.headers["content-security-policy"]
    assert re.fullmatch("[0-9a-f]{32}", client.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"])


def test_openapi(client):
    document = client.get("/openapi.json").json()
    assert {"/api/ai/videos/generate", "/v1/videos", "/v1/videos/stream"} <= document["paths"].keys()


def test_logs_hold_no_secrets(server, client, sound):
    body = {"prompt": "a face", "input_audio": sound, "resolution": "128x128"}
    url = client.post("/api/ai/videos/generate", json=body).json()["videos"][0]["url"]
    client.get(url)
    client.post("/api/ai/queue", json={**body, "input_audio": "https://127.0.0.1/?signature=private"})
    end = time.monotonic() + 10
    while '"status": 422, "milliseconds"' not in server.log.read_text().splitlines()[-1]:  # written after the answer
        assert time.monotonic() < end
        time.sleep(0.02)
    text = server.log.read_text()
    assert not [word for word in ("Bearer", "base64", "signature", url.split("/")[-2]) if word in text]
    lines = [line for line in server.lines() if line.get("event") == "http"]
    assert (lines[-1]["path"], lines[-1]["status"]) == ("/api/ai/queue", 422)


def test_results_need_their_whole_address(client, sound):
    body = {"prompt": "a face", "input_audio": sound, "resolution": "128x128"}
    url = client.post("/api/ai/videos/generate", json=body).json()["videos"][0]["url"]
    assert client.head(url).status_code == 200
    for wrong in (re.sub("/[^/]+/clip", "/wrong/clip", url), re.sub("/files/[^/]+/", "/files/unknown/", url)):
        assert client.get(wrong).status_code == 404


def test_uploads(server, client, speech):
    made = client.post("/v1/uploads", content=speech.read_bytes())
    assert made.status_code == 201
    body = {"prompt": "a face", "input_audio": made.json()["url"], "resolution": "128x128"}
    assert client.post("/api/ai/videos/generate", json=body).status_code == 200
    with server.client("other") as other:
        assert other.post("/api/ai/queue", json=body).status_code == 422
    assert client.post("/v1/uploads", content=b"").status_code == 400


def test_a_small_server_says_no(start_server, sound):
    body = {"prompt": "steps=300 pause=0.1", "input_audio": sound, "resolution": "128x128"}
    caps = {"max_body_bytes": len(sound) + 500, "max_queued": 1, "max_jobs_per_key": 2, "max_uploads": 1}
    with (
        start_server(**caps, max_frames_times_pixels=12 * 128 * 128, drain_seconds=0.1) as server,
        server.client() as client,
    ):
        large = client.post("/api/ai/queue", json={**body, "negative_prompt": "x" * 1000})
        assert (large.status_code, large.json()["error"]["type"]) == (413, "body_too_large")

        def chunks():
            for _ in range(100):
                yield sound.encode()

        assert client.post("/v1/uploads", content=chunks()).status_code == 413
        wide = client.post("/api/ai/queue", json={**body, "resolution": "128x192"})
        assert (wide.status_code, wide.json()["error"]["type"]) == (422, "invalid_params")
        assert client.post("/v1/uploads", content=b"x").status_code == 201
        assert client.post("/v1/uploads", content=b"x").status_code == 503
        first = client.post("/api/ai/queue", json=body).json()["generations"][0]["generation_id"]
        while client.get(f"/api/ai/queue/{first}").json()["status"] == "queued":
            pass
        assert client.post("/api/ai/queue", json=body).status_code == 200
        with server.client("other") as other:
            full = other.post("/api/ai/queue", json=body)
            assert (full.status_code, full.json()["error"]["type"]) == (503, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
        client.delete(f"/api/ai/queue/{client.get('/api/ai/queue').json()['generations'][0]['generation_id']}")
        client.post("/api/ai/queue", json=body)
        many = client.post("/api/ai/queue", json=body)
        assert many.status_code in (429, 503)
        assert many.headers["retry-after"]


def test_bodies_that_never_end(start_server, sound):
    """One that drips and one that pours, announced and not; the server answers, hangs up and keeps nothing."""
    caps = {"max_body_seconds": 0.5, "max_body_bytes": 100_000, "max_audio_bytes": 50_000, "max_image_bytes": 50_000}
    head = "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    chunked, long = "Transfer-Encoding: chunked\r\n\r\n", "Content-Length: 90000\r\n\r\n"
    cases = (
        *(("/v1/uploads", chunked, b"1\r\nx\r\n", 0.05, b" 408 "), ("/v1/uploads", long, b"x", 0.05, b" 408 ")),
        *(("/api/ai/queue", chunked, b"1\r\n \r\n", 0.05, b" 408 "), ("/v1/videos", long, b" ", 0.05, b" 408 ")),
        ("/v1/uploads", chunked, b"1000\r\n" + b"x" * 0x1000 + b"\r\n", 0, b" 413 "),
        ("/api/ai/queue", chunked, b"1000\r\n" + b" " * 0x1000 + b"\r\n", 0, b" 413 "),
    )
    with start_server(**caps) as server:
        port = int(server.url.rpartition(":")[2])
        for path, length, piece, pause, status in cases:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall((head.format(path=path) + length).encode())
                answer = poured(connection, piece, pause)
            assert status in answer.partition(b"\r\n")[0] + b" ", (path, answer)
        with server.client() as client:
            assert client.get("/health").status_code == 200
        assert [list((server.data / name).iterdir()) for name in ("incoming", "uploads")] == [[], []]


def poured(connection, piece, pause):
    """Send until the other side has had enough; what it said."""
    connection.setblocking(False)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            return connection.recv(4096)
        with suppress(OSError):
            connection.send(piece)
        time.sleep(pause)
    raise AssertionError("it listens for ever")


def test_unknown_paths_give_problem_details(client):
    answer = client.get("/nowhere")
    assert answer.json()["type"] == "urn:ltxrt:problem:resource_not_found"
    assert answer.json()["status"] == 404
    with pytest.raises(KeyError):
        _ = answer.json()["error"]
