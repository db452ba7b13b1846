# SPDX-License-Identifier: Apache-2.0
"""``ltxrt serve`` as a process: the real tiny model, its end by signal, its restart, its refusals to start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from ltxrt import cli
from ltxrt.readback import check_clip

BODY = {"prompt": "a face", "resolution": "128x128", "seed": 3}


def test_a_clip_of_the_tiny_model(tmp_path, sound):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "ltxrt", "serve", "--no-auth", "--port", "0", "--data", str(tmp_path / "data")]
    environment = {**os.environ, "LTXRT_WARM_UP": "low", "LTXRT_THREADS": "1"}
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            while '"listening"' not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            port = next(json.loads(line) for line in log.read_text().splitlines() if '"listening"' in line)["port"]
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                assert client.get("/health").status_code == 200
                body = {
                    **BODY,
                    "input_audio": sound,
                    "match_audio_length": False,
                    "num_frames": 9,
                    "video_quality": "low",
                }
                answer = client.post("/v1/videos/sync", json=body)
                assert answer.status_code == 200, answer.text
                assert client.get("/ready").status_code == 200
        finally:
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
    (tmp_path / "clip.mp4").write_bytes(answer.content)
    assert check_clip(tmp_path / "clip.mp4").frames == 9


def test_drain_then_restart(start_server, sound):
    with start_server(drain_seconds=60) as server, server.client() as client, server.client() as waiting:
        slow = {**BODY, "input_audio": sound, "prompt": "steps=80 pause=0.1"}
        quick = {**slow, "prompt": "a face"}
        names = [client.post("/v1/videos", json=body).json()["id"] for body in (slow, quick)]
        with waiting.stream("GET", "/api/events") as events:
            while client.get(f"/v1/videos/{names[0]}").json()["status"] == "queued":
                time.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                time.sleep(0.02)
            refused = client.post("/v1/videos", json=slow)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "draining")
            assert refused.headers["retry-after"]
            assert client.get(f"/v1/videos/{names[0]}").json()["status"] == "in_progress"
            assert list(events.iter_bytes())  # the open stream ends instead of holding the server
        assert server.process.wait(60) == 0
    with start_server() as server, server.client() as client:
        end = time.monotonic() + 30
        while client.get(f"/v1/videos/{names[1]}").json()["status"] != "completed":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.get(f"/v1/videos/{names[0]}").json()["status"] == "completed"


def test_a_killed_server_leaves_no_process_and_its_jobs_are_made_again(start_server, sound):
    with start_server() as server, server.client() as client:
        slow = {**BODY, "input_audio": sound, "prompt": "steps=20 pause=0.1"}
        name = client.post("/v1/videos", json=slow).json()["id"]
        while client.get(f"/v1/videos/{name}").json()["status"] == "queued":
            time.sleep(0.02)
        workers = [line["pid"] for line in server.lines() if line.get("event") == "worker_started"]
        server.process.kill()
        server.process.wait()
    end = time.monotonic() + 10
    while any(_lives(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    with start_server() as server, server.client() as client:
        end = time.monotonic() + 30
        while (video := client.get(f"/v1/videos/{name}").json())["status"] != "completed":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert video["result"]["seed"] == 3


def _lives(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-auth", "--host", "0.0.0.0"], 3, "no_auth"),
        ([], 3, "api_keys"),
        (["--no-auth", "--bundle", "missing"], 5, "missing"),
        (["--no-auth", "--set", "colour=red"], 3, "colour"),
        (["--api-key-file", "missing"], 3, "api_key_file"),
    ],
)
def test_refusals_to_start(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["serve", *arguments]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", "--no-auth", "--port", str(port)]) == 7
    assert "cannot listen there" in capsys.readouterr().err


def test_a_data_folder_that_is_taken(server, tmp_path, capsys):
    assert cli.run(["serve", "--no-auth", "--port", "0", "--data", str(server.data)]) == 7
    assert capsys.readouterr().err == f"error: {server.data}: another server uses this data folder\n"
