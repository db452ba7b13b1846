# SPDX-License-Identifier: Apache-2.0
"""A worker process by itself, without the server that would start it."""

import subprocess
import sys

from ltxrt.serve.job import NewJob
from ltxrt.serve.store import JobStore
from ltxrt.serve.worker import WorkerOptions


def test_a_server_that_is_gone_fails_no_job(tmp_path, scripted, speech):
    """A killed server's pipes close one after the other: here the worker finds out while it reports a step."""
    store = JobStore(tmp_path / "jobs.sqlite", retention_seconds=60)
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    request = {"prompt": "steps=5", "input_audio": str(speech), "resolution": "128x128", "seed": 5}
    options = WorkerOptions(name="w", data=str(tmp_path), factory=scripted, warm_up=(), threads=1)
    command = [sys.executable, "-m", "ltxrt.serve.worker", options.as_argument()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"ready\n"
        worker.stdout.close()
        store.add(NewJob(id="a", owner="me", request=request, echo={}, model="m"), max_queued=1)
        assert worker.wait(20) == 0
    assert store.get("a").state == "processing"
    assert store.recover() == ["a"]
    store.close()
