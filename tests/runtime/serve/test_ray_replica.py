# SPDX-License-Identifier: Apache-2.0
"""A replica without Ray: it works until it is let go or not to be trusted, and ends when it hangs."""

import threading
import time

import pytest

from ltxrt.serve import ray_replica
from ltxrt.serve.ray_replica import ClipReplica
from ltxrt.serve.worker import WorkerOptions

OPTIONS = WorkerOptions(name="s/0-a", data="", lease_seconds=60, timeout_seconds=0.1)


class Stand:
    """A worker that does what a test asks, and the store that it beats for."""

    def __init__(self, options):
        self.shared, self.trusted, self.turns, self.beats = self, True, [], []
        self.asked = threading.Event()
        self.does = lambda tell: False

    def renew(self, name):
        self.beats.append(name)

    def turn(self, name, tell):
        self.turns.append(name)
        self.asked.set()
        return self.does(tell)


@pytest.fixture
def replica(monkeypatch):
    monkeypatch.setattr(ray_replica, "Worker", Stand)
    monkeypatch.setattr(ray_replica, "_WAKE_SECONDS", 0.05)
    made = ClipReplica(OPTIONS)
    yield made
    made.leave()


def test_it_looks_again_when_woken_and_leaves_when_told(replica, monkeypatch):
    monkeypatch.setattr(ray_replica, "_WAKE_SECONDS", 60)
    thread = threading.Thread(target=replica.run)
    thread.start()
    worker = replica._worker
    assert worker.asked.wait(10)
    worker.asked.clear()
    replica.wake()
    assert worker.asked.wait(10)
    assert replica.ready() > 0
    replica.leave()
    thread.join(10)
    assert not thread.is_alive()
    assert (set(worker.turns), worker.beats) == ({"s/0-a"}, ["s/0-a"])


def test_it_ends_when_its_pipeline_is_not_to_be_trusted(replica):
    def breaks(tell):
        replica._worker.trusted = False
        return True

    replica._worker.does = breaks
    replica.run()
    assert len(replica._worker.turns) == 1


def test_a_replica_that_hangs_ends_its_process(monkeypatch):
    ended = threading.Event()

    def leave(code):
        assert code == 1
        ended.set()
        threading.Event().wait()  # the thread that watches comes no further

    monkeypatch.setattr(ray_replica, "Worker", Stand)
    monkeypatch.setattr(ray_replica, "_WAKE_SECONDS", 0.05)
    monkeypatch.setattr(ray_replica, "_HANG_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(ray_replica.os, "_exit", leave)
    replica = ClipReplica(OPTIONS)

    def hangs(tell):
        tell("j")
        assert ended.wait(10)
        replica.leave()
        return True

    time.sleep(0.5)  # idle, however long, is no hanging
    assert not ended.is_set()
    replica._worker.does = hangs
    replica.run()
    assert ended.is_set()
