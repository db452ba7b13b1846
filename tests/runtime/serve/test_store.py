# SPDX-License-Identifier: Apache-2.0
"""The job stores: every change of state happens once, whoever asks, and everything is there after a restart.

Both stores, the same tests. The leases of the one on Redis run out at once here, so that recovery finds every worker
lost, as it does in SQLite; ``test_store_redis.py`` has those that last.
"""

import sqlite3
import threading
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from ltxrt.serve.job import TERMINAL, NewJob
from ltxrt.serve.store import DuplicateKeyError, JobStore, QueueFullError, StoreUnavailableError


def new_job(name, **fields):
    return NewJob(**{"id": name, "owner": "me", "request": {"seed": 1}, "echo": {}, "model": "m", **fields})


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request, tmp_path):
    """Opens the same store again and again: ``open_store()``."""
    opened = []
    if request.param == "redis":
        from ltxrt.serve.store_redis import RedisStore

        url = request.getfixturevalue("redis_url")

    def make():
        if request.param == "redis":
            opened.append(RedisStore(url, retention_seconds=100, lease_seconds=0))
        else:
            opened.append(JobStore(tmp_path / "jobs.sqlite", retention_seconds=100))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


PROGRESS = {"stage": "decode", "step": 1, "steps": 2, "progress": 0.5, "seconds_left": 3.0}


def test_a_job_s_life(store):
    queued = store.add(new_job("a"), max_queued=1)
    assert (queued.state, queued.attempts, queued.started_at) == ("queued", 0, None)
    claimed = store.claim("w")
    assert (claimed.id, claimed.state, claimed.attempts) == ("a", "processing", 1)
    assert claimed.request == {"seed": 1}
    assert store.advance("a", "w", PROGRESS)
    assert (store.get("a").stage, store.get("a").progress, store.get("a").seconds_left) == ("decode", 0.5, 3.0)
    assert store.finish("a", "w", "succeeded", {"result": {"frames": 9}})
    done = store.get("a")
    assert done.done
    assert (done.state, done.result, done.seconds_left) == ("succeeded", {"frames": 9}, None)
    assert done.expires_at == done.completed_at + 100
    assert done.created_at <= done.started_at <= done.completed_at
    assert [event.kind for event in store.events(0, job_id="a")] == ["queued", "processing", "progress", "succeeded"]
    assert store.recent_seconds() == [done.completed_at - done.started_at]


def test_oldest_first_and_only_once(store):
    for name in "abc":
        store.add(new_job(name), max_queued=3)
    assert [store.position(name) for name in "abc"] == [0, 1, 2]
    assert [store.claim("w").id, store.claim("v").id] == ["a", "b"]
    assert store.position("c") == 0
    assert [job.id for job in store.of_owner("me")] == ["c", "b", "a"]
    assert [job.id for job in store.of_owner("me", states=("queued",))] == ["c"]
    assert store.of_owner("you") == []


def test_two_processes_never_claim_the_same_job(open_store):
    stores = [open_store() for _ in range(4)]
    for number in range(40):
        stores[0].add(new_job(str(number)), max_queued=40)
    claimed = []

    def work(store, name):
        while job := store.claim(name):
            claimed.append(job.id)

    threads = [threading.Thread(target=work, args=(store, str(index))) for index, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed, key=int) == [str(number) for number in range(40)]


def test_full_queue(store):
    store.add(new_job("a"), max_queued=1)
    with pytest.raises(QueueFullError):
        store.add(new_job("b"), max_queued=1)
    store.claim("w")
    store.add(new_job("b"), max_queued=1)


def test_idempotency_key_is_the_owner_s(store):
    store.add(new_job("a", idempotency_key="k", payload_hash="h"), max_queued=9)
    with pytest.raises(DuplicateKeyError) as error:
        store.add(new_job("b", idempotency_key="k"), max_queued=9)
    assert (error.value.job.id, error.value.job.payload_hash) == ("a", "h")
    store.add(new_job("c", idempotency_key="k", owner="you"), max_queued=9)
    assert store.by_key("you", "k").id == "c"
    assert store.get("b") is None


def test_cancel_waiting_running_finished(store):
    store.add(new_job("a"), max_queued=9)
    assert store.cancel("a").state == "cancelled"
    store.add(new_job("b"), max_queued=9)
    store.claim("w")
    assert (store.cancel("b").state, store.get("b").cancel_requested) == ("processing", True)
    assert not store.advance("b", "w", PROGRESS)
    store.finish("b", "w", "cancelled", {})
    store.add(new_job("c"), max_queued=9)
    store.claim("w")
    store.finish("c", "w", "succeeded", {"result": {}})
    assert (store.cancel("c").state, store.get("c").cancel_requested) == ("succeeded", False)
    assert store.cancel("unknown") is None


def test_a_worker_given_up_for_dead_changes_nothing(store):
    store.add(new_job("a"), max_queued=9)
    store.claim("dead")
    assert store.bury("dead", "worker_died", "it died") == ["a"]
    assert not store.advance("a", "dead", PROGRESS)
    assert not store.finish("a", "dead", "succeeded", {"result": {}})
    assert (store.get("a").state, store.get("a").error_type) == ("failed", "worker_died")
    assert store.bury("dead", "worker_died", "it died") == []


def test_recovery_retries_once_with_the_same_seed(store):
    store.add(new_job("a", request={"seed": 77}), max_queued=9)
    store.add(new_job("b"), max_queued=9)
    store.claim("old")
    store.advance("a", "old", PROGRESS)
    assert store.recover() == ["a"]
    again = store.get("a")
    assert (again.state, again.progress, again.stage, again.request) == ("queued", 0, None, {"seed": 77})
    assert not store.finish("a", "old", "succeeded", {"result": {}})
    assert store.claim("new").id == "a"  # it has waited longest
    assert store.recover() == ["a"]
    assert (store.get("a").state, store.get("a").error_type) == ("failed", "interrupted")
    assert store.get("b").state == "queued"


def test_recovery_honours_a_cancel(store):
    store.add(new_job("a"), max_queued=9)
    store.claim("old")
    store.cancel("a")
    store.recover()
    assert store.get("a").state == "cancelled"


def test_nothing_is_claimed_while_on_hold(store):
    store.add(new_job("a"), max_queued=9)
    store.hold(True)
    assert store.claim("w") is None
    store.recover()
    assert store.claim("w").id == "a"


def test_expiry(store):
    store.add(new_job("a"), max_queued=9)
    store.claim("w")
    store.forget("a")
    assert store.get("a") is not None
    assert store.expired(1e12) == []
    store.finish("a", "w", "failed", {"error_type": "x", "error_message": "y"})
    end = store.get("a").expires_at
    assert store.expired(end - 1) == []
    assert store.expired(end) == ["a"]
    store.forget("a")
    assert store.get("a") is None
    assert store.events(0, job_id="a") == []


def test_events_of_an_owner_go_on_where_they_stopped(store):
    store.add(new_job("a"), max_queued=9)
    store.add(new_job("x", owner="you"), max_queued=9)
    last = store.last_event()
    store.claim("w")
    store.finish("a", "w", "failed", {"error_type": "t", "error_message": "m"})
    kinds = [(event.kind, event.data) for event in store.events(last, owner="me")]
    assert kinds == [("processing", {}), ("failed", {"error_type": "t", "error_message": "m"})]
    assert [event.kind for event in store.events(0, owner="you")] == ["queued"]


def test_everything_survives_a_restart(open_store):
    first = open_store()
    before = first.add(new_job("a", echo={"prompt": "ü"}), max_queued=1)
    first.close()
    assert open_store().get("a") == before


def test_a_full_disk_is_an_unavailable_store_and_leaves_nothing_half_done(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite", retention_seconds=100)
    store.add(new_job("a"), max_queued=10)
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = {"prompt": "x" * 100_000}
    with pytest.raises(StoreUnavailableError, match="full"):
        store.add(new_job("b", request=large), max_queued=10)
    assert [job.id for job in (store.get("a"), store.get("b")) if job] == ["a"]
    store._db.execute("PRAGMA max_page_count = 100000")
    assert store.add(new_job("b", request=large), max_queued=10).state == "queued"
    assert [event.kind for event in store.events(0, job_id="b")] == ["queued"]
    store.close()


def test_a_locked_file_is_an_unavailable_store(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite", retention_seconds=100)
    store._db.execute("PRAGMA busy_timeout = 10")
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match="locked"):
            store.add(new_job("a"), max_queued=10)
    assert store.add(new_job("a"), max_queued=10).state == "queued"
    store.close()


def test_a_file_of_another_version_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "jobs.sqlite") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(sqlite3.DatabaseError, match="schema version 99, expected 1"):
        JobStore(tmp_path / "jobs.sqlite", retention_seconds=1)


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls by two workers, callers and restarts: no job is lost, and nothing leaves a final state."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        for job in store.of_owner("me"):  # an earlier run's
            if not job.done:
                store.recover()
                store.recover()
                store.cancel(job.id)
            store.forget(job.id)
        self.seen, self.final = [], {}

    @rule()
    def add(self):
        self.seen.append(str(len(self.seen)))
        self.store.add(new_job(self.seen[-1]), max_queued=1000)

    @rule(worker=st.sampled_from("vw"))
    def claim(self, worker):
        self.store.claim(worker)

    @rule(number=st.integers(0, 5))
    def cancel(self, number):
        self.store.cancel(str(number))

    @rule(worker=st.sampled_from("vw"), number=st.integers(0, 5), state=st.sampled_from(sorted(TERMINAL)))
    def finish(self, worker, number, state):
        self.store.finish(str(number), worker, state, {})

    @rule(worker=st.sampled_from("vw"))
    def bury(self, worker):
        self.store.bury(worker, "worker_died", "")

    @rule()
    def recover(self):
        self.store.recover()

    @invariant()
    def nothing_is_lost_or_comes_back(self):
        states = []
        for name in self.seen:
            job = self.store.get(name)
            states.append(job.state)
            assert job.attempts <= 2
            assert job.done == (job.completed_at is not None)
            if name in self.final:
                assert job.state == self.final[name]
            if job.done:
                self.final[name] = job.state
            numbers = [event.number for event in self.store.events(0, job_id=name)]
            assert all(a < b for a, b in pairwise(numbers))
        for state in set(states):
            assert self.store.count(state) == states.count(state)


def test_any_order_of_calls(open_store):
    store = open_store()
    chosen = settings(max_examples=25, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(lambda: StoreMachine(store), settings=chosen)
