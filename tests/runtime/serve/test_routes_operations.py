# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: health, readiness, metrics, ids, headers, logs; and the caps around every exchange."""

import asyncio
import base64
import io
import re
import socket
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ltxrt.serve.guard import Guard
from ltxrt.serve.metrics import Metrics


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


def test_what_nobody_foresaw_is_answered_and_counted_as_such():
    async def broken(scope, receive, send):
        raise KeyError("unforeseen")

    sent, counted = [], []

    class Counted(Metrics):
        def answered(self, method, status):
            counted.append(status)

    async def send(message):
        sent.append(message)

    async def exchange():
        scope = {"type": "http", "method": "GET", "path": "/v1/videos", "headers": [(b"x-request-id", b"abc")]}
        with pytest.raises(KeyError):  # for the log
            await Guard(broken, 1000, 10, Counted())(scope, None, send)

    asyncio.run(exchange())
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], counted) == (500, [500])
    assert headers[b"connection"] == b"close"  # the HTTP server hangs up, and a client must not count on it
    assert (headers[b"x-request-id"], headers[b"x-content-type-options"]) == (b"abc", b"nosniff")
    assert b"unforeseen" not in sent[1]["body"]


def test_who_goes_away_while_sending_is_no_failure(server, client):
    head = "POST {} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 100\r\n{}\r\n"
    form = "Content-Type: multipart/form-data; boundary=b\r\n"
    before = len(server.lines())
    for path, kind in (("/v1/uploads", ""), ("/api/ai/queue", ""), ("/v1/videos", form)):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(head.format(path, kind).encode() + b"--b")
            time.sleep(0.1)
    end = time.monotonic() + 10
    while len(lines := [line for line in server.lines()[before:] if line.get("event") == "http"]) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert [line["status"] for line in lines] == [499] * 3
    assert "Traceback" not in "".join(map(str, server.lines()[before:]))
    assert list((server.data / "uploads").glob("*")) == list((server.data / "uploads").glob("*.*"))


def test_a_server_without_keys_takes_no_calls_from_foreign_pages(start_server):
    """A browser on this machine may be shown a page that calls us: by a name that leads here, or across origins."""
    with (
        start_server(no_auth=True, api_keys=[], public_url="https://clips.example") as server,
        server.client() as client,
    ):
        own = f"127.0.0.1:{server.url.rpartition(':')[2]}"
        for host, origin, status in (
            *((own, None, 200), (own, f"http://{own}", 200), ("localhost:8000", "http://localhost:8000", 200)),
            *(("[::1]:8000", None, 200), ("clips.example", "https://clips.example", 200)),
            *((own, "https://clips.example", 200), (own, "https://evil.example", 403), (own, "null", 403)),
            *((own, "http://localhost:3000", 403), ("evil.example", None, 403), ("evil.example:8000", None, 403)),
            *(("evil.example", "http://evil.example", 403), ("[", None, 403), ("127.0.0.1.evil.example", None, 403)),
        ):
            headers = {"Host": host, **({"Origin": origin} if origin else {})}
            answer = client.get("/v1/videos", headers=headers)
            assert answer.status_code == status, headers
        assert answer.json()["error"]["type"] == "foreign_page"
        assert client.post("/v1/uploads", content=b"x", headers={"Origin": "https://evil.example"}).status_code == 403
        assert list((server.data / "uploads").iterdir()) == []


def test_a_key_s_limit_holds_for_calls_at_once(start_server, sound):
    body = {"prompt": "steps=300 pause=0.1", "input_audio": sound, "resolution": "128x128"}
    with start_server(max_jobs_per_key=2, drain_seconds=0.1) as server, ThreadPoolExecutor(8) as pool:
        clients = [server.client() for _ in range(8)]
        answers = list(pool.map(lambda client: client.post("/api/ai/queue", json=body).status_code, clients))
        assert sorted(answers) == [200] * 2 + [429] * 6
        assert clients[0].get("/api/ai/queue").json()["count"] == 2
        for client in clients:
            client.close()


def test_hosts_that_never_answer_keep_nobody_else_waiting(start_server, sound):
    body = {"prompt": "a face", "input_audio": sound, "resolution": "128x128"}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, ThreadPoolExecutor(16) as pool:
        slow = {**body, "input_audio": f"http://127.0.0.1:{silent.getsockname()[1]}/"}
        settings = {"fetch_http": True, "fetch_networks": ["127.0.0.0/8"], "fetch_seconds": 6}
        with start_server(**settings) as server, server.client() as client, server.client("other") as other:
            stuck = [pool.submit(client.post, "/api/ai/queue", json=slow) for _ in range(16)]
            time.sleep(0.5)
            started = time.monotonic()
            assert other.post("/api/ai/queue", json=body).status_code == 200
            assert time.monotonic() - started < 3
            assert {one.result().status_code for one in stuck} == {422}


def test_what_was_sent_is_not_kept_while_the_clip_is_made(start_server, tmp_path, monkeypatch):
    """Neither in memory nor, for forms, in temporary files."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "32768")  # so that what is let go is seen to be
    with closing(io.BytesIO()) as file:
        with wave.open(file, "wb") as sound:
            sound.setnchannels(2)
            sound.setsampwidth(2)
            sound.setframerate(48_000)
            sound.writeframes(bytes(30_000_000))
        data = file.getvalue()
    fields = {"prompt": f"until={tmp_path / 'go'}", "resolution": "128x128", "num_frames": 9}
    inline = {"match_audio_length": False, "input_audio": f"data:audio/wav;base64,{base64.b64encode(data).decode()}"}
    form = {"data": {**fields, "match_audio_length": "false"}, "files": {"input_audio": ("a.wav", data)}}

    def resident(server):
        return 4096 * int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])

    def temporary(server):
        held = [str(link.readlink()) for link in Path(f"/proc/{server.process.pid}/fd").iterdir()]
        return [name for name in held if name.endswith("(deleted)")]

    with start_server() as server, ThreadPoolExecutor() as pool, server.client() as client, server.client() as other:
        before, inherited = resident(server), temporary(server)  # pytest's own output, for one
        paths = ("/api/ai/videos/generate", "/v1/videos/sync", "/fal/run/fal-ai/ltx-2.3-quality/audio-to-video")
        calls = [pool.submit(client.post, path, json={**fields, **inline}) for path in paths]
        calls.append(pool.submit(client.post, "/v1/videos/sync", **form))
        try:
            end = time.monotonic() + 30
            while other.get("/api/ai/queue").json()["count"] < len(calls) or temporary(server) != inherited:
                assert time.monotonic() < end
                time.sleep(0.1)
            assert resident(server) - before < 60e6
        finally:
            (tmp_path / "go").touch()
        assert [call.result().status_code for call in calls] == [200] * len(calls)


def test_bodies_as_deep_as_can_be_read(client):
    for depth in range(930, 980):
        body = '{"prompt": "x", "input_audio": "data:,", "seed": ' + "[" * depth + "]" * depth + "}"
        answer = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (depth, answer.text)
