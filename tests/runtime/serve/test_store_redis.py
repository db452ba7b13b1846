# SPDX-License-Identifier: Apache-2.0
"""What the store on Redis has beyond the other one: leases, several front ends, a connection that can be lost."""

import asyncio
import contextlib
import time

import pytest

from ltxrt import cli
from ltxrt.errors import OutputError
from ltxrt.serve.heartbeat import beating
from ltxrt.serve.job import NewJob
from ltxrt.serve.store import StoreUnavailableError

redis = pytest.importorskip("redis")
from ltxrt.serve.store_redis import RedisStore  # noqa: E402  # with the redis extra only

PROGRESS = {"stage": "decode", "step": 1, "steps": 2, "progress": 0.1 + 0.2, "seconds_left": None}


def new_job(name, **fields):
    return NewJob(**{"id": name, "owner": "me", "request": {"seed": 1}, "echo": {}, "model": "m", **fields})


@pytest.fixture
def front_end(redis_url):
    """``front_end(name, lease_seconds=...)``: that front end's store."""
    with contextlib.ExitStack() as stack:

        def make(server="", lease_seconds=60.0):
            store = RedisStore(redis_url, retention_seconds=100, lease_seconds=lease_seconds, server=server)
            return stack.enter_context(contextlib.closing(store))

        yield make


def test_another_front_end_s_start_leaves_a_living_worker_its_job(front_end):
    front_end("a").add(new_job("j"), max_queued=1)
    front_end("a").claim("a/0")
    assert front_end("b").recover() == []
    assert front_end("b").reclaim() == []
    assert front_end("a").finish("j", "a/0", "succeeded", {"result": {}})


def test_a_lease_that_has_run_out_queues_once_more_with_the_same_seed_then_fails(front_end):
    store = front_end("a", lease_seconds=0.05)
    store.add(new_job("j"), max_queued=9)
    store.add(new_job("k"), max_queued=9)
    store.claim("a/0")
    store.advance("j", "a/0", PROGRESS)
    assert store.get("j").progress == 0.1 + 0.2
    time.sleep(0.1)
    assert front_end("b").reclaim() == ["j"]
    again = store.get("j")
    assert (again.state, again.stage, again.step, again.progress, again.attempts) == ("queued", None, 0, 0, 1)
    # The lost worker was only slow: it is told to stop, and what it says counts no more.
    assert not store.advance("j", "a/0", PROGRESS)
    assert not store.finish("j", "a/0", "succeeded", {"result": {}})
    second = store.claim("a/1")
    assert (second.id, second.request, second.attempts) == ("j", {"seed": 1}, 2)
    time.sleep(0.1)
    assert front_end("b").reclaim() == ["j"]
    assert (store.get("j").state, store.get("j").error_type) == ("failed", "interrupted")
    assert store.count("queued") == 1


def test_who_beats_keeps_its_job(front_end):
    store, other = front_end("a", lease_seconds=0.5), front_end("b")
    store.add(new_job("j"), max_queued=1)
    store.claim("a/0")
    with beating(store, "a/0", 0.5):
        assert store.workers() == 1
        for _ in range(10):
            time.sleep(0.1)
            assert other.reclaim() == []
    time.sleep(0.6)
    assert other.workers() == 0
    assert other.reclaim() == ["j"]


def test_a_replica_that_is_known_to_be_dead_needs_no_lease_to_run_out(front_end):
    store = front_end("a")
    store.add(new_job("j"), max_queued=1)
    store.claim("a/0")
    assert store.requeue("a/1") == []
    assert store.requeue("a/0") == ["j"]
    assert (store.get("j").state, store.workers()) == ("queued", 0)
    store.claim("a/1")
    store.cancel("j")
    assert store.requeue("a/1") == ["j"]
    assert store.get("j").state == "cancelled"


def test_a_front_end_holds_and_counts_its_own_workers_only(front_end):
    a, b = front_end("a"), front_end("b")
    for name in "jk":
        a.add(new_job(name), max_queued=9)
    a.hold(True)
    assert a.claim("a/0") is None
    assert b.claim("b/0").id == "j"
    assert (a.busy(), b.busy()) == (0, 1)
    b.recover()
    assert a.claim("a/0") is None
    a.hold(False)
    assert a.claim("a/0").id == "k"


def test_an_end_is_told_to_one_front_end_once(front_end):
    a, b = front_end("a"), front_end("b")
    for name in "jk":
        a.add(new_job(name), max_queued=9)
    a.cancel("j")
    b.cancel("k")
    assert b.take_ended() == ["j", "k"]
    assert a.take_ended() == []


def test_a_call_whose_answer_was_lost_is_asked_again_and_changes_nothing_twice(front_end, monkeypatch):
    """As the client does by itself: the connection breaks after Redis has done its work."""
    store = front_end()
    script, lost = store._script, []

    def flaky(**call):
        script(**call)
        lost.append(call["args"][0])
        return script(**call)

    monkeypatch.setattr(store, "_script", flaky)
    assert store.add(new_job("j", idempotency_key="k"), max_queued=1).id == "j"
    store.add(new_job("l"), max_queued=9)
    assert store.claim("w").id == "j"
    assert lost == ["add", "add", "claim"]
    assert (store.count("processing"), store.get("j").attempts) == (1, 1)


def test_a_forgotten_job_leaves_nothing(front_end, redis_url):
    store = front_end("a")
    store.add(new_job("only-this-job", idempotency_key="k"), max_queued=1)
    store.claim("a/0")
    store.finish("only-this-job", "a/0", "succeeded", {"result": {}})
    assert store.take_ended() == ["only-this-job"]
    store.forget("only-this-job")
    store.add(new_job("other", idempotency_key="k"), max_queued=1)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        for key in client.scan_iter():
            if ":claim:" in key:
                assert 0 < client.ttl(key) <= 60
                continue
            assert "only-this-job" not in f"{key} {_content(client, key)}"


def _content(client, key):
    readers = {"string": client.get, "hash": client.hgetall, "list": lambda name: client.lrange(name, 0, -1)}
    return readers.get(client.type(key), lambda name: client.zrange(name, 0, -1))(key)


def test_changes_are_told_to_whoever_listens(front_end):
    a, b = front_end("a"), front_end("b")

    async def scenario():
        changes = a.changes()
        first = asyncio.ensure_future(anext(changes))
        end = time.monotonic() + 10
        while not first.done():  # until the subscription stands
            assert time.monotonic() < end
            b.add(new_job(f"{time.monotonic_ns()}"), max_queued=10_000)
            await asyncio.sleep(0.02)
        kind, _ = await first
        assert kind == "queued"
        job = b.claim("b/0")
        while (change := await asyncio.wait_for(anext(changes), 10))[0] == "queued":
            pass
        assert change == ("processing", job.id)
        await changes.aclose()

    asyncio.run(scenario())


def test_a_redis_that_goes_away(running_redis):
    with running_redis() as url:
        store = RedisStore(url, retention_seconds=1)
        store.add(new_job("j"), max_queued=1)

        async def scenario():
            changes = store.changes()
            waiting = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0.2)
            with redis.Redis.from_url(url) as client, contextlib.suppress(redis.ConnectionError):
                client.shutdown(nosave=True)
            with pytest.raises(StoreUnavailableError):
                await asyncio.wait_for(waiting, 10)
            await changes.aclose()

        asyncio.run(scenario())
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            store.get("j")
        assert time.monotonic() - started < 2  # an event loop waits for it
        store.close()


def test_no_redis_there(tmp_path):
    with pytest.raises(OutputError) as error:
        RedisStore("redis://user:pass-word@127.0.0.1:1/0", retention_seconds=1)
    assert str(error.value) == "redis://127.0.0.1:1/0: cannot be used as a job store (ConnectionError)"
    with pytest.raises(OutputError, match=r"unix://.*/nothing: cannot be used"):
        RedisStore(f"unix://{tmp_path}/nothing", retention_seconds=1)


def test_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["serve", "--no-auth", "--port", "0", "--redis", "redis://:pass-word@127.0.0.1:1"]) == 7
    error = "error: redis://127.0.0.1:1: cannot be used as a job store (ConnectionError)"
    assert capsys.readouterr().err.splitlines() == [error]
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_another_version_are_refused(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.set("ltxrt:schema", "99")
    with pytest.raises(OutputError, match="schema version 99, expected 1"):
        RedisStore(redis_url, retention_seconds=1)


def test_a_redis_that_is_too_old_is_refused(redis_url, monkeypatch):
    monkeypatch.setattr(redis.Redis, "info", lambda self, section: {"redis_version": "6.0.16"})
    with pytest.raises(OutputError, match=r"Redis 6\.0\.16; needed: 6\.2 or newer"):
        RedisStore(redis_url, retention_seconds=1)
