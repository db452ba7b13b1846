# SPDX-License-Identifier: Apache-2.0
"""A job layer with real worker processes on scripted pipelines, and sound to feed it."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Half a second of 16 kHz noise as a WAV file."""
    path = tmp_path_factory.mktemp("media") / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).integers(-5000, 5000, 8_000, np.int16).tobytes())
    return path


@pytest.fixture
def scripted(monkeypatch):
    """Let worker processes import ``fake_worlds``; the factory's name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "fake_worlds:scripted"


@contextmanager
def _running_redis():
    """A Redis of the tests' own: its address. It listens on no network and writes nothing."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    import redis

    # Not in pytest's folder: a socket's path may hold no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ltxrt-redis-") as folder:
        socket = Path(folder) / "socket"
        quiet = ["--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning", "--dir", folder]
        command = [program, "--port", "0", "--unixsocket", str(socket), *quiet]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL) as process,
            redis.Redis(unix_socket_path=str(socket)) as client,
        ):
            try:
                end = time.monotonic() + 30
                while True:
                    assert process.poll() is None
                    assert time.monotonic() < end
                    with suppress(redis.ConnectionError):
                        if client.ping():
                            break
                    time.sleep(0.02)
                yield f"unix://{socket}"
            finally:
                process.kill()
                process.wait(30)


@pytest.fixture(scope="session")
def shared_redis():
    """A Redis for the session; take ``redis_url``."""
    with _running_redis() as url:
        yield url


@pytest.fixture
def running_redis():
    """A context manager that runs a Redis of the test's own."""
    return _running_redis


@pytest.fixture
def redis_url(shared_redis):
    """The address of an empty Redis."""
    import redis

    with redis.Redis.from_url(shared_redis) as client:
        client.flushall()
    return shared_redis


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str
    data: Path
    log: Path

    def client(self, key="secret", **options):
        """An HTTP client with a key."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def lines(self):
        """Its log lines."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def until_ready(self, seconds=60):
        with self.client() as client:
            end = time.monotonic() + seconds
            while client.get("/ready").status_code != 200:
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)


@contextmanager
def serving(folder, *, prelude="", **settings):
    """Start a server on scripted pipelines, after the test's own Python; it ends by SIGTERM and must end with 0."""
    script = (
        f"{prelude}\n"
        "import json, sys; from ltxrt.serve.command import serve; from ltxrt.serve.settings import Settings;"
        "serve(Settings(**json.loads(sys.argv[1])), factory='fake_worlds:scripted')"
    )
    chosen = {
        "data": str(folder / "data"),
        "port": 0,
        "api_keys": ["secret", "other"],
        "warm_up": [],
        "threads": 1,
        "drain_seconds": 20,
        **settings,
    }
    log = folder / f"log{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", script, json.dumps(chosen)], stderr=file, env=environment)
    try:
        end = time.monotonic() + 60
        while '"listening"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        line = next(line for line in log.read_text().splitlines() if '"listening"' in line)
        running = Running(process, f"http://127.0.0.1:{json.loads(line)['port']}", folder / "data", log)
        running.until_ready()
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.returncode in (0, -signal.SIGKILL), log.read_text()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server that the tests share."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def serve_in():
    """``serve_in(folder, **settings)``: a context manager that runs a server on any folder."""
    return serving


@pytest.fixture
def client(server):
    """A client of the shared server, with a key."""
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def sound(speech):
    """The sound as a data URI."""
    return f"data:audio/wav;base64,{base64.b64encode(speech.read_bytes()).decode()}"


@pytest.fixture
def start_server(tmp_path):
    """``start_server(**settings)``: a context manager that runs a server on the test's own folder."""
    return partial(serving, tmp_path)
