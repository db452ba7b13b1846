# SPDX-License-Identifier: Apache-2.0
"""Keeps a front end up with a store that it shares: others' news, ends of jobs, workers that are no more."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from .job import TERMINAL
from .store import StoreUnavailableError
from .store_protocol import SharedStore

__all__ = ["Follower"]

_LOG = logging.getLogger("ltxrt.serve")
_TEND_SECONDS = 1.0
_AGAIN_SECONDS = 1.0  # after a connection was lost
_LOOKS = 3  # for lost workers, in a lease


@dataclass(slots=True, kw_only=True)
class Follower:
    """Runs in a front end's event loop.

    Attributes:
        store: The shared store.
        lease_seconds: How long a silent worker counts as alive.
        changed: Called with the id of every job that changed, whoever changed it.
        ended: Called when jobs have ended.
        queued: Called when there is a new job, or one again.
    """

    store: SharedStore
    lease_seconds: float
    changed: Callable[[str], None]
    ended: Callable[[], None]
    queued: Callable[[], None]
    _reclaimed_at: float = 0.0

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            await asyncio.gather(self._listen(), self._tend())
        except Exception:
            _LOG.exception("the shared store is not followed any more", extra={"event": "follower_failed"})
            raise

    async def _listen(self) -> None:
        while True:
            try:
                async for kind, job_id in self.store.changes():
                    if kind == "queued":
                        self.queued()
                    elif kind in TERMINAL:
                        self._see_off()
                    self.changed(job_id)
            except StoreUnavailableError as error:
                _LOG.error("job store lost", extra={"event": "store_lost", "reason": str(error)})
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _tend(self) -> None:
        """What is not told, or was told while nobody listened."""
        while True:
            self._see_off()
            self._reclaim()
            await asyncio.sleep(_TEND_SECONDS)

    def _see_off(self) -> None:
        try:
            self.ended()
        except StoreUnavailableError:
            return  # ``_listen`` says so

    def _reclaim(self) -> None:
        if time.monotonic() - self._reclaimed_at < self.lease_seconds / _LOOKS:
            return
        self._reclaimed_at = time.monotonic()
        try:
            lost = self.store.reclaim()
        except StoreUnavailableError:
            return
        for job_id in lost:
            _LOG.warning("worker lost", extra={"event": "worker_lost", "job": job_id})
            self.changed(job_id)
