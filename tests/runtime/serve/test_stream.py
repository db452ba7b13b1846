# SPDX-License-Identifier: Apache-2.0
"""The clip while it is made: its first bytes come before its end, and whoever goes away cancels it."""

import io
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import av
import httpx2
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


def worker_of(server):
    return [line["pid"] for line in server.lines() if line.get("event") == "worker_started"][-1]


@contextmanager
def begun(client, body):
    """A live stream of which the first bytes have come: the answer, those bytes, and an iterator of the rest."""
    with client.stream("POST", "/v1/videos/stream", json=body) as answer:
        pieces = answer.iter_raw()
        yield answer, next(pieces), pieces


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_worker_that_dies_mid_clip_breaks_the_stream(start_server, sound, tmp_path):
    """What came is the start of the clip and no more, and nobody can take it for the whole."""
    body = fields(sound, prompt=f"halfway={tmp_path / 'go'}", num_frames=97, match_audio_length=False)
    with start_server() as server, server.client() as client, server.client() as watching:
        with begun(client, body) as (answer, first, rest):
            name = answer.headers["x-job-id"]
            assert answer.headers["transfer-encoding"] == "chunked"
            assert answer.headers["x-accel-buffering"] == "no"  # a proxy would hold the fragments back
            os.kill(worker_of(server), signal.SIGKILL)
            with pytest.raises(httpx2.RemoteProtocolError):
                first += b"".join(rest)
        job = watching.get(f"/v1/videos/{name}").json()
        assert (job["status"], job["error"]["code"]) == ("failed", "worker_died")
        assert watching.get(f"/v1/videos/{name}/content").status_code == 409
        wait_for(lambda: list((server.data / "jobs" / name).iterdir()) == [])
        (tmp_path / "go").touch()
        whole = watching.post("/v1/videos/stream", json=body).content  # by the next worker
        assert frames(whole) == 97
        assert whole.startswith(first)
        assert len(first) < len(whole)
        assert "Traceback" not in server.log.read_text()
        assert [line["job"] for line in server.lines() if line.get("event") == "stream_broken"] == [name]


def test_http_1_0_cannot_tell_a_broken_stream_so_it_gets_the_whole_clip(client, server, sound):
    """Its answers end with their connection: a clip of which half came would look complete."""
    body = httpx2.Request("POST", "http://x", json=fields(sound)).read()
    head = f"Host: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(f"POST /v1/videos/stream HTTP/1.0\r\n{head}".encode() + body)
        with connection.makefile("rb") as file:
            lines, _, clip = file.read().partition(b"\r\n\r\n")
    assert f"content-length: {len(clip)}" in lines.decode().lower()
    assert frames(clip) == 12


def test_another_worker_goes_on_where_a_lost_one_stopped(start_server, sound, tmp_path, redis_url):
    """The caller sees one stream, each byte once: the bytes of a clip that nothing happened to."""
    body = fields(sound, prompt=f"halfway={tmp_path / 'go'}", num_frames=97, match_audio_length=False)
    shared = {"redis": redis_url, "lease_seconds": 1.5}
    with start_server(**shared) as server, server.client() as client:
        with begun(client, body) as (answer, first, rest):
            os.kill(worker_of(server), signal.SIGSTOP)  # neither dead nor alive: its lease runs out
            with start_server(**shared):
                (tmp_path / "go").touch()
                data = first + b"".join(rest)
        assert client.get(f"/v1/videos/{answer.headers['x-job-id']}").json()["status"] == "completed"
        with start_server(**shared) as other, other.client() as again:
            assert again.post("/v1/videos/stream", json=body).content == data
        os.kill(worker_of(server), signal.SIGCONT)
    assert frames(data) == 97


def test_who_goes_away_mid_stream_cancels(server, client, sound, tmp_path):
    body = fields(sound, prompt=f"halfway={tmp_path / 'go'}")
    with server.client() as impatient, begun(impatient, body) as (answer, _, _):
        name = answer.headers["x-job-id"]
    wait_for(lambda: client.get(f"/v1/videos/{name}").json()["error"], seconds=5)
    assert client.get(f"/v1/videos/{name}").json()["error"]["code"] == "cancelled"


def test_a_server_that_ends_answers_who_waits_and_keeps_the_jobs(start_server, sound, tmp_path):
    """503 for whom nothing has come, a broken stream for whom something has; the next start makes both clips."""
    names = {}
    with start_server(drain_seconds=0.2) as server, server.client() as client, server.client() as waiting:
        body = fields(sound, prompt=f"halfway={tmp_path / 'go'}")
        with begun(client, body) as (answer, _, rest), ThreadPoolExecutor() as pool:
            names["streamed"] = answer.headers["x-job-id"]
            queued = pool.submit(waiting.post, "/v1/videos/sync", json=fields(sound), headers={"Idempotency-Key": "k"})
            with server.client() as looking:
                wait_for(lambda: looking.get("/api/ai/queue").json()["count"] == 2)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            refused = queued.result()
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            with pytest.raises(httpx2.RemoteProtocolError):
                list(rest)
        assert server.process.wait(30) == 0
        assert time.monotonic() - started < 8
    (tmp_path / "go").touch()
    with start_server() as server, server.client() as client:
        again = client.post("/v1/videos/sync", json=fields(sound), headers={"Idempotency-Key": "k"})
        assert again.status_code == 200
        wait_for(lambda: client.get(f"/v1/videos/{names['streamed']}").json()["status"] == "completed")


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
