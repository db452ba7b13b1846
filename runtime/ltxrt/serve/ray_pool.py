# SPDX-License-Identifier: Apache-2.0
"""The workers on a Ray cluster: one actor per GPU, watched, replaced when they die, more of them when many jobs wait.

Actors and not a Serve deployment, because replicas take their work from the job store, so that Serve's proxy, router
and queue would have nothing to do; and because each replica of Serve (2.60, ``serve/_private/replica.py``) opens a port
on every network interface, for pickled calls.

Actors end with the front end that started them; what they were at is queued again. A front end whose cluster loses its
head is ended by Ray about a minute later, and is to be started again by its service manager. Needs the ``ray`` extra.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import ray
from ray.exceptions import RayError

from .pool import Slot
from .ray_replica import ClipReplica
from .store import StoreUnavailableError
from .store_protocol import SharedStore
from .worker import WorkerOptions

__all__ = ["RayOptions", "RayPool"]

_LOG = logging.getLogger("ltxrt.serve")
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 5.0  # after a cluster could not be reached
_END_SECONDS = 30.0
_LONGEST_REASON = 300
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 30.0
_LOOPBACK = "127.0.0.1"
# A replica's long call, and beside it those that wake it and let it go.
_THREADS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How many replicas, and where.

    Attributes:
        address: Of the cluster; None starts one on this machine, which nobody else reaches, and ends it at the end.
        gpus: GPUs of a replica; None is one where the cluster has any when the server starts, else none.
        min_replicas: As many run always.
        max_replicas: As many run at most.
        target_ongoing: Unfinished jobs, waiting ones too, for each of which a replica is to run: 2 is half as many.
        idle_seconds: How long a replica that is more than needed is kept.
    """

    address: str | None = None
    gpus: int | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 1.0
    idle_seconds: float = 300.0

    def replicas_for(self, unfinished: int) -> int:
        """How many replicas so many unfinished jobs are to have."""
        return max(self.min_replicas, min(self.max_replicas, math.ceil(unfinished / self.target_ongoing)))


@dataclass(slots=True, eq=False)
class _Replica:
    slot: Slot
    actor: Any = None
    leaving: bool = False
    task: asyncio.Task[None] | None = None


class RayPool:
    """Keeps as many replicas as are wanted alive; a ``Pool``.

    Args:
        options: How many, and where.
        worker: What each is started with; the name is filled in. Its data folder must be reached under the same path
            from every machine of the cluster.
        store: The job store, for what a dead replica leaves behind.
        changed: Called in the event loop with the id of every job that changed.
    """

    def __init__(
        self, options: RayOptions, worker: WorkerOptions, store: SharedStore, changed: Callable[[str], None]
    ) -> None:
        self._options, self._store, self._changed = options, store, changed
        bundle = None if worker.bundle is None else str(Path(worker.bundle).absolute())  # replicas have another cwd
        self._worker = replace(worker, bundle=bundle)
        self._replicas: list[_Replica] = []
        self._numbers = 0
        self._connection: _Connection | None = None
        self._make: Callable[[WorkerOptions], Any] | None = None
        self._news = asyncio.Event()
        self._peak, self._window_end = 0, 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Of the replicas that are there or wanted."""
        return tuple(replica.slot for replica in self._replicas)

    @property
    def ready(self) -> bool:
        """Whether as many replicas as always run do."""
        running = sum(replica.slot.ready for replica in self._replicas)
        return self._make is not None and running >= self._options.min_replicas

    @property
    def process_ids(self) -> list[int]:
        """None: they may be on other machines."""
        return []

    def start(self) -> None:
        """Connect and start the replicas, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Kill the replicas, queue again what they were at, and let go of the cluster."""
        tasks = [task for task in (self._task, *(replica.task for replica in self._replicas)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            await self._connection.leave()

    def wake(self) -> None:
        """There is a new job."""
        self._news.set()
        for replica in self._replicas:
            if replica.slot.ready:
                replica.actor.wake.remote()

    async def _run(self) -> None:
        self._make = await self._connect()
        while True:
            self._news.clear()
            with suppress(StoreUnavailableError):
                self._scale(self._store.count("queued", "processing"), time.monotonic())
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):  # as in ``Watch.wait``
                    await self._news.wait()

    async def _connect(self) -> Callable[[WorkerOptions], Any]:
        """Join the cluster. Returns what starts a replica."""
        self._connection = _Connection(self._options.address, asyncio.get_running_loop())
        self._connection.start()
        await self._connection.joined.wait()
        gpus = self._options.gpus
        if gpus is None:
            gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
        actor_class: Any = ray.remote(ClipReplica)
        _LOG.info("Ray cluster joined", extra={"event": "ray_joined", "gpus_of_a_replica": gpus})
        # Replacements are made here and not by Ray, because what the dead one was at must be queued first.
        return actor_class.options(num_cpus=1, num_gpus=gpus, max_concurrency=_THREADS, max_restarts=0).remote

    def _scale(self, unfinished: int, now: float) -> None:
        wanted = self._options.replicas_for(unfinished)
        self._peak = max(self._peak, wanted)
        staying = [replica for replica in self._replicas if not replica.leaving]
        for _ in range(wanted - len(staying)):
            self._add()
        if now < self._window_end:
            return
        # What was never wanted in all that time goes.
        for replica in staying[self._peak :]:
            replica.leaving = True
            if replica.actor is not None:
                replica.actor.leave.remote()
        self._peak, self._window_end = wanted, now + self._options.idle_seconds

    def _add(self) -> None:
        replica = _Replica(Slot(self._numbers))
        self._numbers += 1
        self._replicas.append(replica)
        replica.task = asyncio.create_task(self._keep(replica))

    async def _keep(self, replica: _Replica) -> None:
        pause = _FIRST_PAUSE_SECONDS
        try:
            while not replica.leaving:
                name = f"{self._worker.server}/{replica.slot.number}-{token_hex(4)}"
                was_ready = await self._live(replica, name)
                pause = _FIRST_PAUSE_SECONDS if was_ready else min(2 * pause, _LONGEST_PAUSE_SECONDS)
                if not replica.leaving:
                    await asyncio.sleep(pause)
        finally:
            self._replicas.remove(replica)

    async def _live(self, replica: _Replica, name: str) -> bool:
        """One actor, from its start to its end. Returns whether it was ever ready."""
        assert self._make is not None  # connected before the first replica
        slot, was_ready = replica.slot, False
        replica.actor = self._make(replace(self._worker, name=name))
        slot.starts += 1
        try:
            process_id = await replica.actor.ready.remote()
            slot.ready = was_ready = True
            _LOG.info("worker ready", extra={"event": "worker_ready", "slot": slot.number, "pid": process_id})
            await replica.actor.run.remote()
            _LOG.info("worker ended", extra={"event": "worker_ended", "slot": slot.number})
        except RayError as error:
            # A replica's own error comes with its traceback; the last line says what it was.
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:_LONGEST_REASON]}"
            _LOG.warning("worker ended", extra={"event": "worker_ended", "slot": slot.number, "reason": reason})
        finally:
            slot.ready = False
            with suppress(RayError):
                ray.kill(replica.actor)
            self._requeue(name)
        return was_ready

    def _requeue(self, name: str) -> None:
        # Where the store is gone too, the end of the lease does the same.
        with suppress(StoreUnavailableError):
            for job_id in self._store.requeue(name):
                self._changed(job_id)


class _Connection(threading.Thread):
    """Ray from its start to its end.

    One thread for both, and no other: Linux ends the processes that ``ray.init`` starts with the thread that called it.
    A daemon, because a cluster that cannot be reached may take minutes to be given up.

    Args:
        address: As in ``RayOptions``.
        loop: The event loop that waits for it.
    """

    def __init__(self, address: str | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self._address, self._loop = address, loop
        self._leave = threading.Event()
        self.joined, self.left = asyncio.Event(), asyncio.Event()

    def run(self) -> None:
        while not self._leave.is_set():
            try:
                self._join()
            except (RayError, OSError, RuntimeError, ValueError) as error:
                _LOG.error("no Ray cluster", extra={"event": "ray_failed", "reason": type(error).__name__})
                self._leave.wait(_AGAIN_SECONDS)
            else:
                self._tell(self.joined)
                self._leave.wait()
        ray.shutdown()
        self._tell(self.left)

    def _join(self) -> None:
        if self._address is not None:
            ray.init(address=self._address, log_to_driver=False, configure_logging=False)
        else:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, _node_ip_address=_LOOPBACK)

    def _tell(self, event: asyncio.Event) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(event.set)

    async def leave(self) -> None:
        """Let go of the cluster; one that was started here ends."""
        self._leave.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.left.wait(), _END_SECONDS)
