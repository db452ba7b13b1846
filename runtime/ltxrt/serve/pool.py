# SPDX-License-Identifier: Apache-2.0
"""The worker processes: one per slot, watched, replaced when they die, killed when the server ends."""

import asyncio
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Protocol

from .store import StoreUnavailableError
from .store_protocol import Store
from .worker import REDIS_VARIABLE, WorkerOptions

__all__ = ["Pool", "Slot", "WorkerPool"]

_LOG = logging.getLogger("ltxrt.serve")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 30.0
_TIMEOUT_GRACE_SECONDS = 60.0
_WATCH_SECONDS = 5.0
_STORE_PAUSE_SECONDS = 1.0


@dataclass(slots=True)
class Slot:
    """One place for a worker process.

    Attributes:
        number: 0, 1, ...
        device: What ``CUDA_VISIBLE_DEVICES`` is for it; None leaves it as it is.
        process: The process, while there is one.
        ready: Whether it has opened and warmed its pipeline.
        starts: Processes started here so far.
        job_id: The job that it was at last; None before its first.
        busy_since: Monotonic time of the claim of that job.
    """

    number: int
    device: str | None = None
    process: Process | None = None
    ready: bool = False
    starts: int = 0
    job_id: str | None = None
    busy_since: float = 0.0


class Pool(Protocol):
    """The workers, wherever they are."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """A place for each."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a job would be begun at once."""
        ...

    @property
    def process_ids(self) -> list[int]:
        """Of the living workers on this machine."""
        ...

    def start(self) -> None:
        """Start the workers, in the running event loop."""
        ...

    async def stop(self) -> None:
        """Let go of the workers."""
        ...

    def wake(self) -> None:
        """There is a new job."""
        ...


class WorkerPool:
    """Keeps a worker process alive in every slot.

    Args:
        options: What each worker is started with; the name is filled in.
        slots: The slots.
        store: The job store, for what a dead worker leaves behind.
        changed: Called in the event loop with the id of every job that changed.
    """

    def __init__(
        self, options: WorkerOptions, slots: tuple[Slot, ...], store: Store, changed: Callable[[str], None]
    ) -> None:
        self._options, self.slots, self._store, self._changed = options, slots, store, changed
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether every slot's worker is ready."""
        return all(slot.ready for slot in self.slots)

    @property
    def process_ids(self) -> list[int]:
        """Of the living workers."""
        return [slot.process.pid for slot in self.slots if slot.process and slot.process.returncode is None]

    def start(self) -> None:
        """Start the workers, in the running event loop."""
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self.slots]
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Kill the workers; a job that one of them is at is found by the next start's recovery."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self.slots:
            slot.ready = False
            if slot.process is not None:
                with suppress(ProcessLookupError):
                    slot.process.kill()
                await slot.process.wait()

    def wake(self) -> None:
        """There is a new job."""
        for slot in self.slots:
            if slot.process is not None and slot.process.stdin is not None and not slot.process.stdin.is_closing():
                slot.process.stdin.write(b"\n")

    async def _keep(self, slot: Slot) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            name = f"{self._options.server}/{slot.number}-{token_hex(4)}"
            try:
                process = await self._start(slot, name)
            except OSError as error:  # no memory or no process number for one, just now
                was_ready = False
                details = {"event": "worker_not_started", "slot": slot.number, "reason": error.strerror}
                _LOG.error("worker cannot be started", extra=details)
            else:
                was_ready = await self._follow(slot, process)
                code = await process.wait()
                slot.ready = False
                _LOG.warning("worker ended", extra={"event": "worker_ended", "slot": slot.number, "code": code})
                await self._bury(name)
            pause = _FIRST_PAUSE_SECONDS if was_ready else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _bury(self, name: str) -> None:
        while True:
            try:
                for job_id in self._store.bury(name, "worker_died", "the worker process died while it made this clip"):
                    self._changed(job_id)
            except StoreUnavailableError:
                await asyncio.sleep(_STORE_PAUSE_SECONDS)
            else:
                return

    async def _start(self, slot: Slot, name: str) -> Process:
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        environment.pop(REDIS_VARIABLE, None)
        if slot.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.device
        if self._options.redis is not None:
            environment[REDIS_VARIABLE] = self._options.redis
        argument = replace(self._options, name=name).as_argument()
        slot.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ltxrt.serve.worker", argument, stdin=PIPE, stdout=PIPE, env=environment
        )
        slot.starts += 1
        details = {"event": "worker_started", "slot": slot.number, "pid": slot.process.pid}
        _LOG.info("worker started", extra=details)
        return slot.process

    async def _follow(self, slot: Slot, process: Process) -> bool:
        """Read what the worker says until it is gone. Returns whether it was ever ready."""
        assert process.stdout is not None
        was_ready = False
        async for line in process.stdout:
            word = line.decode().strip()
            if word == "ready":
                slot.ready = was_ready = True
                slot.job_id = None
                _LOG.info("worker ready", extra={"event": "worker_ready", "slot": slot.number})
                continue
            if word != slot.job_id:
                slot.job_id, slot.busy_since = word, time.monotonic()
            self._changed(word)
        return was_ready

    async def _watch(self) -> None:
        """Kill a worker that hangs within a step, where it cannot see that its time is over."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            limit = self._options.timeout_seconds + _TIMEOUT_GRACE_SECONDS
            for slot in self.slots:
                if self._hangs(slot, limit) and slot.process is not None:
                    _LOG.error("worker hangs", extra={"event": "worker_hangs", "slot": slot.number})
                    with suppress(ProcessLookupError):
                        slot.process.kill()

    def _hangs(self, slot: Slot, limit_seconds: float) -> bool:
        if slot.job_id is None or time.monotonic() - slot.busy_since <= limit_seconds:
            return False
        with suppress(StoreUnavailableError):
            job = self._store.get(slot.job_id)
            return job is not None and job.state == "processing"
        return False
