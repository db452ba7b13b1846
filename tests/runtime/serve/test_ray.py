# SPDX-License-Identifier: Apache-2.0
"""``ltxrt serve --ray`` on two simulated nodes: replicas and nodes die while they work, and every job ends right."""

import asyncio
import base64
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ltxrt import cli
from ltxrt.serve.worker import WorkerOptions

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
MARK = "TEST_RAY_MARK"
#: 127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel writes them.
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture
def marked(monkeypatch):
    """Every process that comes from this test has a mark in its environment, and is gone at the end."""
    mark = f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(*mark.split("=", 1))
    yield lambda: processes_with(mark)
    end = time.monotonic() + 30
    while left := processes_with(mark):
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.1)


def processes_with(mark):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def listening_addresses(process_ids):
    """Local addresses, in the kernel's hexadecimal, on which those processes take TCP connections."""
    sockets = set()
    for pid in process_ids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.fixture
def ray_folder(monkeypatch):
    """Where Ray puts its files: its sockets lie deep in it, and a socket's path may hold no more than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture
def nodes(ray_folder, marked, scripted, monkeypatch):
    """A running ``ray_nodes.py``: its address, and a function that kills the node of a process."""
    # The server's own driver joins by a loopback address too.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    arguments = [sys.executable, str(Path(__file__).with_name("ray_nodes.py"))]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"

        def kill(process_id):
            process.stdin.write(f"kill {process_id}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"

        yield address, kill
        process.stdin.close()
        assert process.wait(60) == 0


def until(what, seconds=120):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@needs_ray
@pytest.mark.slow
def test_a_replica_and_a_node_die_and_every_job_ends_right(nodes, marked, start_server, redis_url, speech, tmp_path):
    from ltxrt.serve.store_redis import RedisStore

    address, kill_node = nodes
    sound = f"data:audio/wav;base64,{base64.b64encode(speech.read_bytes()).decode()}"
    body = {"input_audio": sound, "resolution": "128x128"}
    store = RedisStore(redis_url, retention_seconds=1000)
    # A lease so long that nothing here waits for its end.
    settings = {"redis": redis_url, "lease_seconds": 300, "ray": True, "ray_address": address, "ray_max_replicas": 2}

    def submit(client, prompt, seeds):
        return [client.post("/v1/videos", json={**body, "prompt": prompt, "seed": s}).json()["id"] for s in seeds]

    def replicas(server):
        """Process ids of the replicas that are ready."""
        alive = {}
        for line in server.lines():
            if line.get("event") == "worker_ready":
                alive[line["slot"]] = line["pid"]
            elif line.get("event") == "worker_ended":
                alive.pop(line["slot"], None)
        return list(alive.values())

    def ended(names):
        until(lambda: all(store.get(name).done for name in names))
        return [store.get(name) for name in names]

    with contextlib.closing(store), start_server(**settings) as server, server.client() as client:
        assert len(replicas(server)) == 1
        first = submit(client, f"until={tmp_path / 'first'}", (1, 2, 3))
        # Three jobs wait for the one replica: there is a second one, on the other node.
        until(lambda: len(replicas(server)) == 2 and store.count("processing") == 2)
        os.kill(replicas(server)[0], signal.SIGKILL)
        until(lambda: any(store.get(name).attempts == 2 for name in first))
        (tmp_path / "first").touch()
        jobs = ended(first)
        assert [(job.state, job.result["seed"]) for job in jobs] == [("succeeded", seed) for seed in (1, 2, 3)]
        assert sorted(job.attempts for job in jobs) == [1, 1, 2]

        until(lambda: len(replicas(server)) == 2)
        assert listening_addresses(marked()) <= LOOPBACK
        second = submit(client, f"until={tmp_path / 'second'}", (4, 5))
        until(lambda: store.count("processing") == 2)
        kill_node(replicas(server)[-1])
        until(lambda: store.count("queued") == 1)  # nothing is there to run it before the other is done
        (tmp_path / "second").touch()
        jobs = ended(second)
        assert [(job.state, job.result["seed"]) for job in jobs] == [("succeeded", 4), ("succeeded", 5)]
        assert sorted(job.attempts for job in jobs) == [1, 2]
        assert (store.count("succeeded"), store.count("queued", "processing", "failed", "cancelled")) == (5, 0)
        assert client.get("/ready").status_code == 200
        metrics = client.get("/metrics").text
        assert 'ltxrt_jobs_total{outcome="succeeded"} 5.0' in metrics


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_its_own_is_nobody_else_s_and_ends_with_the_server(
    ray_folder, marked, start_server, redis_url, scripted, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray leaves a token there
    with start_server(redis=redis_url, ray=True) as server:
        assert len(marked()) > 5  # Ray's own, and the replica
        assert listening_addresses(marked()) <= LOOPBACK
    assert server.process.returncode == 0
    assert "SIGTERM received" not in server.log.read_text()


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("ray", ["--ray", "--redis", "redis://:pass-word@127.0.0.1"]), ("redis", ["--redis", "redis://:pass-word@h"])],
)
def test_without_the_extra_one_line_says_what_to_install(missing, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr("ltxrt.serve.command.find_spec", lambda name: None if name == missing else found(name))
    assert cli.run(["serve", "--no-auth", *arguments]) == 3
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert f"pip install 'ltxrt[{missing}]'" in error[0]
    assert "pass-word" not in error[0]
    assert list(tmp_path.iterdir()) == []


@needs_ray
def test_as_many_replicas_as_jobs_ask_for():
    from ltxrt.serve.ray_pool import RayOptions

    options = RayOptions(min_replicas=1, max_replicas=4, target_ongoing=2.0)
    assert [options.replicas_for(jobs) for jobs in (0, 1, 2, 3, 4, 7, 8, 100)] == [1, 1, 1, 2, 2, 4, 4, 4]
    assert RayOptions(min_replicas=0, max_replicas=4).replicas_for(0) == 0


@needs_ray
def test_replicas_come_at_once_and_go_when_none_of_them_was_wanted_for_long(monkeypatch):
    """The pool on stand-ins of actors: they run until they are let go."""
    from ltxrt.serve import ray_pool

    requeued = []

    class Store:
        def count(self, *states):
            return 0

        def requeue(self, name):
            requeued.append(name)
            return []

    class Method:
        def __init__(self, call):
            self.remote = call

    class Actor:
        def __init__(self, options):
            self.name, self.left = options.name, asyncio.Event()
            self.ready = Method(lambda: asyncio.sleep(0, 7))
            self.run = Method(self.left.wait)
            self.leave = Method(self.left.set)
            self.wake = Method(lambda: None)

    monkeypatch.setattr(ray_pool.ray, "kill", lambda actor: actor.left.set())

    async def scenario():
        options = ray_pool.RayOptions(min_replicas=1, max_replicas=3, idle_seconds=100)
        pool = ray_pool.RayPool(options, WorkerOptions(name="", data="", server="s"), Store(), lambda job_id: None)
        assert not pool.ready
        pool._make = Actor

        async def scaled(unfinished, now):
            pool._scale(unfinished, now)
            for _ in range(20):
                await asyncio.sleep(0)
            return [slot.number for slot in pool.slots if slot.ready]

        assert await scaled(0, 1000) == [0]
        assert pool.ready
        assert await scaled(2, 1001) == [0, 1]
        assert await scaled(9, 1002) == [0, 1, 2]
        assert await scaled(0, 1099) == [0, 1, 2]
        assert await scaled(2, 1101) == [0, 1, 2]  # three were wanted since 1000
        assert await scaled(1, 1200) == [0, 1, 2]
        assert await scaled(1, 1202) == [0, 1]  # two were, since 1101
        assert await scaled(0, 1303) == [0]  # one was, since 1202
        assert [name.partition("-")[0] for name in requeued] == ["s/2", "s/1"]
        pool.wake()
        await pool.stop()
        assert (pool.slots, pool.ready) == ((), False)

    asyncio.run(scenario())
