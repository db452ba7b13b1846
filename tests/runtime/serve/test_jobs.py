# SPDX-License-Identifier: Apache-2.0
"""The job layer with real worker processes: they die, hang, are cancelled and restarted, and every job ends right."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from ltxrt.errors import OutputError
from ltxrt.readback import check_clip
from ltxrt.serve.job import NewJob
from ltxrt.serve.jobs import JobLayer, JobOptions, UnavailableError
from ltxrt.serve.store import QueueFullError, StoreUnavailableError
from ltxrt.serve.worker import WorkerOptions


@pytest.fixture
def layer(tmp_path, scripted):
    """Makes job layers on one data folder: ``layer(max_queued=..., timeout_seconds=...)``."""

    def make(*, factory=scripted, devices=(None,), max_queued=10, on_end=lambda job: None, **worker):
        options = WorkerOptions(name="", data=str(tmp_path / "data"), factory=factory, warm_up=(), threads=1, **worker)
        return JobLayer(JobOptions(worker=options, devices=devices, max_queued=max_queued, on_end=on_end))

    return make


def put(jobs, name, speech, prompt="a face", **fields):
    folder = jobs.incoming_folder / name
    folder.mkdir()
    sound = jobs.folder(name) / "audio.wav"
    (folder / "audio.wav").write_bytes(speech.read_bytes())
    request = {"prompt": prompt, "input_audio": str(sound), "resolution": "128x128", "seed": 5}
    return jobs.submit(NewJob(id=name, owner="me", request=request, echo={}, model="m", **fields), folder)


async def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


async def ended(jobs, *names):
    return [await asyncio.wait_for(jobs.wait(name), 30) for name in names]


def test_clips_are_made_and_checked_and_inputs_removed(layer, speech):
    async def scenario():
        finished = []
        async with layer(on_end=lambda job: finished.append(job.id)).running() as jobs:
            await until(lambda: jobs.pool.ready)
            for name in "ab":
                put(jobs, name, speech)
            first, second = await ended(jobs, "a", "b")
            assert (first.state, second.state) == ("succeeded", "succeeded")
            assert first.result["seed"] == 5
            assert first.result["bytes"] == jobs.clip(first).stat().st_size
            assert check_clip(jobs.clip(first)).ok
            await until(lambda: finished == ["a", "b"])
            assert [path.name for path in jobs.folder("a").iterdir()] == ["clip.mp4"]
            stages = [event.data["stage"] for event in jobs.store.events(0, job_id="a") if event.kind == "progress"]
            assert list(dict.fromkeys(stages)) == ["load", "encode", "denoise_1", "upsample", "denoise_2", "decode"]
            parts = [e.data["progress"] for e in jobs.store.events(0, job_id="a") if e.kind == "progress"]
            assert parts == sorted(parts)
            assert parts[-1] == pytest.approx(1)

    asyncio.run(scenario())


def test_the_worst_that_a_job_can_do_ends_that_job_only(layer, speech):
    async def scenario():
        async with layer().running() as jobs:
            names = {"c": "vast", "d": "die", "e": "raise", "f": "engine", "g": "a face"}
            for name, prompt in names.items():
                put(jobs, name, speech, prompt)
            vast, died, unforeseen, engine, good = await ended(jobs, *names)
            assert (vast.state, vast.error_message) == ("failed", "no size of this length fits")
            assert (died.state, died.error_type) == ("failed", "worker_died")
            assert (unforeseen.state, unforeseen.error_type) == ("failed", "internal_error")
            assert "KeyError" in unforeseen.error_message
            assert (engine.state, engine.error_type) == ("failed", "engine_error")
            assert good.state == "succeeded"
            # One each for the three whose worker is not to be trusted any more.
            assert jobs.pool.slots[0].starts == 4
            assert list(jobs.folder("d").iterdir()) == []

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_started_is_tried_again(layer, speech, monkeypatch, caplog):
    original, tries = asyncio.create_subprocess_exec, []

    async def refused_once(*command, **options):
        tries.append(command)
        if len(tries) == 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await original(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refused_once)

    async def scenario():
        async with layer().running() as jobs:
            put(jobs, "a", speech)
            (job,) = await ended(jobs, "a")
            assert job.state == "succeeded"
            assert jobs.pool.slots[0].starts == 1

    asyncio.run(scenario())
    (refused,) = [record for record in caplog.records if getattr(record, "event", "") == "worker_not_started"]
    assert refused.reason == os.strerror(errno.EAGAIN)


def test_bad_media_fails_without_naming_our_paths(layer, tmp_path, speech):
    text = tmp_path / "text.wav"
    text.write_text("no sound")

    async def scenario():
        async with layer().running() as jobs:
            put(jobs, "a", text)
            (job,) = await ended(jobs, "a")
            assert (job.state, job.error_type) == ("failed", "invalid_media")
            assert job.error_message.startswith("input_audio is not audio; allowed:")
            assert str(tmp_path) not in job.error_message
            assert jobs.pool.slots[0].starts == 1

    asyncio.run(scenario())


def test_cancel_within_one_step(layer, speech):
    async def scenario():
        async with layer().running() as jobs:
            put(jobs, "a", speech, "steps=200 pause=0.1")
            put(jobs, "b", speech)
            await until(lambda: jobs.store.get("a").progress > 0)
            assert jobs.cancel("b").state == "cancelled"
            asked = time.monotonic()
            jobs.cancel("a")
            (job,) = await ended(jobs, "a")
            assert job.state == "cancelled"
            assert time.monotonic() - asked < 2
            steps = [e.data["step"] for e in jobs.store.events(0, job_id="a") if e.kind == "progress"]
            assert len(steps) < 50
            await until(lambda: not list(jobs.folder("a").iterdir()))
            assert jobs.pool.slots[0].starts == 1

    asyncio.run(scenario())


def test_time_limit(layer, speech):
    async def scenario():
        async with layer(timeout_seconds=0.3).running() as jobs:
            put(jobs, "a", speech, "steps=100 pause=0.1")
            (job,) = await ended(jobs, "a")
            assert (job.state, job.error_type) == ("failed", "timeout")

    asyncio.run(scenario())


def test_bounded_queue_and_estimate(layer, speech):
    async def scenario():
        async with layer(max_queued=1, factory="fake_worlds:refuses_to_start").running() as jobs:
            assert jobs.seconds_until_free() == 1
            put(jobs, "a", speech)
            jobs_before = list(jobs.jobs_folder.iterdir())
            with pytest.raises(QueueFullError):
                put(jobs, "b", speech)
            with pytest.raises(QueueFullError):
                jobs.check_room()
            assert list(jobs.jobs_folder.iterdir()) == jobs_before
            assert jobs.seconds_until_free() == 10
            assert not jobs.pool.ready

    asyncio.run(scenario())


def test_two_slots_work_at_once_each_with_its_device(layer, speech):
    async def scenario():
        async with layer(devices=("0", "1")).running() as jobs:
            for name in "ab":
                put(jobs, name, speech, "steps=400 pause=0.05")
            await until(lambda: jobs.store.count("processing") == 2)
            devices = []
            for process_id in jobs.pool.process_ids:
                with open(f"/proc/{process_id}/environ", "rb") as environment:  # noqa: PTH123
                    values = environment.read().split(b"\0")
                devices += [value for value in values if value.startswith(b"CUDA_VISIBLE_DEVICES")]
            assert sorted(devices) == [b"CUDA_VISIBLE_DEVICES=0", b"CUDA_VISIBLE_DEVICES=1"]

    asyncio.run(scenario())


def test_restart_runs_what_waited_and_retries_what_ran(layer, speech):
    async def before():
        async with layer().running() as jobs:
            put(jobs, "a", speech, "steps=8 pause=0.15")
            put(jobs, "b", speech)
            await until(lambda: jobs.store.get("a").progress > 0)
            pids = jobs.pool.process_ids
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    async def after():
        async with layer().running() as jobs:
            first, second = await ended(jobs, "a", "b")
            assert (first.state, first.attempts, first.result["seed"]) == ("succeeded", 2, 5)
            assert (second.state, second.attempts) == ("succeeded", 1)

    asyncio.run(before())
    asyncio.run(after())


def test_drain_finishes_what_runs_and_leaves_what_waits(layer, speech):
    async def scenario():
        async with layer().running() as jobs:
            put(jobs, "a", speech, "steps=8 pause=0.1")
            put(jobs, "b", speech)
            await until(lambda: jobs.store.count("processing"))
            assert await jobs.drain(20)
            assert [jobs.store.get(name).state for name in "ab"] == ["succeeded", "queued"]
            with pytest.raises(UnavailableError):
                put(jobs, "c", speech)
            with pytest.raises(UnavailableError):
                jobs.check_room()

    asyncio.run(scenario())


def test_drain_gives_up_at_its_limit(layer, speech):
    async def scenario():
        async with layer().running() as jobs:
            put(jobs, "a", speech, "steps=100 pause=0.2")
            await until(lambda: jobs.store.count("processing"))
            started = time.monotonic()
            assert not await jobs.drain(0.3)
            assert time.monotonic() - started < 2

    asyncio.run(scenario())


def test_expired_results_are_removed(layer, speech):
    async def scenario():
        async with layer(retention_seconds=1000).running() as jobs:
            put(jobs, "a", speech)
            (job,) = await ended(jobs, "a")
            assert jobs.remove_expired(job.expires_at - 1) == []
            assert jobs.remove_expired(job.expires_at) == ["a"]
            assert jobs.store.get("a") is None
            assert list(jobs.jobs_folder.iterdir()) == []

    asyncio.run(scenario())


def test_the_janitor_survives_a_full_disk(layer, speech, monkeypatch):
    monkeypatch.setattr("ltxrt.serve.jobs._JANITOR_SECONDS", 0.05)

    async def scenario():
        async with layer(retention_seconds=0.2).running() as jobs:
            forget, tries = jobs.store.forget, []

            def full_once(job_id):
                tries.append(job_id)
                if len(tries) == 1:
                    raise StoreUnavailableError("database or disk is full")
                forget(job_id)

            monkeypatch.setattr(jobs.store, "forget", full_once)
            put(jobs, "a", speech)
            await until(lambda: len(tries) > 1 and jobs.store.get("a") is None)

    asyncio.run(scenario())


def test_what_a_crash_left_is_swept(layer, speech):
    jobs = layer()
    (jobs.jobs_folder / "orphan").mkdir()
    (jobs.incoming_folder / "half").mkdir()
    (jobs.incoming_folder / "upload").write_bytes(b"x")

    async def scenario():
        async with jobs.running():
            assert list(jobs.jobs_folder.iterdir()) == []
            assert list(jobs.incoming_folder.iterdir()) == []

    asyncio.run(scenario())


def test_one_server_per_data_folder(layer):
    first = layer()
    with pytest.raises(OutputError, match="another server uses this data folder"):
        layer()

    async def scenario():
        async with first.running():
            pass

    asyncio.run(scenario())


def test_a_worker_ends_when_its_server_is_gone(tmp_path, scripted):
    options = WorkerOptions(name="w", data=str(tmp_path), factory=scripted, warm_up=())
    command = [sys.executable, "-m", "ltxrt.serve.worker", options.as_argument()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"ready\n"
        worker.send_signal(signal.SIGTERM)  # the server's business, not the worker's
        worker.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait(10) == 0
