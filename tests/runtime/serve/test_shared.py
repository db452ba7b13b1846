# SPDX-License-Identifier: Apache-2.0
"""Several front ends with workers of their own on one Redis and one data folder: what one loses another makes."""

import asyncio
import base64
import os
import time

import pytest

pytest.importorskip("redis")

from ltxrt.errors import OutputError
from ltxrt.serve.clip_job import ClipJob
from ltxrt.serve.job import NewJob
from ltxrt.serve.jobs import JobLayer, JobOptions
from ltxrt.serve.store import JobStore
from ltxrt.serve.store_redis import RedisStore
from ltxrt.serve.worker import WorkerOptions
from ltxrt.testing import fake_pipeline


@pytest.fixture
def front_end(tmp_path, scripted, redis_url):
    """Makes job layers on one folder and one Redis; ``factory`` may be one whose workers never start."""

    def make(*, factory=scripted, on_end=lambda job: None, lease_seconds=2.0, retention_seconds=1000.0):
        options = WorkerOptions(
            name="",
            data=str(tmp_path / "data"),
            factory=factory,
            warm_up=(),
            threads=1,
            redis=redis_url,
            lease_seconds=lease_seconds,
            retention_seconds=retention_seconds,
        )
        return JobLayer(JobOptions(worker=options, max_queued=10, on_end=on_end))

    return make


IDLE = "fake_worlds:refuses_to_start"


def put(jobs, name, speech, prompt="a face"):
    folder = jobs.incoming_folder / name
    folder.mkdir()
    (folder / "audio.wav").write_bytes(speech.read_bytes())
    sound = jobs.folder(name) / "audio.wav"
    request = {"prompt": prompt, "input_audio": str(sound), "resolution": "128x128", "seed": 5}
    return jobs.submit(NewJob(id=name, owner="me", request=request, echo={}, model="m"), folder)


async def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


def let_go(jobs):
    """What ``running`` would do at its end."""
    jobs.store.close()
    jobs._lock.close()


def test_one_takes_the_other_s_jobs_and_each_end_is_seen_to_once(front_end, speech):
    async def scenario():
        ends = []
        async with (
            front_end(factory=IDLE, on_end=lambda job: ends.append(("a", job.id))).running() as a,
            front_end(on_end=lambda job: ends.append(("b", job.id))).running() as b,
        ):
            await until(lambda: b.pool.ready)
            assert not a.pool.ready
            put(a, "j", speech)
            put(a, "k", speech)
            a.cancel("k")
            done = await asyncio.wait_for(a.wait("j"), 30)
            assert (done.state, done.attempts) == ("succeeded", 1)
            assert a.clip(done).stat().st_size == done.result["bytes"]
            await until(lambda: len(ends) == 2)
            await asyncio.sleep(1.2)  # both have looked again
            assert sorted(job_id for _, job_id in ends) == ["j", "k"]
            # The stream's file stays a while: a reader on another machine would lose it with its name.
            assert {path.name for path in a.folder("j").iterdir()} >= {"clip.mp4", "live-1.mp4"}

    asyncio.run(scenario())


def test_news_cross_from_one_to_the_other_at_once(front_end, speech):
    async def scenario():
        async with front_end(factory=IDLE).running() as a, front_end(factory=IDLE).running() as b:
            with a.board.watch("j") as watch:
                end = time.monotonic() + 20
                while True:  # until a listens
                    put(b, f"other{time.monotonic_ns()}", speech) if b.store.count("queued") < 8 else None
                    assert time.monotonic() < end
                    with a.board.watch(None) as any_news:
                        started = time.monotonic()
                        await any_news.wait(0.5)
                        if time.monotonic() - started < 0.4:
                            break
                put(b, "j", speech)
                started = time.monotonic()
                await watch.wait(5)
                assert time.monotonic() - started < 0.5

    asyncio.run(scenario())


def test_a_front_end_that_is_killed_loses_no_job(front_end, start_server, speech, redis_url):
    """Its workers end with it. Their lease runs out, another queues the jobs again, and makes them with their seed."""
    sound = f"data:audio/wav;base64,{base64.b64encode(speech.read_bytes()).decode()}"
    body = {"prompt": "steps=15 pause=0.1", "input_audio": sound, "resolution": "128x128", "seed": 7}
    with start_server(redis=redis_url, lease_seconds=1.5) as server, server.client() as client:
        running, waiting = (client.post("/v1/videos", json=body).json()["id"] for _ in range(2))
        while client.get(f"/v1/videos/{running}").json()["status"] == "queued":
            time.sleep(0.02)
        server.process.kill()
        server.process.wait()

    async def scenario():
        async with front_end(lease_seconds=1.5).running() as jobs:
            again = await asyncio.wait_for(jobs.wait(running), 30)
            other = await asyncio.wait_for(jobs.wait(waiting), 30)
            assert (again.state, again.attempts, again.result["seed"]) == ("succeeded", 2, 7)
            assert (other.state, other.attempts, other.result["seed"]) == ("succeeded", 1, 7)
            await until(lambda: jobs.store.workers() == 1)

    asyncio.run(scenario())


def test_a_drained_front_end_leaves_its_queue_to_the_others(front_end, speech):
    async def scenario():
        async with front_end().running() as a:
            await until(lambda: a.pool.ready)
            put(a, "j", speech, "steps=10 pause=0.1")
            put(a, "k", speech)
            await until(lambda: a.store.get("j").state == "processing")
            assert await a.drain(20)
            assert [a.store.get(name).state for name in "jk"] == ["succeeded", "queued"]
            async with front_end().running() as b:
                assert (await asyncio.wait_for(b.wait("k"), 30)).state == "succeeded"

    asyncio.run(scenario())


def test_a_start_sweeps_only_what_is_old(front_end, tmp_path):
    jobs = front_end(factory=IDLE)
    paths = [jobs.jobs_folder / "new", jobs.jobs_folder / "old", jobs.incoming_folder / "new"]
    for path in (*paths, jobs.incoming_folder / "old"):
        path.mkdir()
        if path.name == "old":
            os.utime(path, (1, 1))

    async def scenario():
        async with jobs.running():
            assert [path.name for path in jobs.jobs_folder.iterdir()] == ["new"]
            assert [path.name for path in jobs.incoming_folder.iterdir()] == ["new"]

    asyncio.run(scenario())


def test_a_lone_server_and_front_ends_do_not_share_a_folder(front_end, tmp_path):
    first, second = front_end(), front_end()
    alone = JobOptions(worker=WorkerOptions(name="", data=str(tmp_path / "data")))
    with pytest.raises(OutputError, match="another server uses this data folder"):
        JobLayer(alone)
    let_go(first)
    let_go(second)


def test_a_redis_that_cannot_be_used_leaves_the_folder_free(front_end, tmp_path, redis_url):
    options = WorkerOptions(name="", data=str(tmp_path / "data"), redis="redis://127.0.0.1:1")
    with pytest.raises(OutputError, match="cannot be used as a job store"):
        JobLayer(JobOptions(worker=options))
    let_go(JobLayer(JobOptions(worker=WorkerOptions(name="", data=str(tmp_path / "data")))))


def test_a_redis_that_is_gone_is_said_so_and_come_back_to(start_server, running_redis, speech):
    with running_redis() as url, start_server(redis=url, drain_seconds=1) as server, server.client() as client:
        os.kill(RedisStore(url, retention_seconds=1)._redis.info("server")["process_id"], 9)
        end = time.monotonic() + 20
        while (answer := client.get("/ready")).status_code != 503:
            assert time.monotonic() < end
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["type"] == "urn:ltxrt:problem:store_unavailable"
        assert client.get("/health").status_code == 200
        assert client.get("/v1/videos/x").json()["error"]["type"] == "store_unavailable"


def test_a_worker_that_was_given_up_touches_nothing_of_the_next_one_s(tmp_path, speech):
    """It was only slow. It finds out at its next step, while the other has half a clip, or a whole one."""
    store = JobStore(tmp_path / "jobs.sqlite", retention_seconds=60)
    request = {"prompt": "a face", "input_audio": str(speech), "resolution": "128x128", "seed": 5}
    store.add(NewJob(id="j", owner="me", request=request, echo={}, model="m"), max_queued=1)
    jobs = [store.claim("slow"), store.recover() and store.claim("next")]
    folder = tmp_path / "j"
    folder.mkdir()
    for name in ("live-2.mp4", "checked-2.mp4", "clip.mp4"):
        (folder / name).write_text(name)
    made = ClipJob(job=jobs[0], folder=folder, worker="slow", store=store, tell=lambda: None, timeout_seconds=60)
    assert made.run(fake_pipeline())
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: name for name in ("live-2.mp4", "checked-2.mp4", "clip.mp4")
    }
    assert (store.get("j").state, store.get("j").attempts) == ("processing", 2)
    store.close()
